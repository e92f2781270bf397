"""Objects moved one by one: the posterior of a hierarchy against quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import ifpyro
from ifpyro import HMC, MCMC, InflationaryFlow
from ifpyro.infer.engines.by_row import RowProposal

WEIGHTS, MEANS, SDS = np.array([0.7, 0.3]), np.array([-1.5, 1.5]), np.array([0.5, 0.4])
N, SEEN, NOISE = 10, 2, 0.9


@pytest.fixture(scope="module")
def flow():
    means = torch.stack([torch.tensor(MEANS), torch.zeros(2, dtype=torch.double)], -1).float()
    covariances = torch.stack([torch.diag(torch.tensor([sd**2, 1.0])) for sd in SDS]).float()
    return InflationaryFlow.from_gaussian_mixture(torch.tensor(WEIGHTS).float(), means, covariances)


def data():
    generator = np.random.default_rng(3)
    kind = generator.choice(2, N, p=WEIGHTS)
    truth = MEANS[kind] + SDS[kind] * generator.standard_normal(N)
    y = torch.tensor(truth[:, None] + NOISE * generator.standard_normal((N, SEEN))).float()
    y[0] = torch.tensor([0.4, 0.2])  # between the two
    return y


def model(y, flow):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("objects", N, dim=-1):
        x = pyro.sample("x", flow.prior())
        with pyro.plate("sightings", SEEN, dim=-2):
            pyro.sample("y", dist.Normal(x[..., 0], s), obs=y.T)


def exact(y):
    """Mean and sd of the noise scale, and each object's probability of the right-hand mode, on a grid of scales."""
    y = y.double().numpy()
    scale = np.linspace(0.2, 3.0, 400)
    centre, within = y.mean(1), ((y - y.mean(1, keepdims=True)) ** 2).sum(1)
    sd = np.sqrt(SDS[:, None, None] ** 2 + scale**2 / SEEN)  # (kinds, 1, scales)
    parts = WEIGHTS[:, None, None] * stats.norm.pdf(centre[:, None], MEANS[:, None, None], sd)
    log = np.log(parts.sum(0)) - (SEEN - 1) * np.log(scale) - within[:, None] / (2 * scale**2)
    log = log.sum(0) + stats.halfnorm.logpdf(scale)
    mass = np.exp(log - log.max())
    mass /= mass.sum()
    right = parts[1] / parts.sum(0)
    mean = (mass * scale).sum()
    return mean, math.sqrt((mass * (scale - mean) ** 2).sum()), right @ mass


def test_a_hierarchy_against_quadrature(flow):
    y = data()
    mean, sd, right = exact(y)
    mcmc = MCMC(HMC(model), 40, 30, num_chains=32, seed=0, progress=False).run(y, flow)
    assert mcmc.attributes["inference_method"] == "hmc by row"
    assert mcmc.attributes["plate"] == "objects"
    draws = mcmc.get_samples()
    s, x = draws["s"].double().numpy(), draws["x"].double().numpy()
    s, x = s.reshape(32, 40), x.reshape(32, 40, N, 2)
    of_chains = s.mean(1)  # chains are independent: their spread is the Monte Carlo error
    error = of_chains.std(ddof=1) / math.sqrt(32)
    assert error < 0.2 * sd
    assert abs(s.mean() - mean) < 4 * error
    assert abs(s.std() / sd - 1) < 0.15
    # each object's mode, by the chance of either component given where it stands
    pdf = WEIGHTS * stats.norm.pdf(x[..., 0, None], MEANS, SDS)
    share = pdf[..., 1] / pdf.sum(-1)
    found, error = share.mean((0, 1)), share.mean(1).std(0, ddof=1) / math.sqrt(32)
    assert (np.abs(found - right) < 4.5 * error + 0.005).all()
    assert 0.05 < right[np.abs(right - 0.5).argmin()] < 0.95  # some object does have two modes


def test_all_at_once_on_request(flow):
    assert HMC(model).rows
    kernel = HMC(model, rows=False)
    density = ifpyro.infer.model.batched.BatchedModel(model, (data(), flow))
    assert kernel.suited_to(density) is kernel
    assert HMC(model).suited_to(density) is not kernel
    with pytest.raises(ValueError, match="rows"):
        HMC(model, rows="some")


def test_proposals_have_the_density_they_say():
    draws = torch.randn(500, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 0.3 + 1.0
    proposal = RowProposal(draws)
    grid = torch.linspace(-6, 6, 2001, dtype=torch.double)
    density = proposal.log_density(grid[:, None, None].expand(-1, 2, 1)).exp()
    torch.testing.assert_close(
        torch.trapezoid(density, grid, dim=0), torch.ones(2, dtype=torch.double), rtol=1e-4, atol=0
    )
    sample = proposal.sample(4000, torch.Generator().manual_seed(1))[:, 0, 0].sort().values
    cdf = torch.cumulative_trapezoid(density[:, 0], grid)
    expected = torch.tensor(np.interp(sample.numpy(), grid[1:].numpy(), cdf.numpy()))
    assert stats.kstest(expected.numpy(), "uniform").pvalue > 1e-3
