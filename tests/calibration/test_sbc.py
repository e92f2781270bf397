"""Simulation-based calibration: right engines pass, wrong ones are caught, and nothing depends on how it was run."""

import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import ifpyro
from ifpyro.calibration import ManyHMC, ManySMC, Simulator
from ifpyro.calibration.simulated.problems import LOG_LIKELIHOOD
from ifpyro.calibration.simulated.sbc import sbc, thin
from ifpyro.core.files import read_tensors, write_tensors
from ifpyro.flow.solver.grid import Grid

NOISE = 0.5
SHRINK = 1 / (1 + NOISE**2)
"""``theta ~ N(0, 1)`` on two axes and ``y ~ N(theta, 0.5^2)``: the posterior is ``N(0.8 y, 0.2)``."""


def simulate(rng):
    theta = rng.normal(size=2)
    return theta, theta + NOISE * rng.normal(size=2)


def log_likelihood(theta, y):
    return -0.5 * float(np.square((y - theta) / NOISE).sum())


CONJUGATE = Simulator(simulate, log_likelihood)


def posterior(location=0.0, scale=1.0, draws=60):
    """An engine whose posteriors are off by a shift, in posterior standard deviations, and a factor."""

    def engine(y, seed):
        sd = math.sqrt(1 - SHRINK)
        noise = np.random.default_rng(seed).normal(size=(draws, 2))
        return SHRINK * y + sd * (location + scale * noise)

    return engine


def prior_only(y, seed):
    """An engine that ignores the data."""
    return np.random.default_rng(seed).normal(size=(60, 2))


def sticky(y, seed, correlation=0.9, draws=60):
    """A Markov chain that has the right posterior and moves slowly."""
    rng = np.random.default_rng(seed)
    steps = np.sqrt(1 - correlation**2) * rng.normal(size=(2, draws, 2))
    chain = np.empty_like(steps)
    chain[:, 0] = rng.normal(size=(2, 2))
    for k in range(1, draws):
        chain[:, k] = correlation * chain[:, k - 1] + steps[:, k]
    return SHRINK * y + math.sqrt(1 - SHRINK) * chain


def run(engine, count=500, simulator=CONJUGATE, **options):
    return sbc(simulator, engine, count, **{"progress": False, "block": 50, **options})


# -- right and wrong engines -----------------------------------------------------------------------------------------


def test_exact_posteriors_pass():
    found = run(posterior())
    assert found.passed, str(found)
    assert found.outside == []
    assert found.names == ("theta[0]", "theta[1]", LOG_LIKELIHOOD)
    assert found.contraction["theta[0]"] == pytest.approx(SHRINK, abs=0.05)
    assert "no sign of miscalibration" in str(found)


def test_where_data_say_nothing_the_prior_is_the_posterior():
    blind = Simulator(lambda rng: (rng.normal(size=2), None))
    found = run(prior_only, simulator=blind)
    assert found.passed, str(found)
    assert found.names == ("theta[0]", "theta[1]")


@pytest.mark.parametrize("wrong", [(0.0, 0.8), (0.0, 1.2), (0.2, 1.0), (-0.2, 1.0)])
def test_wrong_posteriors_are_caught(wrong):
    found = run(posterior(*wrong))
    assert not found.passed, str(found)
    assert "miscalibrated" in str(found)


def test_an_engine_that_ignores_the_data_is_caught_by_the_likelihood_alone():
    found = run(prior_only)
    assert found.outside == [LOG_LIKELIHOOD]
    assert not found.passed
    assert all(found.tests[f"theta[{k}]"].p > 0.01 for k in range(2))


def test_slow_chains_are_thinned_to_what_they_are_worth(monkeypatch):
    found = run(sticky, 300)
    assert found.passed, str(found)
    # 120 draws with autocorrelation time (1 + 0.9) / (1 - 0.9) = 19
    assert np.median(found.ess) == pytest.approx(120 / 19, rel=0.3)
    # the function hides the module of its name
    monkeypatch.setattr(sys.modules["ifpyro.calibration.simulated.sbc"], "thin", lambda num, ess: np.arange(num))
    assert not run(sticky, 300).passed  # ranks among dependent draws pile up at the ends


def test_thinning_takes_evenly_spaced_draws():
    assert thin(10, 5.9).tolist() == [1, 3, 5, 7, 9]
    assert thin(3, 100.0).tolist() == [0, 1, 2]
    assert thin(8, 0.2).tolist() == [4]


# -- it does not matter how it is run --------------------------------------------------------------------------------


def test_blocks_and_executors_change_nothing():
    whole = run(posterior(), 40, block=40)
    assert np.array_equal(whole.ranks, run(posterior(), 40, block=7).ranks)
    with ThreadPoolExecutor(2) as pool:
        assert np.array_equal(whole.ranks, run(posterior(), 40, block=5, executor=pool).ranks)
    assert not np.array_equal(whole.ranks, run(posterior(), 40, seed=1).ranks)


