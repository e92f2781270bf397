"""Posteriors under linear observations against exact ones: what is exact, and what is approximate and says so."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import ifpyro
from flows_zoo import mixture, mlp_flow
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.flow import InflationaryFlow
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid
from ifpyro.infer.engines.linear_densities import FromGaussian
from ifpyro.infer.engines.linear_observation import LinearObservation
from ifpyro.infer.engines.linear_reverse import conjugate_gradients

DRAWS = 2000
GENERATOR = torch.Generator().manual_seed(0)
MEAN = torch.tensor([1.0, 1.0, 0.0, 0.0])
ROOT = 0.4 * torch.randn(4, 4, generator=GENERATOR)
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(4)
OPERATORS = {
    "all": torch.eye(4),
    "two pixels seen": torch.eye(4)[[0, 2]],
    "averages": torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.3, 0.2]]),
    "more data than pixels": torch.tensor(
        [[0.6, 0.2, 0.0, 0.0], [0.0, 0.5, 0.2, 0.0], [0.3, 0.3, 0.3, 0.1], [0.0, 0.0, 0.2, 1.1], [0.1, 0.0, 0.0, 0.4]]
    ),
    "nothing": torch.zeros(0, 4),
}
NOISE = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
WEIGHTS5, MEANS5, COVARIANCES5 = mixture(5)
SEEN5 = torch.tensor([True, False, True, False, False])


def gaussian_flow(schedule=None, dtype=torch.float):
    """A network whose output is zero leaves the Gaussian of the basis."""
    basis = Basis.from_moments(MEAN.double(), COVARIANCE.double(), torch.empty(0, dtype=dtype))
    network = MLP(4, width=4, blocks=1).to(dtype)
    return InflationaryFlow(basis, schedule or ifpyro.Schedule.details_first(), network, grid=Grid(2))


def conditional(weights, means, covariances, operator, y, sd):
    """Weights, means, covariances of a Gaussian mixture given ``y``, and the log-evidence, in double precision."""
    operator, y = operator.double(), y.double()
    noise = torch.diag(torch.as_tensor(sd, dtype=torch.double).expand(len(y)) ** 2)
    log_weights, centres, spreads = [], [], []
    for w, m, c in zip(weights.double(), means.double(), covariances.double(), strict=True):
        seen = operator @ c @ operator.T + noise
        gain = c @ operator.T @ torch.linalg.inv(seen)
        residual = y - operator @ m
        log_weights.append(
            w.log() - 0.5 * (residual @ torch.linalg.solve(seen, residual) + torch.logdet(2 * math.pi * seen))
        )
        centres.append(m + gain @ residual)
        spreads.append(c - gain @ operator @ c)
    log_weights = torch.stack(log_weights)
    return log_weights.softmax(0), torch.stack(centres), torch.stack(spreads), log_weights.logsumexp(0)


def moments(weights, means, covariances):
    mean = weights @ means
    centred = means - mean
    return mean, torch.einsum("k,kij->ij", weights, covariances + centred[:, :, None] * centred[:, None])


def standardised(draws, mean, covariance):
    """Draws that have mean zero and covariance one if they are from the Gaussian."""
    values, axes = torch.linalg.eigh(covariance.double())
    return (draws.double() - mean) @ axes / values.sqrt()


def assert_standard(z):
    """Mean and covariance of rows agree with N(0, I), by their Monte Carlo errors (some 20 figures are compared)."""
    n, dim = z.shape
    assert z.mean(0).abs().max() < 4.5 * n**-0.5
    assert (z.T @ z / n - torch.eye(dim)).abs().max() < 4.5 * (2 / n) ** 0.5


def observe(operator, sd):
    """Observations off the prior's mean, by about its spread and the noise's."""
    return operator @ MEAN + 0.3 * operator.sum(1) + sd * torch.linspace(-0.8, 0.9, len(operator))


CASES = [(sd, name) for sd in NOISE for name in OPERATORS]


@pytest.mark.parametrize(("sd", "name"), CASES)
def test_the_reverse_process_is_exact_for_a_gaussian_at_every_noise(sd, name):
    """From a thousandth to a hundred times the scales, at steps of any size: what is left is Monte Carlo error."""
    operator = OPERATORS[name]
    y = observe(operator, sd)
    draws = ifpyro.linear_posterior(
        gaussian_flow(), operator, y, sd, draws=DRAWS, exact=False, sweeps=1, ratio=0.1, progress=False
    )
    _, means, covariances, _ = conditional(torch.ones(1), MEAN[None], COVARIANCE[None], operator, y, sd)
    assert_standard(standardised(draws, means[0], covariances[0]))


@pytest.mark.parametrize(("sd", "name"), CASES[::4])
def test_a_gaussian_flow_has_the_exact_posterior_at_every_noise(sd, name):
    """Importance weights are one, so that draws are independent ones of the exact posterior; every noise and every
    operator comes in turn."""
    operator = OPERATORS[name]
    y = observe(operator, sd)
    draws = ifpyro.linear_posterior(gaussian_flow(), operator, y, sd, draws=512, progress=False)
    assert draws.exact
    assert draws.method == "importance sampling from the Gaussian's posterior" or name == "nothing"
    _, means, covariances, log_evidence = conditional(torch.ones(1), MEAN[None], COVARIANCE[None], operator, y, sd)
    assert_standard(standardised(draws, means[0], covariances[0]))
    assert float(draws.log_evidence) == pytest.approx(float(log_evidence), abs=0.02)


@pytest.mark.parametrize("exact", [True, False])
def test_noise_may_differ_from_entry_to_entry(exact):
    operator, sd = OPERATORS["more data than pixels"], torch.tensor([1e-3, 0.1, 3.0, 100.0, 0.5])
    y = operator @ MEAN + 0.3
    draws = ifpyro.linear_posterior(
        gaussian_flow(), operator, y, sd, draws=512, exact=exact, sweeps=1, ratio=0.1, progress=False
    )
    _, means, covariances, _ = conditional(torch.ones(1), MEAN[None], COVARIANCE[None], operator, y, sd)
    assert_standard(standardised(draws, means[0], covariances[0]))


@pytest.mark.parametrize("schedule", [ifpyro.Schedule.preserving(), ifpyro.Schedule.details_first(power=2.0)])
@pytest.mark.parametrize("exact", [True, False])
def test_any_schedule_will_do(schedule, exact):
    operator = OPERATORS["averages"]
    y = operator @ MEAN + 0.2
    draws = ifpyro.linear_posterior(
        gaussian_flow(schedule), operator, y, 0.1, draws=512, exact=exact, sweeps=1, ratio=0.1, progress=False
    )
    _, means, covariances, _ = conditional(torch.ones(1), MEAN[None], COVARIANCE[None], operator, y, 0.1)
    assert_standard(standardised(draws, means[0], covariances[0]))


def mixture_observations(count, sd):
    """Truths of the five-dimensional mixture, and what is seen of each."""
    generator = torch.Generator().manual_seed(5)
    which = torch.multinomial(WEIGHTS5, count, replacement=True, generator=generator)
    noise = torch.randn(count, 5, generator=generator, dtype=torch.double)
    x = MEANS5[which] + torch.einsum("nij,nj->ni", torch.linalg.cholesky(COVARIANCES5)[which], noise)
    return x[:, SEEN5] + sd * torch.randn(count, 2, generator=generator, dtype=torch.double)


@pytest.mark.parametrize("sd", [1e-3, 0.1, 10.0])
def test_intervals_of_a_mixture_cover_what_they_say(sd):
    """The exact posterior probability of the draws' central 90% intervals, two of five dimensions being seen; and the
    evidence."""
    flow = InflationaryFlow.from_gaussian_mixture(*mixture(5, torch.float), grid=Grid(8))
    y = mixture_observations(2, sd)
    draws = ifpyro.linear_posterior(flow, SEEN5, y, sd, draws=256, progress=False)
    assert draws.shape == (2, 256, 5)
    assert draws.exact
    for k, seen in enumerate(y):
        weights, means, covariances, log_evidence = conditional(
            WEIGHTS5, MEANS5, COVARIANCES5, torch.eye(5)[SEEN5], seen, sd
        )
        spread = covariances.diagonal(dim1=1, dim2=2).sqrt()
        low, high = (draws[k].double().quantile(q, 0) for q in (0.05, 0.95))
        within = torch.special.ndtr((high - means) / spread) - torch.special.ndtr((low - means) / spread)
        coverage = weights @ within
        assert 0.87 < float(coverage.mean()) < 0.93
        # A quantile of 256 draws has a standard error of 0.014, two of them in an interval.
        assert (coverage - 0.9).abs().max() < 0.09
        assert float(draws.log_evidence[k]) == pytest.approx(float(log_evidence), abs=0.3)


def test_weights_of_separated_modes():
    """Two modes eight standard deviations apart, told from each other by half a nat: shares, not only places."""
    weights, means = torch.tensor([0.4, 0.6]), torch.tensor([[-2.0, 0.0], [2.0, 0.5]])
    covariances = torch.diag(torch.tensor([0.25, 1.0])).expand(2, 2, 2)
    flow = InflationaryFlow.from_gaussian_mixture(weights, means, covariances)
    operator, y = torch.tensor([[0.0, 1.0]]), torch.tensor([0.6])
    draws = ifpyro.linear_posterior(flow, operator, y, 0.5, draws=1024, progress=False)
    exact, *_ = conditional(weights, means, covariances, operator, y, 0.5)
    share = float((draws[:, 0] > 0).float().mean())
    assert share == pytest.approx(float(exact[1]), abs=4 * 2**0.5 * (0.25 / 1024) ** 0.5)  # twice resampled


@pytest.mark.parametrize("sd", [0.2, 3.0])
def test_a_network_agrees_with_tempered_smc(sd):
    """On a flow that is nobody's mixture, the evidence and the moments are those of the sampler of the latent."""
    flow = mlp_flow(3, torch.float)
    y = flow.sample((), seed=4)[:2]
    found = ifpyro.linear_posterior(flow, torch.eye(3)[:2], y, sd, draws=512, progress=False)

    def model():
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., :2], sd).to_event(1), obs=y)

    smc = ifpyro.SMC(model, 512, seed=0, max_moves=8, progress=False).run()
    theirs = smc.get_samples()["x"]
    assert float(found.log_evidence) == pytest.approx(smc.log_evidence, abs=0.02 + 4 * smc.log_evidence_se)
    spread = theirs.std(0)
    assert ((found.mean(0) - theirs.mean(0)) / spread).abs().max() < 5 * (2 / 512) ** 0.5
    assert (found.std(0) / spread - 1).abs().max() < 5 * (1 / 512) ** 0.5 + 0.1


