"""Inference through a conditional prior, whose condition is observed or latent, against the exact mixture."""

import math

import pyro
import pyro.distributions as dist
import torch

import ifpyro
from conditional_zoo import FREE, GIVEN, conditional_flow, joint_parts, pairs
from ifpyro import Grid
from ifpyro.infer.model.batched import BatchedModel

SD, Y = 0.4, 0.9


def hierarchical(flow):
    """A latent condition: ``c ~ N(0, I)``, ``x | c``, and the first entry of ``x`` is seen with noise."""

    def model():
        c = pyro.sample("c", dist.Normal(torch.zeros(2, dtype=flow.dtype), 1.0).to_event(1))
        x = pyro.sample("x", flow.prior(c))
        pyro.sample("y", dist.Normal(x[..., 0], SD), obs=torch.tensor(Y, dtype=flow.dtype))

    return model


def objects(flow, known, y):
    """Objects in a plate, whose conditions share a latent first entry: ``c_i = (a, known_i)``."""

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=flow.dtype), 1.0))
        with pyro.plate("objects", len(known)):
            c = torch.stack(torch.broadcast_tensors(a, known), -1)
            x = pyro.sample("x", flow.prior(c))
            pyro.sample("y", dist.Normal(x[..., 0], SD), obs=y)

    return model


def seen_given(c, y):
    """The exact ``log p(y | c)`` of a noisy first entry, for conditions ``(..., 2)``."""
    weights, means, covariances = joint_parts()
    seen = [FREE[0], *GIVEN]
    noise = torch.diag(torch.tensor([SD**2, 0.0, 0.0], dtype=torch.double))
    both = dist.MultivariateNormal(means[:, seen], covariances[:, seen][:, :, seen] + noise)
    alone = dist.MultivariateNormal(means[:, GIVEN], covariances[:, GIVEN][:, :, GIVEN])
    rows = torch.cat([torch.as_tensor(y, dtype=torch.double).expand(c.shape[:-1])[..., None], c], -1)
    log_weights = weights.log()
    return (both.log_prob(rows.unsqueeze(-2)) + log_weights).logsumexp(-1) - (
        alone.log_prob(c.unsqueeze(-2)) + log_weights
    ).logsumexp(-1)


def exact_hierarchical():
    """Evidence, and mean and standard deviation of ``c`` in the posterior, by quadrature."""
    axis = torch.linspace(-6, 6, 401, dtype=torch.double)
    c = torch.cartesian_prod(axis, axis)
    log_joint = seen_given(c, Y) + dist.Normal(0.0, 1.0).log_prob(c).sum(-1)
    weight = log_joint.softmax(0)
    mean = weight @ c
    return float(log_joint.logsumexp(0)) + 2 * math.log(12 / 400), mean, (weight @ (c - mean).square()).sqrt()


def exact_objects(known, y):
    axis = torch.linspace(-6, 6, 1001, dtype=torch.double)
    c = torch.stack(torch.broadcast_tensors(axis[:, None], known.double()), -1)
    log_joint = seen_given(c, y.double()).sum(1) + dist.Normal(0.0, 1.0).log_prob(axis)
    weight = log_joint.softmax(0)
    mean = weight @ axis
    return float(log_joint.logsumexp(0)) + math.log(12 / 1000), mean, (weight @ (axis - mean).square()).sqrt()


def plate_data(count, seed=0):
    x, c = pairs(count, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return c[:, 1], x[:, 0] + SD * torch.randn(count)


def test_gradient_of_the_posterior_reaches_a_latent_condition():
    flow = conditional_flow(torch.double, grid=Grid(4))
    density = BatchedModel(hierarchical(flow))
    q = density.sample_prior(5, torch.Generator().manual_seed(0))
    one = q[:1].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda q: density(q)[1], (one,))
    assert density.batching == "plate"


def test_smc_through_a_latent_condition():
    flow = conditional_flow(torch.float, grid=Grid(6))
    log_evidence, mean, sd = exact_hierarchical()
    smc = ifpyro.SMC(hierarchical(flow), 512, prior_draws=1, max_moves=5, seed=0, progress=False).run()
    assert abs(smc.log_evidence - log_evidence) < 3 * smc.log_evidence_se + 0.01
    draws = smc.get_samples()["c"].double()
    assert bool(((draws.mean(0) - mean).abs() < 4 * sd / 200**0.5).all())


def test_hmc_through_a_latent_condition():
    flow = conditional_flow(torch.float, grid=Grid(6))
    _, mean, sd = exact_hierarchical()
    mcmc = ifpyro.MCMC(ifpyro.HMC(hierarchical(flow)), 20, 20, 64, seed=0, progress=False).run()
    draws = mcmc.get_samples()["c"].double()
    assert bool(((draws.mean(0) - mean).abs() < 4 * sd / 300**0.5).all())
    assert bool(((draws.std(0) / sd - 1).abs() < 0.15).all())


def test_objects_with_a_latent_shared_condition():
    count = 4
    flow = conditional_flow(torch.float, grid=Grid(4))
    known, y = plate_data(count)
    log_evidence, mean, sd = exact_objects(known, y)
    smc = ifpyro.SMC(objects(flow, known, y), 256, prior_draws=1, max_moves=3, seed=0, progress=False).run()
    assert abs(smc.log_evidence - log_evidence) < 3 * smc.log_evidence_se + 0.01
    assert abs(float(smc.get_samples()["a"].double().mean() - mean)) < 4 * float(sd) / 200**0.5
    assert smc.get_samples()["x"].shape == (256, count, 2)
