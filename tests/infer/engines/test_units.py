"""Nothing depends on the units in which parameters are measured, nor on columns being centred."""

import pytest
import torch

from exact_densities import conjugate
from ifpyro.infer import HMC, MCMC, SMC
from ifpyro.infer.engines.guided_density import Target
from ifpyro.infer.engines.jumps import IndependenceProposal
from ifpyro.infer.engines.metric import metric_from_draws, prior_metric
from regressions import InUnits, calendar, summers

UNITS = torch.tensor([2.0**-20, 2.0**20, 1.0, 2.0**-7], dtype=torch.float64)
"""From a millionth to a million, and powers of two: a change of units then rounds nothing."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dense", [False, True, None])
def test_the_metric_follows_the_units(dense):
    draws = torch.randn(300, 4, generator=generator()) @ torch.randn(4, 4, generator=generator(1))
    weight = torch.rand(300, generator=generator(2))
    here, there = (metric_from_draws(q, weight, dense=dense) for q in (draws, draws * UNITS.float()))
    torch.testing.assert_close(here.whiten(draws), there.whiten(draws * UNITS.float()))
    scale = UNITS.float() if here.scale.ndim == 1 else UNITS.float()[:, None]
    torch.testing.assert_close(here.scale * scale, there.scale, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("width", [1e-2, 1e-5])
def test_draws_that_show_a_ridge_keep_it(width):
    z = torch.randn(2000, 3, generator=generator(), dtype=torch.float64)
    ridge = torch.stack([z[:, 0], z[:, 0] + width * z[:, 1], z[:, 2]], 1)
    whitened = metric_from_draws(ridge[:200]).whiten(ridge[200:])
    spread = torch.linalg.eigvalsh(torch.cov(whitened.T))
    assert 0.7 < float(spread[0]) < float(spread[-1]) < 1.4


def test_draws_that_show_no_correlation_get_none():
    """Eighty draws in forty dimensions: their own covariance has directions 300 times narrower than others."""
    q = torch.randn(2080, 40, generator=generator(), dtype=torch.float64)
    whitened = metric_from_draws(q[:80]).whiten(q[80:])
    spread = torch.linalg.eigvalsh(torch.cov(whitened.T))
    alone = torch.linalg.eigvalsh(torch.cov(q[80:].T))
    assert float(spread[-1] / spread[0]) < 2.5 * float(alone[-1] / alone[0])


def test_an_axis_without_spread_is_given_a_scale_of_its_own():
    q = torch.randn(50, 3, generator=generator())
    q[:, 0] = 1e6
    q[:, 2] *= 1e-6
    weight = torch.zeros(50)
    weight[:2] = 1.0
    weight[2:4] = 1e-12
    for metric in (metric_from_draws(q), metric_from_draws(q, weight)):
        assert 1e-2 < float(metric.scale[0].max()) < 1.0  # the last digit of a million
        assert float(metric.scale[2].max()) < 1e-5
        assert (metric.scale.diagonal() if metric.scale.ndim == 2 else metric.scale).min() > 0


def test_smc_gives_the_same_in_any_units():
    problem = conjugate(sd=0.02)
    here, there = (SMC(p, 128, seed=1, progress=False).run() for p in (problem, InUnits(problem, UNITS)))
    assert len(here.stages) > 3
    assert there.log_evidence == pytest.approx(here.log_evidence, abs=1e-6)
    assert [s.num_steps for s in there.stages] == [s.num_steps for s in here.stages]
    torch.testing.assert_close(there.positions() / UNITS, here.positions(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("init", ["smc", "prior"])
def test_hmc_gives_the_same_in_any_units(init):
    problem = conjugate(sd=0.1)
    here, there = (
        MCMC(HMC(p), 5, 24, 16, init=init, smc_particles=64, seed=1, progress=False).run()
        for p in (problem, InUnits(problem, UNITS))
    )
    assert torch.equal(there.sample_stats()["n_steps"], here.sample_stats()["n_steps"])
    torch.testing.assert_close(there.positions() / UNITS, here.positions(), rtol=1e-4, atol=1e-4)


def test_prior_metric_has_the_scales_of_the_prior():
    problem = InUnits(conjugate(), UNITS)
    scale = prior_metric(problem, 16, generator()).scale
    assert ((scale / UNITS > 0.6) & (scale / UNITS < 1.5)).all()


def test_proposals_follow_a_ridge():
    """Kernels around the draws of a ridge as narrow as the ridge: its draws are accepted."""
    problem = conjugate()
    z = torch.randn(400, 4, generator=generator(), dtype=torch.float64)
    ridge = z.clone()
    ridge[:, 1] = z[:, 0] + 1e-5 * z[:, 1]
    drawn = IndependenceProposal(ridge, Target(problem)).sample(1000, generator(1))
    inside = (drawn[:, 1] - drawn[:, 0]).abs() < 4e-5
    assert float(inside.double().mean()) > 0.8  # but for the tenth from the prior


@pytest.mark.parametrize("make", [calendar, summers])
def test_columns_that_nobody_centred(make):
    problem = make()
    smc = SMC(problem, 512, seed=1, progress=False).run()
    draws = smc.pooled(512)[:, :-1].double().numpy()
    assert abs(smc.log_evidence - problem.log_evidence) < 4 * smc.log_evidence_se < 1.0
    assert (abs(draws.mean(0) - problem.posterior_mean) / problem.posterior_sd).max() < 0.2
    assert abs(draws.std(0) / problem.posterior_sd - 1).max() < 0.15