def test_the_surrogate_is_corrected():
    """A surrogate that is far off costs weights, and is then not used: the result stays right."""
    flow = InflationaryFlow.from_gaussian_mixture(*mixture(5, torch.float), grid=Grid(8))
    y = mixture_observations(1, 0.1)[0]
    exact = conditional(WEIGHTS5, MEANS5, COVARIANCES5, torch.eye(5)[SEEN5], y, 0.1)[3]
    seen = LinearObservation.read(flow, SEEN5, y, 0.1)
    crude = FromGaussian(flow, seen, 256)
    crude.evaluations = 1
    with torch.no_grad():
        q = crude.sample_prior(256, torch.Generator().manual_seed(0))
        assert (crude.log_ratio(q, 1) - crude.log_ratio(q, None)).std() > 0.3
        crude.match(q)
    assert crude.evaluations is None or crude.evaluations > 1
    draws = ifpyro.linear_posterior(flow, SEEN5, y, 0.1, progress=False)
    assert float(draws.log_evidence) == pytest.approx(float(exact), abs=0.3)


def test_more_sweeps_bring_the_reverse_process_nearer():
    """Its error on a mixture is there, falls with the sweeps, and the result says that it is approximate."""
    flow = InflationaryFlow.from_gaussian_mixture(*mixture(5, torch.float), grid=Grid(8))
    y = mixture_observations(4, 0.3)
    away = []
    for sweeps in (1, 10):
        draws = ifpyro.linear_posterior(flow, SEEN5, y, 0.3, draws=512, exact=False, sweeps=sweeps, progress=False)
        assert not draws.exact
        assert draws.log_evidence is None
        assert draws.method == f"reverse process, {sweeps} sweeps, noise levels a factor 0.75 apart"
        errors = []
        for found, seen in zip(draws, y, strict=True):
            exact = conditional(WEIGHTS5, MEANS5, COVARIANCES5, torch.eye(5)[SEEN5], seen, 0.3)
            mean, covariance = moments(*exact[:3])
            errors.append(((found.double().mean(0) - mean) / covariance.diagonal().sqrt()).square())
        away.append(float(torch.stack(errors).mean().sqrt()))
    assert away[1] < 0.7 * away[0]
    assert away[1] < 0.2


