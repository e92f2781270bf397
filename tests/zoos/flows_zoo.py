"""Named schedules, mixtures and flows: generic tests run over all of them, so a new variant costs one line."""

import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, constraints

from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.networks.velocity import Velocity

SCHEDULES = {
    "preserving": lambda dim: Schedule.preserving(),
    "preserving, high floor": lambda dim: Schedule.preserving(start=0.1, end=1.565),
    "details first": lambda dim: Schedule.details_first(),
    "details first, p=2": lambda dim: Schedule.details_first(power=2.0),
    "reducing": lambda dim: Schedule.reducing(keep=1, gap=0.5),
    "exponential": lambda dim: Schedule.exponential(1e-4, 1.0, [1.0, 1.0, 0.9, 0.8, 0.8, 0.8][:dim], 14.0),
}
"""Name -> schedule for data of ``dim`` axes."""

SCALES = torch.tensor([3.0, 1.5, 1.0, 0.5, 0.4, 0.3], dtype=torch.double)
"""Standard deviations of axes on which every schedule is valid."""


def mixture(dim: int, dtype=torch.double):
    """Weights, means and covariances of three components of unlike sizes."""
    generator = torch.Generator().manual_seed(dim)
    stretch = torch.linspace(2.0, 0.5, dim, dtype=torch.double)
    means = 1.2 * torch.randn(3, dim, generator=generator, dtype=torch.double) * stretch + 1.0
    factors = 0.3 * torch.randn(3, dim, dim, generator=generator, dtype=torch.double)
    covariances = factors @ factors.mT + torch.tensor([0.1, 0.2, 0.3]).double().view(3, 1, 1) * torch.eye(dim)
    return tuple(v.to(dtype) for v in (torch.tensor([0.5, 0.3, 0.2]), means, covariances))


def mixture_density(weights, means, covariances):
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def smoothed_density(flow):
    """The exact law of standardised coordinates at the noise floor, for a mixture flow."""
    exact, theta = flow.velocity, flow.angles(torch.zeros((), dtype=torch.double))
    cos, sin = theta.cos(), theta.sin()
    covariances = cos[:, None] * exact.covariances.double() * cos + torch.diag(sin**2)
    return mixture_density(exact.weights.double(), exact.means.double() * cos, covariances)


def mixture_flow(dim, dtype, schedule=None, **options):
    return InflationaryFlow.from_gaussian_mixture(*mixture(dim, dtype), schedule=schedule, **options)


def random_mlp(dim: int, dtype=torch.float32, size=0.15, waves=0) -> MLP:
    """A network whose output is far from zero."""
    with torch.random.fork_rng():
        torch.manual_seed(dim)
        network = MLP(dim, width=24, blocks=2, waves=waves)
        torch.nn.init.normal_(network.outlet.weight, std=size)
        torch.nn.init.normal_(network.outlet.bias, std=size)
    return network.to(dtype)


def samples(dim: int, dtype=torch.float32, rows=200):
    generator = torch.Generator().manual_seed(100 + dim)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.double) + 1.5 * torch.eye(dim)
    return (0.3 * torch.randn(rows, dim, generator=generator, dtype=torch.double) @ mixing + 0.5).to(dtype)


def mlp_flow(dim, dtype, schedule=None, **options):
    basis = Basis.from_samples(samples(dim, dtype))
    return InflationaryFlow(basis, schedule or Schedule.details_first(), random_mlp(dim, dtype), **options)


STACK = constraints.stack([constraints.positive, constraints.real, constraints.interval(-1.0, 2.0)], -1)

FLOWS = {
    "mixture 1": lambda dtype: mixture_flow(1, dtype),
    "mixture 2": lambda dtype: mixture_flow(2, dtype),
    "mixture 5": lambda dtype: mixture_flow(5, dtype),
    "preserving": lambda dtype: mixture_flow(3, dtype, Schedule.preserving()),
    "reducing": lambda dtype: mixture_flow(3, dtype, Schedule.reducing(keep=1, gap=0.5)),
    "network 2": lambda dtype: mlp_flow(2, dtype),
    "network 8": lambda dtype: mlp_flow(8, dtype),
    "image": lambda dtype: mlp_flow(6, dtype, event_shape=(2, 3)),
    "positive": lambda dtype: mixture_flow(2, dtype, support=constraints.positive),
    "positive image": lambda dtype: mlp_flow(4, dtype, event_shape=(2, 2), support=constraints.positive),
    "interval": lambda dtype: mixture_flow(2, dtype, support=constraints.interval(-1.0, 3.0)),
    "simplex": lambda dtype: mixture_flow(2, dtype, support=constraints.simplex, event_shape=(3,)),
    "stack": lambda dtype: mixture_flow(3, dtype, support=STACK),
}
"""Name -> flow of that dtype."""


class Counting(Velocity):
    """Another velocity, and how many evaluations it has served."""

    def __init__(self, inner: Velocity):
        super().__init__()
        self.inner, self.calls = inner, 0

    def embed(self, t):
        return self.inner.embed(t)

    def forward(self, y, embedding):
        self.calls += 1
        return self.inner(y, embedding)


def latents(flow, *batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, flow.latent_dim, generator=generator, dtype=torch.double).to(flow.dtype)
