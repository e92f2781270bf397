"""SMC that starts from a flow: the same posterior and the same evidence as from the prior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import ifpyro
from conditional_zoo import conditional_flow, joint_parts
from ifpyro import Grid
from ifpyro.infer.engines.started import StartedDensity
from ifpyro.infer.model.batched import BatchedModel

SD = 0.3


def two_sided(y):
    """The sign of ``theta`` is not seen: a posterior with two modes."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("y", dist.Normal(theta.abs(), SD), obs=y)


def exact_two_sided(y):
    theta = torch.linspace(-6, 6, 4001, dtype=torch.double)
    log_joint = dist.Normal(0.0, 1.0).log_prob(theta) + dist.Normal(theta.abs(), SD).log_prob(torch.tensor(float(y)))
    return float(log_joint.logsumexp(0)) + math.log(12 / 4000)


def wide_flow(scale=1.5):
    """A Gaussian as a flow in one dimension."""
    return ifpyro.InflationaryFlow.from_gaussian_mixture(
        torch.ones(1), torch.full((1, 1), 0.3), torch.full((1, 1, 1), scale**2), grid=Grid(2)
    )


def test_mixture_of_start_is_normalised_and_is_what_is_drawn():
    density = BatchedModel(two_sided, (torch.tensor(1.0),))
    started = StartedDensity(density, wide_flow(), 0.3)
    q = torch.linspace(-12, 12, 2001)[:, None]
    log_start, rest = started(q)
    assert float(log_start.double().exp().sum() * 24 / 2000) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(log_start + rest, sum(density(q)), atol=1e-4, rtol=0)
    draws = started.sample_prior(20_000, torch.Generator().manual_seed(0)).flatten()
    cumulated = (log_start.double().exp() * 24 / 2000).cumsum(0)
    shares = torch.searchsorted(draws.sort().values, q.flatten()) / 20_000
    assert float((shares - cumulated).abs().max()) < 1.7 / 20_000**0.5


def test_posterior_with_two_modes_from_a_flow_that_is_wrong():
    y = torch.tensor(1.2)
    smc = ifpyro.SMC(two_sided, 512, start=wide_flow(0.4), seed=1, progress=False, prior_draws=1).run(y)
    assert abs(smc.log_evidence - exact_two_sided(y)) < 3 * smc.log_evidence_se + 0.005
    theta = smc.get_samples()["theta"]
    assert 0.4 < float((theta > 0).double().mean()) < 0.6
    assert float(theta.abs().mean()) == pytest.approx(1.1, abs=0.05)


def test_exact_conditional_flow_needs_no_move():
    weights, means, covariances = (part.double() for part in joint_parts())
    flow = conditional_flow(torch.double, grid=Grid(8))
    c = torch.tensor([0.2, -0.4], dtype=torch.double)
    prior = ifpyro.InflationaryFlow.from_gaussian_mixture(
        weights, means[:, [0, 2]], covariances[:, [0, 2]][:, :, [0, 2]], grid=Grid(8)
    )
    seen = torch.distributions.MultivariateNormal(means[:, [1, 3]], covariances[:, [1, 3]][:, :, [1, 3]])
    log_evidence = float((seen.log_prob(c) + weights.log()).logsumexp(0))

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.double), 10.0).to_event(1))
        # The joint density over the flat prior's: its posterior is x | c, its evidence that of c.
        flat = dist.Normal(torch.zeros(2, dtype=torch.double), 10.0).log_prob(x).sum(-1)
        both = torch.stack([x[..., 0], c[0].expand(x.shape[:-1]), x[..., 1], c[1].expand(x.shape[:-1])], -1)
        joint = torch.distributions.MultivariateNormal(means, covariances, validate_args=False)
        log_joint = (joint.log_prob(both.unsqueeze(-2)) + weights.log()).logsumexp(-1)
        pyro.factor("likelihood", log_joint - flat)

    smc = ifpyro.SMC(model, 400, start=flow.given(c), defensive=0.05, seed=0, progress=False).run()
    assert smc.pareto_k < 0.5
    assert [stage.moves for stage in smc.stages] == [0]
    assert abs(smc.log_evidence - log_evidence) < 3 * smc.log_evidence_se + 0.005
    assert smc.log_evidence_se < 0.03
    assert prior.latent_dim == 2


def test_start_over_the_value_of_a_constrained_site():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.7).expand([1]).to_event(1))
        pyro.sample("y", dist.Normal(torch.zeros(()), scale[..., 0]), obs=y)

    generator = torch.Generator().manual_seed(0)
    samples = (0.7 * torch.randn(500, 1, generator=generator)).exp()
    flow = ifpyro.fit(samples, support=constraints.positive, max_steps=0, seed=0, progress=False)
    y = torch.tensor(0.8)
    q = torch.linspace(-5, 5, 4001, dtype=torch.double)
    log_joint = dist.Normal(0.0, 0.7).log_prob(q) + dist.Normal(0.0, q.exp()).log_prob(y.double())
    exact = float(log_joint.logsumexp(0)) + math.log(10 / 4000)
    smc = ifpyro.SMC(model, 256, start=flow, seed=0, progress=False).run(y)
    assert abs(smc.log_evidence - exact) < 3 * smc.log_evidence_se + 0.005


def test_wrong_starts_are_refused():
    y = torch.tensor(1.0)
    two = ifpyro.InflationaryFlow.from_gaussian_mixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    with pytest.raises(ValueError, match="1 unconstrained dimensions, of one condition; got one of 2"):
        ifpyro.SMC(two_sided, 64, start=two, progress=False).run(y)
    with pytest.raises(ValueError, match="defensive expects"):
        ifpyro.SMC(two_sided, 64, start=wide_flow(), defensive=1.0, progress=False).run(y)