def test_a_run_takes_up_where_the_last_one_ended(tmp_path):
    path, calls = tmp_path / "sbc.safetensors", []

    def counted(y, seed):
        calls.append(seed)
        return posterior()(y, seed)

    run(posterior(), 20, path=path)
    again = run(counted, 30, path=path)
    assert len(calls) == 11  # ten new ones, and one old one to see that the model is still the same
    assert np.array_equal(again.ranks, run(posterior(), 30).ranks)
    assert np.array_equal(run(counted, 10, path=path).ranks, again.ranks[:10])
    assert len(calls) == 12
    with pytest.raises(ValueError, match="seed 0, not 1"):
        run(posterior(), 30, path=path, seed=1)
    other = Simulator(lambda rng: (rng.normal(size=2) + 3, rng.normal(size=2)), log_likelihood)
    with pytest.raises(ValueError, match="another model"):
        run(posterior(), 40, path=path, simulator=other)


def test_a_finished_file_vouches_for_no_other_model_or_engine(tmp_path):
    """All simulations are there, so nothing need be run; what never ran must be told apart nevertheless."""
    path = tmp_path / "sbc.safetensors"
    run(posterior(), 20, path=path)
    content = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"another engine: .*posterior.* gave simulation 0 of seed 0 the posterior mean"
    ):
        run(posterior(0.5), 20, path=path)
    with pytest.raises(ValueError, match="another engine"):
        run(prior_only, 20, path=path)
    other = Simulator(lambda rng: (rng.normal(size=2) + 3, rng.normal(size=2)), log_likelihood)
    with pytest.raises(ValueError, match="another model"):
        run(posterior(), 20, path=path, simulator=other)
    noisier = Simulator(simulate, lambda theta, data: log_likelihood(theta, data) + 1)
    with pytest.raises(ValueError, match="another model"):
        run(posterior(), 20, path=path, simulator=noisier)
    assert path.read_bytes() == content


def test_engines_of_many_data_sets_are_told_apart(tmp_path):
    """Their draws depend on the block, so that those of one simulation alone agree within their error only."""
    options = {"args": (torch.zeros(2),), "path": tmp_path / "sbc.safetensors", "progress": False}
    found = sbc(model, ManySMC(64, 2), 10, **options)
    assert np.array_equal(sbc(model, ManySMC(64, 2), 10, **options).ranks, found.ranks)
    for engine in (ManySMC(128, 2), ManyHMC(chains=2, warmup=20, draws=20, particles=16)):
        with pytest.raises(ValueError, match=r"another engine: ManySMC\(particles=64"):
            sbc(model, engine, 10, **options)
    with pytest.raises(ValueError, match="another model"):
        sbc(model, ManySMC(64, 2), 10, **{**options, "args": (torch.zeros(3, 2),)})


def test_an_engine_with_randomness_of_its_own_may_go_on(tmp_path):
    rng = np.random.default_rng(0)

    def unseeded(y):
        return posterior()(y, int(rng.integers(2**31)))

    def shifted(y):
        return unseeded(y) + 5

    path = tmp_path / "sbc.safetensors"
    run(unseeded, 10, path=path)
    assert run(unseeded, 12, path=path).num_simulations == 12
    shifted.__qualname__ = unseeded.__qualname__
    with pytest.raises(ValueError, match="another engine"):
        run(shifted, 12, path=path)


@pytest.mark.parametrize(
    ("field", "value"), [("mean", torch.zeros(3)), ("truth", torch.full((4, 3), torch.nan)), ("index", None)]
)
def test_a_forged_file_is_refused(tmp_path, field, value):
    path = tmp_path / "sbc.safetensors"
    run(posterior(), 4, path=path)
    tensors, header = read_tensors(path, "sbc")
    tensors.pop(field)
    write_tensors(path, tensors if value is None else {**tensors, field: value}, "sbc", header)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        run(posterior(), 4, path=path)