def test_several_observations_are_their_own_problems_and_seeds_repeat():
    flow, operator = gaussian_flow(), OPERATORS["averages"]
    y = torch.stack([operator @ MEAN - 0.5, operator @ MEAN + 0.5])
    for exact in (True, False):
        options = {"draws": 256, "exact": exact, "sweeps": 1, "ratio": 0.3, "progress": False}
        draws = ifpyro.linear_posterior(flow, operator, y, 0.3, **options)
        assert draws.shape == (2, 256, 4)
        for found, observed in zip(draws, y, strict=True):
            _, means, covariances, _ = conditional(torch.ones(1), MEAN[None], COVARIANCE[None], operator, observed, 0.3)
            assert_standard(standardised(found, means[0], covariances[0]))
        torch.testing.assert_close(ifpyro.linear_posterior(flow, operator, y, 0.3, **options), draws, rtol=0, atol=0)
        assert not torch.equal(ifpyro.linear_posterior(flow, operator, y, 0.3, seed=1, **options), draws)
    grid = ifpyro.linear_posterior(flow, operator, y.expand(2, 2, 2), 0.3, draws=5, progress=False)
    assert grid.shape == (2, 2, 5, 4)
    assert grid.log_evidence.shape == (2, 2)
    assert ifpyro.linear_posterior(flow, operator, y[:0], 0.3, draws=5, progress=False).shape == (0, 5, 4)


