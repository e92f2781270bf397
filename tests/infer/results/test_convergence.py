"""The checks at the end of a run: silent on draws that are right, and a warning that names what is wrong."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ifpyro
from exact_densities import PROBLEMS, conjugate
from flows_zoo import mlp_flow
from ifpyro import HMC, MCMC, SMC, ConvergenceWarning
from ifpyro.infer.model.many import ManyDataSets
from ifpyro.infer.results.convergence import judge, observation_check


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clean(chains=4, draws=200, islands=False):
    """Samples and statistics of a run with which all is well."""
    samples = {"mu": normal(chains, draws), "theta": normal(chains, draws, 2, 3, seed=1)}
    lp = normal(chains, draws, seed=2)
    stats = {
        "lp": lp,
        "acceptance_rate": torch.full_like(lp, 0.8),
        "diverging": torch.zeros_like(lp, dtype=torch.bool),
        "fidelity_gap": 0.3 * normal(chains, draws, seed=3),
    }
    if islands:
        stats["log_weight"] = 0.2 * normal(chains, 1, seed=4).expand(chains, draws)
    return samples, stats


def failed(samples, stats, **options):
    return {check.name: check for check in judge(samples, stats, **options).checks if not check.passed}


@pytest.mark.parametrize("islands", [False, True])
def test_nothing_is_said_where_all_is_well(islands):
    verdict = judge(*clean(islands=islands), pareto_k=0.3)
    assert verdict.converged
    assert not failed(*clean(islands=islands), pareto_k=math.nan)
    table = verdict.table()
    assert list(table.columns) == ["quantity", "value", "limit", "passed", "advice"]
    assert table.passed.all()
    assert (table.advice == "").all()
    assert {"R-hat", "bulk ESS", "tail ESS", "divergences", "acceptance", "guide gap", "Pareto k"} <= set(table.index)
    assert ("island evidences" in table.index) == islands


def test_chains_that_disagree():
    samples, stats = clean()
    samples["theta"][0, :, 1, 2] += 1.0
    check = failed(samples, stats)["R-hat"]
    assert check.quantity == "theta[1, 2]"
    assert check.value > 1.05
    assert "for theta[1, 2]" in check.said
    assert "chains disagree" in check.said
    assert "num_samples" in check.advice


def test_islands_that_disagree():
    samples, stats = clean(islands=True)
    samples["mu"][0] += 0.4  # R-hat between the limits of chains and of islands
    assert not failed(samples, stats)
    samples["mu"][0] += 1.0
    found = failed(samples, stats)
    assert found["R-hat"].quantity == "mu"
    assert "num_particles" in found["R-hat"].advice


def test_draws_that_hang_together():
    samples, stats = clean(draws=1000)
    slow = samples["mu"].clone()
    for i in range(1, 1000):
        slow[:, i] = 0.98 * slow[:, i - 1] + math.sqrt(1 - 0.98**2) * slow[:, i]
    samples["slow"] = slow
    found = failed(samples, stats)
    assert {"bulk ESS", "tail ESS"} <= set(found)
    assert found["bulk ESS"].quantity == "slow"
    assert found["bulk ESS"].limit == 400
    assert "of 4000 draws for slow (at least 400)" in found["bulk ESS"].said


def test_the_worst_are_named_and_the_others_counted():
    samples, stats = clean()
    samples["theta"][0] += 1.0 + torch.arange(6).reshape(2, 3) / 2
    stats["lp"][0] += 5.0
    check = failed(samples, stats)["R-hat"]
    assert "theta[1, 2], theta[1, 1], theta[1, 0] and 4 more" in check.said
    alone, stats = clean()
    stats["lp"][0] += 5.0
    assert failed(alone, stats)["R-hat"].quantity == "lp"


def test_transitions():
    samples, stats = clean()
    stats["diverging"][1, :5] = True
    stats["acceptance_rate"] *= 0.2
    stats["fidelity_gap"] *= 10.0
    stats["lp"][3] = stats["lp"][3, 0]
    found = failed(samples, stats)
    assert {"divergences", "acceptance", "guide gap", "chains that never moved"} <= set(found)
    assert found["divergences"].said == "5 of 800 transitions diverged"
    samples, stats = clean()
    stats["diverging"][1, :4] = True  # half a percent
    stats["fidelity_gap"][:, :20] = torch.nan
    assert not failed(samples, stats)


def test_particles():
    samples, stats = clean(islands=True)
    stats["log_weight"] = 8 * stats["log_weight"]
    found = failed(samples, stats, pareto_k=0.8)
    assert set(found) == {"island evidences", "Pareto k"}
    assert "k 0.80" in found["Pareto k"].said


def test_few_draws_are_one_complaint():
    for chains, draws in ((4, 20), (100, 4), (1, 1)):
        found = failed(*clean(chains, draws))
        assert list(found) == ["draws"]
        assert f"{chains * draws} draws, {draws} in each of {chains} chains, are too few" in found["draws"].said


def test_odd_quantities():
    samples, stats = clean()
    samples |= {
        "constant": torch.ones(4, 200, 3),
        "none": torch.ones(4, 200, 0),
        "whole": (samples["mu"] > 0).long(),
        "half": samples["mu"].to(torch.bfloat16),
    }
    assert not failed(samples, stats)
    samples["log"] = samples["mu"].log()
    found = failed(samples, stats)
    assert set(found) == {"not finite"}
    assert found["not finite"].quantity == "log"


def test_a_map_that_does_not_come_back():
    class Folds:
        """x = |z|, whose inverse knows one side only."""

        inv = staticmethod(lambda x: x)

        def __call__(self, z):
            return z.abs()

    samples, stats = clean()
    samples["x_base"], flow = normal(4, 200, 2), mlp_flow(2, torch.double)
    assert not failed(samples, stats, transforms={"x": flow.transform()})
    found = failed(samples, stats, transforms={"x": Folds()})["round trip of x"]
    assert found.quantity == "x"
    assert "check(flow" in found.advice


def test_draws_that_miss_what_was_observed():
    residual = normal(200, 1, 5)  # truths: of 200 observations none is off
    assert observation_check(residual.expand(-1, 8, -1)).passed
    residual[17] *= 6.0
    check = observation_check(residual.expand(-1, 8, -1))
    assert not check.passed
    assert check.quantity == "y[17]"
    assert observation_check(torch.zeros(0, 8, 5)).passed


def test_slices_may_be_slow():
    samples, stats = clean(chains=16, draws=1000)
    slow = samples["mu"].clone()
    for i in range(1, 1000):
        slow[:, i] = 0.95 * slow[:, i - 1] + math.sqrt(1 - 0.95**2) * slow[:, i]
    samples["mu"] = slow
    assert set(failed(samples, stats)) >= {"bulk ESS"}
    assert not failed(samples, stats, method="elliptical_slice")


# -- runs ------------------------------------------------------------------------------------------


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def through_a_flow(flow):
    def model(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 1], 0.2), obs=y)

    return model


@pytest.mark.parametrize("problem", PROBLEMS)
def test_runs_that_are_right_are_silent(problem):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        smc = SMC(PROBLEMS[problem](), 256, seed=3, progress=False).run()
        mcmc = MCMC(HMC(PROBLEMS[problem]()), 30, 20, num_chains=32, seed=3, progress=False).run()
    for run in (smc, mcmc):
        assert run.converged
        assert run.attributes["converged"] is True
        assert run.diagnostics().passed.all()
        assert "convergence" not in run.attributes


def test_a_flow_prior_is_silent_and_its_map_is_checked():
    model = through_a_flow(mlp_flow(2, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        table = SMC(model, 256, seed=0, progress=False).run(torch.tensor(0.7)).diagnostics()
    assert table.value["round trip of x"] < 1e-4
    assert table.quantity["R-hat"].split("[")[0] in ("x", "x_base", "lp")


def test_centred_schools_are_named():
    kernel = HMC(schools, jumps=False, step_size=0.5, trajectory_length=1.5)
    with pytest.warns(ConvergenceWarning, match=r"MCMC may not be trusted: .*tau.*transitions diverged") as caught:
        run = MCMC(kernel, 50, 10, num_chains=8, init="prior", seed=0, progress=False).run(*SCHOOLS)
    assert caught[0].filename == __file__
    assert len([w for w in caught if issubclass(w.category, ConvergenceWarning)]) == 1
    assert not run.converged
    assert str(caught[0].message).startswith(run.attributes["convergence"])
    table = run.diagnostics()
    assert "non-centred" in table.advice["divergences"]


def test_a_ridge_is_named():
    def ridge():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + z, 1e-3), obs=torch.tensor(0.5))

    kernel = HMC(ridge, jumps=False, metric="diagonal", max_steps=4)
    with pytest.warns(ConvergenceWarning, match=r"bulk ESS \d+ of 400 draws for (x, z|z, x)"):
        MCMC(kernel, 50, 20, num_chains=8, init="prior", seed=0, progress=False).run()


def test_a_phase_across_its_border_is_named():
    def model(y):
        phase = pyro.sample("phase", dist.Uniform(-math.pi, math.pi))
        pyro.sample("y", dist.Normal(torch.stack([phase.cos(), phase.sin()], -1), 0.2).to_event(1), obs=y)

    kernel = HMC(model, jumps=False, step_size=0.1, trajectory_length=1.0)
    with pytest.warns(ConvergenceWarning, match=r"R-hat \d\.\d+ for phase: chains disagree"):
        MCMC(kernel, 50, 20, num_chains=8, init="prior", seed=0, progress=False).run(torch.tensor([-1.0, 0.0]))


def test_a_linear_observation_that_the_prior_cannot_make_is_named():
    flow = mlp_flow(2, torch.float32, ifpyro.Schedule.details_first(power=1))
    options = {"draws": 8, "sweeps": 3, "exact": False, "progress": False}
    matrix = torch.tensor([[1.0, 0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        ifpyro.linear_posterior(flow, matrix, torch.tensor([0.5]), 0.5, **options)
    with pytest.warns(ConvergenceWarning, match="draws miss observation 0 by"):
        ifpyro.linear_posterior(flow, matrix, torch.tensor([80.0]), 0.5, **options)


@pytest.mark.parametrize(("scale", "wide"), [(0.1, True), (1.0, False)])
def test_a_guide_is_judged_by_its_weights(scale, wide):
    """The posterior is N(0, 1/2); a guide that is far too narrow has weights with a heavy tail."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(torch.zeros(4), scale).to_event(1))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        tree = ifpyro.to_arviz(guide, model=model, args=(torch.zeros(4),), progress=False)
    said = [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]
    assert (tree.attrs["pareto_k"] > 0.7) == wide
    assert len(said) == wide
    assert not said or "the guide may not be trusted: Pareto k" in said[0]


