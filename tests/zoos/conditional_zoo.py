"""Pairs whose conditional density is known, and the exact conditional flow of a mixture."""

import math

import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ifpyro import ConditionalFlow, Schedule

GIVEN, FREE = [1, 3], [0, 2]


def joint_parts(dtype=torch.double):
    """Weights, means and covariances of three components over four columns."""
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.randn(3, 4, generator=generator, dtype=torch.double)
    factors = 0.4 * torch.randn(3, 4, 4, generator=generator, dtype=torch.double)
    covariances = factors @ factors.mT + 0.15 * torch.eye(4, dtype=torch.double)
    return tuple(v.to(dtype) for v in (torch.tensor([0.5, 0.3, 0.2]), means, covariances))


def joint():
    weights, means, covariances = joint_parts()
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def pairs(count, seed=0, dtype=torch.float):
    """Samples and conditions, ``(count, 2)`` each."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = joint().sample((count,)).to(dtype)
    return rows[:, FREE], rows[:, GIVEN]


def log_conditional(x, c):
    """The exact ``log p(x | c)``, in double precision."""
    weights, means, covariances = joint_parts()
    marginal = MixtureSameFamily(
        Categorical(weights), MultivariateNormal(means[:, GIVEN], covariances[:, GIVEN][:, :, GIVEN])
    )
    x, c = x.double(), c.double()
    both = torch.stack([x[..., 0], c[..., 0], x[..., 1], c[..., 1]], -1)
    return joint().log_prob(both) - marginal.log_prob(c)


def conditional_flow(dtype=torch.double, start=0.01, end=math.pi / 2 - 1e-3, **options):
    """The exact conditional flow of the mixture, whose columns 1 and 3 are given."""
    schedule = Schedule.details_first(start=start, end=end)
    return ConditionalFlow.from_gaussian_mixture(*joint_parts(dtype), given=GIVEN, schedule=schedule, **options)


def narrow_mixture(dtype=torch.double):
    """Two components that part, in one column given another: rows between them need Newton's method."""
    means = torch.tensor([[-2.0, -0.3], [2.0, 0.3]], dtype=dtype)
    covariances = torch.diag_embed(torch.tensor([[0.01, 1.0], [0.01, 1.0]], dtype=dtype))
    return ConditionalFlow.from_gaussian_mixture(torch.tensor([0.5, 0.5], dtype=dtype), means, covariances, given=[1])