def test_draws_are_a_tensor_that_knows_how_it_was_made():
    flow, operator = gaussian_flow(dtype=torch.double), OPERATORS["averages"]
    draws = ifpyro.linear_posterior(flow, operator, operator @ MEAN, 0.3, draws=8, progress=False)
    assert draws.dtype == torch.double
    assert draws.exact
    assert type(draws.mean(0)) is torch.Tensor
    assert type(draws + 1) is torch.Tensor
    assert draws.numpy().shape == (8, 4)
    many = mlp_flow(40, torch.float)
    assert not ifpyro.linear_posterior(many, torch.eye(40)[:2], torch.zeros(2), 0.3, draws=2, progress=False).exact


def test_the_random_state_is_left_alone():
    flow, operator = gaussian_flow(), OPERATORS["averages"]
    before = torch.get_rng_state()
    for exact in (True, False):
        ifpyro.linear_posterior(flow, operator, operator @ MEAN, 0.3, draws=4, exact=exact, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_input():
    flow = mlp_flow(3, torch.float)
    seen = torch.eye(3)[:2]
    with pytest.raises(ValueError, match="draws must be an integer of at least 1, got 0"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(2), 0.1, draws=0)
    with pytest.raises(ValueError, match=r"ratio must be .* between 0 and 1, got 1\.0"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(2), 0.1, ratio=1.0)
    with pytest.raises(TypeError, match="expects a flow, got NoneType"):
        ifpyro.linear_posterior(None, seen, torch.zeros(2), 0.1)
    flow.exact_up_to = 2
    with pytest.raises(ValueError, match=r"exact=True expects .* at most 2 axes, got 3; use ifpyro\.SMC"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(2), 0.1, exact=True)
    flow.support = constraints.positive
    with pytest.raises(ValueError, match="real data"):
        ifpyro.linear_posterior(flow, seen, torch.zeros(2), 0.1)


def test_conjugate_gradients_solve_and_say_where_they_do_not():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=generator, dtype=torch.double)
    matrix = root @ root.T + 0.1 * torch.eye(30)
    right = torch.randn(5, 30, generator=generator, dtype=torch.double)
    right[2] = 0
    found = conjugate_gradients(lambda r: r @ matrix, right)
    torch.testing.assert_close(found @ matrix, right, rtol=0, atol=1e-6)
    hilbert = 1 / (torch.arange(200.0)[:, None] + torch.arange(200.0) + 1).double() + 1e-13 * torch.eye(200)
    with pytest.warns(UserWarning, match="conjugate gradients left"):
        conjugate_gradients(lambda r: r @ hilbert, torch.randn(2, 200, generator=generator, dtype=torch.double))
