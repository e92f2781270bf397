"""Pyro's SVI on models with flow priors, through `reparam`, against exact posteriors and evidences."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import ClippedAdam

from ifpyro.flow.flow import InflationaryFlow
from ifpyro.flow.solver.grid import Grid
from ifpyro.infer.model.reparam import reparam

MEAN = torch.tensor([1.0, -2.0])
COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 0.5]])
Y = torch.tensor(2.5)
NOISE = 0.5


def gaussian_flow():
    """The density N(MEAN, COVARIANCE): the velocity is zero, so that one step of any solver is exact."""
    return InflationaryFlow.from_gaussian_mixture(
        torch.ones(1), MEAN[None], COVARIANCE[None], grid=Grid(steps=1, method="euler"), coarse_steps=1
    )


FLOW = gaussian_flow()
# x = mean + linear z for this flow
LINEAR = torch.stack([FLOW.decode(e) - FLOW.decode(torch.zeros(2)) for e in torch.eye(2)], -1)


def model(y, flow=FLOW):
    x = pyro.sample("x", flow.prior())
    pyro.sample("y", dist.Normal(x[..., 0], NOISE), obs=y)


def exact_latent_posterior():
    """Mean and precision of z given y, and the log-evidence."""
    a = LINEAR[0]
    precision = torch.eye(2) + torch.outer(a, a) / NOISE**2
    mean = torch.linalg.solve(precision, a * (Y - MEAN[0]) / NOISE**2)
    evidence = dist.Normal(MEAN[0], (a @ a + NOISE**2).sqrt()).log_prob(Y)
    return mean, precision, evidence


def handwritten_guide(y):
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.eye(2), constraint=dist.constraints.lower_cholesky)
    pyro.sample("x_base", dist.MultivariateNormal(loc, scale_tril=scale))


def fit(target, guide, *args, particles=8, vectorized=True, steps=700, nesting=0):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=nesting)
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(target, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)
    return svi


@pytest.fixture(autouse=True)
def _fresh():
    with torch.random.fork_rng():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        yield
        pyro.clear_param_store()


def test_the_flow_is_the_gaussian_it_should_be():
    torch.testing.assert_close(LINEAR @ LINEAR.T, COVARIANCE, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(FLOW.decode(torch.zeros(2)), MEAN, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vectorized", [True, False])
def test_mean_field(vectorized):
    """The best independent normal has the exact mean, and variances from the diagonal of the precision."""
    guide = AutoNormal(reparam(model))
    fit(reparam(model), guide, Y, particles=8 if vectorized else 2, vectorized=vectorized)
    mean, precision, _ = exact_latent_posterior()
    sd = precision.diagonal().rsqrt()
    found = guide.median(Y)
    assert set(found) == {"x_base"}
    assert bool(((found["x_base"] - mean).abs() < 0.1 * sd).all())
    quantiles = guide.quantiles([0.1587, 0.8413], Y)["x_base"]
    torch.testing.assert_close((quantiles[1] - quantiles[0]) / 2, sd, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("kind", ["full", "low rank", "handwritten", "iaf"])
def test_guides_that_contain_the_posterior_reach_the_evidence(kind):
    """ELBO = log-evidence - KL, and KL = 0 is within reach; moments are the posterior's."""
    target = reparam(model)
    guide = {
        "full": lambda: AutoMultivariateNormal(target),
        "low rank": lambda: AutoLowRankMultivariateNormal(target, rank=1),
        "handwritten": lambda: handwritten_guide,
        "iaf": lambda: AutoIAFNormal(target, hidden_dim=[16]),
    }[kind]()
    fit(target, guide, Y)
    mean, precision, evidence = exact_latent_posterior()
    with torch.no_grad():
        elbo = -Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0).loss(target, guide, Y)
    assert abs(elbo - float(evidence)) < 0.03

    draws = Predictive(target, guide=guide, num_samples=4000, parallel=True)(Y)
    z, x = draws["x_base"].reshape(-1, 2), draws["x"].reshape(-1, 2)
    torch.testing.assert_close(x, FLOW.decode(z))
    covariance = torch.linalg.inv(precision)
    sd = covariance.diagonal().sqrt()
    # KL < 0.03 bounds how far the means and deviations can be off, by about sqrt(2 KL) deviations
    assert bool(((z.mean(0) - mean).abs() < 0.15 * sd).all())
    torch.testing.assert_close(z.T.cov() / torch.outer(sd, sd), covariance / torch.outer(sd, sd), rtol=0, atol=0.15)


def test_objects_in_a_plate_with_a_shared_latent():
    """y_i ~ N(x_i0 + shift, noise): jointly Gaussian, vectorised particles to the left of the plate."""
    y = torch.tensor([0.5, 2.0, 3.0])

    def plated(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("objects", len(y)):
            x = pyro.sample("x", FLOW.prior())
            pyro.sample("y", dist.Normal(x[..., 0] + shift, NOISE), obs=y)

    target = reparam(plated)
    guide = AutoMultivariateNormal(target)
    fit(target, guide, y, nesting=1, steps=700)
    marginal = torch.ones(3, 3) + torch.eye(3) * ((LINEAR[0] ** 2).sum() + NOISE**2)
    gain = torch.linalg.solve(marginal, torch.ones(3))
    mean, sd = gain @ (y - MEAN[0]), (1 - gain.sum()).sqrt()
    assert abs(guide.median(y)["shift"] - mean) < 0.15 * sd
    low, high = guide.quantiles([0.1587, 0.8413], y)["shift"]
    assert abs((high - low) / 2 - sd) < 0.15 * sd
    assert guide.median(y)["x_base"].shape == (3, 2)


def test_without_reparam_the_guide_sees_the_data_space():
    """The site is left as it is unless asked: the guide then has x, and the density its log-determinant."""
    guide = AutoMultivariateNormal(model)
    fit(model, guide, Y, particles=4, steps=700)
    gain = COVARIANCE[:, 0] / (COVARIANCE[0, 0] + NOISE**2)
    expected = MEAN + gain * (Y - MEAN[0])
    sd = (COVARIANCE - torch.outer(gain, COVARIANCE[0])).diagonal().sqrt()
    found = guide.median(Y)
    assert set(found) == {"x"}
    assert bool(((found["x"] - expected).abs() < 0.2 * sd).all())


def test_a_flow_is_not_trained_by_the_way():
    from models_zoo import TanhFlow, flow_prior

    flow = TanhFlow(2)
    before = [p.detach().clone() for p in flow.parameters()]

    def with_network(y):
        x = pyro.sample("x", flow_prior(flow))
        pyro.sample("y", dist.Normal(x[..., 0], NOISE), obs=y)

    fit(reparam(with_network), AutoNormal(reparam(with_network)), Y, steps=5)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True))


def test_keyword_arguments_pass_through():
    target = reparam(partial(model, flow=gaussian_flow()))
    assert torch.isfinite(torch.tensor(Trace_ELBO().loss(target, AutoNormal(target), y=Y)))