def test_a_full_disk_does_not_end_the_simulations(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ifpyro.calibration.simulated.records.write_tensors", full)
    with pytest.warns(UserWarning, match="No space left on device; the simulations go on"):
        found = run(posterior(), 4, path=tmp_path / "sbc.safetensors")
    assert found.num_simulations == 4


def test_an_interrupted_run_keeps_what_is_finished(tmp_path):
    path, calls = tmp_path / "sbc.safetensors", []

    def interrupted(y, seed):
        calls.append(seed)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return posterior()(y, seed)

    with pytest.warns(UserWarning, match="10 of 30 simulations are finished"):
        found = run(interrupted, 30, path=path, block=5)
    assert found.num_simulations == 10
    assert np.array_equal(run(posterior(), 30, path=path).ranks, run(posterior(), 30).ranks)


def test_a_failing_engine_is_named_and_nothing_is_lost(tmp_path):
    def failing(y, seed):
        if y[0] > 1.5:
            raise ZeroDivisionError("oh")
        return posterior()(y, seed)

    path = tmp_path / "sbc.safetensors"
    with pytest.raises(RuntimeError, match=r"simulations \d+ to \d+ of seed 0 failed \(ZeroDivisionError: oh\)"):
        run(failing, 100, path=path, block=1)
    assert path.exists()


# -- Pyro models -----------------------------------------------------------------------------------------------------


def model(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


ENGINES = {
    "SMC": ManySMC(64, 2),
    "HMC": ManyHMC(chains=2, warmup=60, draws=40, particles=32),
    "HMC from the prior": ManyHMC(chains=2, warmup=60, draws=40, init="prior"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_for_many_data_sets_pass(engine):
    found = sbc(model, ENGINES[engine], 200, args=(torch.zeros(2),), progress=False)
    assert found.passed, str(found)
    assert found.names == ("x[0]", "x[1]", LOG_LIKELIHOOD)
    assert np.median(found.ess) > 20
    # means and widths are those of the conjugate posterior
    assert np.median(found.sd[:, 0]) == pytest.approx(math.sqrt(1 - SHRINK), rel=0.1)


def too_narrow(model, seed):
    """Right but for half the width."""
    y = pyro.poutine.trace(model).get_trace().nodes["y"]["value"]
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(seed))
    return {"x": SHRINK * y + 0.5 * math.sqrt(1 - SHRINK) * noise}


def test_functions_and_samplers_of_one_data_set():
    found = sbc(model, too_narrow, 60, args=(torch.zeros(2),), progress=False)
    assert {"x[0]", "x[1]"} <= set(found.outside)
    with pytest.warns(ifpyro.ConvergenceWarning, match="^3 of 3 runs may not be trusted; the first: SMC .* 64 draws"):
        sampler = sbc(
            model, lambda model: ifpyro.SMC(model, 64, progress=False), 3, args=(torch.zeros(2),), progress=False
        )
    assert sampler.names == found.names
    assert np.array_equal(sampler.truth, found.truth[:3])  # simulations depend on the seed alone


def test_flows_are_drawn_and_ranked_in_both_spaces():
    weights, means = torch.tensor([0.6, 0.4]), torch.tensor([[-2.0], [1.5]])
    flow = ifpyro.InflationaryFlow.from_gaussian_mixture(weights, means, torch.tensor([[[0.3]], [[0.5]]]), grid=Grid(6))

    def through(y):
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)

    found = sbc(through, ManySMC(64, 2), 60, args=(torch.zeros(()),), progress=False)
    assert set(found.names) == {"x[0]", "x_base[0]", LOG_LIKELIHOOD}
    assert found.passed, str(found)
    assert found.truth[:, found.names.index("x[0]")].std() == pytest.approx(1.8, abs=0.3)


# -- what is found ---------------------------------------------------------------------------------------------------


def test_picture_and_arviz():
    az, plt = pytest.importorskip("arviz"), pytest.importorskip("matplotlib.pyplot")
    found = run(posterior(), 60)
    titles = [axis.get_title() for axis in found.plot().axes if axis.get_visible()]
    assert titles == list(found.names)
    converted = found.to_arviz()
    ranks = converted["prior_sbc"]
    assert set(ranks.data_vars) == set(found.names)
    assert np.array_equal(ranks["theta[0]"].values.ravel(), found.ranks[:, 0])
    if int(az.__version__.split(".")[0]) >= 1:
        az.plot_ecdf_pit(converted, group="prior_sbc")
    else:
        az.plot_ecdf(found.ranks[:, 0], cdf=stats.uniform.cdf, pit=True, confidence_bands="optimized")
    assert plt.get_fignums()
    plt.close("all")


def test_few_draws_are_said_to_be_few():
    assert "20 of them with fewer than 20 effective draws" in str(run(posterior(draws=10), 20))


BAD = {
    "engine": (lambda: sbc(model, "smc", args=(torch.zeros(2),)), TypeError, "ManySMC"),
    "many engine for a simulator": (lambda: run(ManySMC()), TypeError, "need a Pyro model"),
    "arguments for a simulator": (lambda: run(posterior(), args=(1,)), TypeError, "takes no args"),
    "model": (lambda: sbc(3, posterior()), TypeError, "callable"),
    "count": (lambda: run(posterior(), 0), ValueError, "num_simulations"),
    "prob": (lambda: run(posterior(), prob=1.0), ValueError, "prob"),
    "no data": (lambda: sbc(model, ManySMC(), 2, args=(None,), progress=False), ValueError, "no observed site"),
    "shape of draws": (lambda: run(lambda y: np.zeros((5, 3)), 2), ValueError, "must have shape"),
    "missing draws": (lambda: run(lambda y: {"a": np.zeros(5)}, 2), ValueError, "missing"),
    "NaN": (lambda: run(lambda y: np.full((5, 2), np.nan), 2), ValueError, "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
