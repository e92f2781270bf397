"""Elliptical slice sampling, alone and with delayed acceptance of a coarse slice."""

import pytest
import torch

from exact_densities import BIASES, PROBLEMS, assert_exact, conjugate, two_modes
from ifpyro.infer import MCMC, EllipticalSlice


@pytest.mark.parametrize("name", ["conjugate", "warped"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("init", ["prior", "smc"])
def test_elliptical_slice_is_exact(name, biased, init):
    problem = PROBLEMS[name](bias=BIASES[name] * biased)
    kernel = EllipticalSlice(problem, level="coarse" if biased else None)
    mcmc = MCMC(kernel, 300, 40, 64, init=init, smc_particles=256, seed=3, progress=False).run()
    assert_exact(problem, mcmc.positions())
    stats = mcmc.sample_stats()
    assert bool((stats["acceptance_rate"] < 1).any()) == biased
    assert (stats["n_steps"] >= 1).all()


def test_no_gradient_is_taken():
    problem = conjugate()
    MCMC(EllipticalSlice(problem), 5, 5, 8, init="prior", seed=1, progress=False).run()
    assert problem.gradients == 0
    assert problem.values > 0


def test_the_guide_is_used_for_the_slice_and_the_fine_density_once():
    problem = conjugate(bias=0.15)
    kernel = EllipticalSlice(problem, level="coarse")
    mcmc = MCMC(kernel, 50, 0, 16, init="prior", seed=1, progress=False).run()
    log_prior, log_likelihood = problem(mcmc.positions().reshape(-1, problem.dim))
    torch.testing.assert_close(mcmc.sample_stats()["lp"].flatten(), log_prior + log_likelihood)


def test_other_priors_are_refused():
    problem = two_modes()
    with pytest.raises(ValueError, match="flow prior or a standard normal one"):
        MCMC(EllipticalSlice(problem), 5, 5, 8, seed=1, progress=False).run()
    assert problem.values == 0  # said before any work is done
    with pytest.raises(TypeError, match="EllipticalSlice expects a Pyro model"):
        EllipticalSlice(3)
