"""Posteriors under linear observations by noising and denoising, against exact ones."""

import pytest
import torch
from torch.distributions import constraints

import ifpyro
from flows_zoo import mlp_flow
from ifpyro.flow.flow import InflationaryFlow

DRAWS = 4000
GENERATOR = torch.Generator().manual_seed(0)
MEANS = torch.tensor([[1.0, 1.0, 0.0, 0.0], [-1.0, 0.5, 0.5, -1.0]])
ROOTS = 0.4 * torch.randn(2, 4, 4, generator=GENERATOR)
COVARIANCES = ROOTS @ ROOTS.mT + 0.05 * torch.eye(4)
OPERATORS = {
    "two pixels seen": torch.eye(4)[[0, 2]],
    "averages": torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.3, 0.2]]),
    "more data than pixels": torch.tensor(
        [[0.6, 0.2, 0.0, 0.0], [0.0, 0.5, 0.2, 0.0], [0.3, 0.3, 0.3, 0.1], [0.0, 0.0, 0.2, 1.1], [0.1, 0.0, 0.0, 0.4]]
    ),
}


def conditional(weights, means, covariances, operator, y, sd):
    """Mean and covariance of a Gaussian mixture given ``y``."""
    log_weights, centres, spreads = [], [], []
    for w, m, c in zip(weights, means, covariances, strict=True):
        seen = operator @ c @ operator.T + sd**2 * torch.eye(len(y))
        gain = c @ operator.T @ torch.linalg.inv(seen)
        residual = y - operator @ m
        log_weights.append(w.log() - 0.5 * (residual @ torch.linalg.solve(seen, residual) + torch.logdet(seen)))
        centres.append(m + gain @ residual)
        spreads.append(c - gain @ operator @ c)
    w, m = torch.stack(log_weights).softmax(0), torch.stack(centres)
    mean = w @ m
    centred = m - mean
    return mean, torch.einsum("k,kij->ij", w, torch.stack(spreads) + centred[:, :, None] * centred[:, None])