def test_what_is_silenced_is_still_known():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=ifpyro.ConvergenceWarning)
        run = SMC(conjugate(), 16, seed=1, progress=False).run()
    assert not run.converged
    assert "16 draws" in run.attributes["convergence"]


def test_a_second_run_is_judged_anew(tmp_path):
    smc = SMC(conjugate(), 256, seed=1, progress=False).run()
    assert smc.converged
    smc.save(tmp_path / "draws")
    assert SMC(conjugate(), 256, progress=False).restore(tmp_path / "draws").converged
    smc.num_particles = 16
    with pytest.warns(ConvergenceWarning):
        smc.run()
    assert not smc.converged


def test_many_data_sets_are_not_one_posterior():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 0.1), obs=y)

    density = ManyDataSets(model, (torch.tensor(0.0),), {}, {"y": torch.tensor([-5.0, 5.0])})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        kernel = HMC(density, jumps=False, step_size=0.1, trajectory_length=0.2)
        MCMC(kernel, 15, 5, num_chains=8, init="prior", seed=0, progress=False).run()


def test_only_what_is_asked_imports_arviz_and_pandas():
    import subprocess
    import sys

    code = (
        "import sys, torch, pyro, pyro.distributions as dist, ifpyro\n"
        "def model(): pyro.sample('y', dist.Normal(pyro.sample('x', dist.Normal(0., 1.)), 1.), obs=torch.tensor(0.3))\n"
        "run = ifpyro.SMC(model, 128, seed=0, progress=False).run()\n"
        "assert run.converged and run.pareto_k is not None\n"
        "assert not {'arviz', 'pandas'} & set(sys.modules), 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_figures_do_not_depend_on_the_kind_of_numbers():
    samples, stats = clean()
    single = judge({n: v.float() for n, v in samples.items()}, stats).table()
    double = judge(samples, stats).table()
    np.testing.assert_allclose(single.value.to_numpy(), double.value.to_numpy(), rtol=1e-3)