def errors(draws, mean, covariance):
    """Of the mean, in standard deviations; of standard deviations, relative; of correlations."""
    sd = covariance.diagonal().sqrt()
    correlation = covariance / sd / sd[:, None]
    return (
        (draws.mean(0) - mean).div(sd).abs().max(),
        (draws.std(0) / sd - 1).abs().max(),
        (torch.corrcoef(draws.T) - correlation).abs().max(),
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_gaussian_prior_is_exact_at_any_step(name):
    """Without a network every step of the reverse process is exact: what is left is Monte Carlo error."""
    weights, operator = torch.ones(1), OPERATORS[name]
    flow = InflationaryFlow.from_gaussian_mixture(weights, MEANS[:1], COVARIANCES[:1])
    y = operator @ MEANS[0] + torch.linspace(-0.8, 0.9, len(operator))
    draws = ifpyro.linear_posterior(flow, operator, y, 0.3, draws=DRAWS, sweeps=60, ratio=0.3, progress=False)
    mean, sd, correlation = errors(draws, *conditional(weights, MEANS[:1], COVARIANCES[:1], operator, y, 0.3))
    assert mean < 4.5 * DRAWS**-0.5
    assert sd < 4.5 * (2 * DRAWS) ** -0.5
    assert correlation < 4.5 * DRAWS**-0.5


@pytest.mark.parametrize("name", OPERATORS)
def test_mixture_prior(name):
    """Two modes; steps of a tenth leave a few hundredths of a standard deviation."""
    weights, operator = torch.tensor([0.4, 0.6]), OPERATORS[name]
    flow = InflationaryFlow.from_gaussian_mixture(weights, MEANS, COVARIANCES)
    y = operator @ MEANS.mean(0) + torch.linspace(-0.1, 0.1, len(operator))
    draws = ifpyro.linear_posterior(
        flow, operator, y, 0.3, draws=DRAWS, sweeps=30, ratio=0.9, progress=False, batch_size=DRAWS
    )
    found = errors(draws, *conditional(weights, MEANS, COVARIANCES, operator, y, 0.3))
    assert max(found) < 0.05 + 4 * DRAWS**-0.5


def test_several_observations_are_their_own_problems_and_seeds_repeat():
    flow = InflationaryFlow.from_gaussian_mixture(torch.ones(1), MEANS[:1], COVARIANCES[:1])
    operator = OPERATORS["averages"]
    y = torch.stack([operator @ MEANS[0] - 0.5, operator @ MEANS[0] + 0.5])
    options = {"draws": 1000, "sweeps": 30, "ratio": 0.3, "progress": False}
    draws = ifpyro.linear_posterior(flow, operator, y, 0.3, **options)
    assert draws.shape == (2, 1000, 4)
    for found, observed in zip(draws, y, strict=True):
        exact = conditional(torch.ones(1), MEANS[:1], COVARIANCES[:1], operator, observed, 0.3)
        assert errors(found, *exact)[0] < 4.5 * 1000**-0.5
    torch.testing.assert_close(ifpyro.linear_posterior(flow, operator, y, 0.3, **options), draws, rtol=0, atol=0)
    other = ifpyro.linear_posterior(flow, operator, y, 0.3, seed=1, **options)
    assert not torch.equal(other, draws)


def test_chains_begin_where_they_are_told_and_leave_the_posterior_as_it_is():
    weights, operator = torch.ones(1), OPERATORS["two pixels seen"]
    flow = InflationaryFlow.from_gaussian_mixture(weights, MEANS[:1], COVARIANCES[:1])
    y = operator @ MEANS[0] + torch.tensor([0.5, -0.5])
    mean, covariance = conditional(weights, MEANS[:1], COVARIANCES[:1], operator, y, 0.3)
    noise = torch.randn(DRAWS, 4, generator=torch.Generator().manual_seed(3))
    exact = mean + noise @ torch.linalg.cholesky(covariance).T
    options = {"draws": DRAWS, "ratio": 0.3, "progress": False}
    draws = ifpyro.linear_posterior(flow, operator, y, 0.3, sweeps=1, start=exact, **options)
    assert not torch.equal(draws, exact)
    found = errors(draws, mean, covariance)
    assert found[0] < 4.5 * DRAWS**-0.5
    assert found[1] < 4.5 * (2 * DRAWS) ** -0.5
    far = ifpyro.linear_posterior(flow, operator, y, 0.3, sweeps=1, start=exact + 20, **options)
    assert errors(far, mean, covariance)[0] > 1  # one sweep does not forget
    with pytest.raises(ValueError, match=r"start of shape \(4000, 4\).* got \(3999, 4\)"):
        ifpyro.linear_posterior(flow, operator, y, 0.3, start=exact[1:], **options)


def test_bad_input():
    flow = mlp_flow(3, torch.float)
    seen = torch.eye(3)[:2]
    with pytest.raises(ValueError, match=r"operator of shape \(m, 3\)"):
        ifpyro.linear_posterior(flow, torch.eye(4), torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match="y of shape"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="sd > 0"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="0 < ratio < 1"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(2), 0.1, ratio=1.0)
    flow.support = constraints.positive
    with pytest.raises(ValueError, match="real data"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(2), 0.1)
    unequal = InflationaryFlow.from_gaussian_mixture(
        torch.ones(1), MEANS[:1], COVARIANCES[:1], schedule=ifpyro.Schedule.preserving()
    )
    with pytest.raises(ValueError, match="same noise on every axis"):
        ifpyro.linear_posterior(unequal, torch.eye(4), torch.zeros(4), 0.1)


def test_hidden_pixels_arrive_where_the_posterior_is():
    """What is hidden hangs on a small difference of what is seen, which more noise hides: chains come from annealing
    far from the posterior, and ten sweeps without over-relaxation would leave them 0.7 standard deviations away."""
    seen, noise = torch.eye(3)[:2], 0.1
    covariance = torch.tensor([[1.01, 0.99, 0.06], [0.99, 1.01, -0.06], [0.06, -0.06, 0.40]])
    flow = InflationaryFlow.from_gaussian_mixture(torch.ones(1), torch.zeros(1, 3), covariance[None])
    y = torch.tensor([[0.3, 0.0], [0.0, 0.3], [1.2, 0.9], [-0.9, -0.6]])
    draws = ifpyro.linear_posterior(flow, seen, y, noise, draws=2000, progress=False, batch_size=8000)
    for found, observed in zip(draws, y, strict=True):
        exact = conditional(torch.ones(1), torch.zeros(1, 3), covariance[None], seen, observed, noise)
        assert errors(found, *exact)[0] < 0.1 + 4 * 2000**-0.5
