"""A check must pass good flows and catch bad ones; each bad flow names the row that has to notice."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import make_moons

import ifpyro
from flows_zoo import FLOWS, mixture_flow, mlp_flow, smoothed_density
from ifpyro import InflationaryFlow, Schedule
from ifpyro.checks.checking import stored
from ifpyro.checks.questions import LIMITS, MATTERS, Level, Solved, generated, latent, log_det_error, numerical
from ifpyro.checks.rows import by_evidence, by_size
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.networks.velocity import Velocity
from ifpyro.flow.solver.grid import Grid
from ifpyro.training import Recipe

ROWS = 400


def data_of(flow, rows, seed=0):
    """Rows of the flow's law: its own samples, from seeds that no check uses."""
    return flow.sample(rows, seed=10_000 + seed)


def moons(rows, seed):
    return torch.as_tensor(make_moons(rows, noise=0.1, random_state=seed)[0], dtype=torch.float32)


def exact_rows(flow, rows, seed):
    """Rows of a mixture flow's exact law, drawn without the flow."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return flow.basis.from_standard(smoothed_density(flow).sample((rows,)).to(flow.dtype))


@pytest.fixture(scope="module")
def mixture():
    flow = mixture_flow(2, torch.float32, grid=Grid(8))
    return flow, exact_rows(flow, 1000, 0)


@pytest.fixture(scope="module")
def trained():
    """A moons flow, trained for seconds."""
    recipe = Recipe(max_steps=800, batch=512, rate=5e-3, average=0.99, patience=10_000)
    return ifpyro.fit(moons(5_000, 0), seed=0, progress=False, recipe=recipe)


def checked(flow, x, **options):
    """A check with fewer permutations than the default level needs."""
    return ifpyro.check(flow, x, **{"level": 0.05, "store": False, **options})


def failed(result):
    return {row.name for row in result if row.verdict == "fail"}


def not_passed(result):
    return {row.name for row in result if row.verdict != "pass"}


# -- good flows pass --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(mixture):
    """The check of an exact flow, with every option at its default."""
    return ifpyro.check(*mixture, store=False)


def test_exact_flow_passes(good):
    result = good
    assert not_passed(result) == set(), str(result)
    assert result.verdict == "pass"
    assert {row.name for row in result} == {*LIMITS, *MATTERS} - {"seen in training", "over-fitting"}


def test_false_alarms_are_as_rare_as_stated(mixture):
    flow, _ = mixture
    level, times = 0.2, 20
    alarms = 0
    for seed in range(times):
        x = exact_rows(flow, 64, seed)
        rows = latent(flow.encode(x).double().numpy(), np.random.default_rng(seed), Level.of(level))
        drawn = flow.sample(64, seed=seed).double().numpy()
        rows += generated(x.double().numpy(), drawn, np.random.default_rng(seed), Level.of(level))
        alarms += any(row.verdict != "pass" for row in rows)
    assert alarms <= stats.binom.isf(1e-3, times, level)


def test_trained_flow_passes(trained):
    result = checked(trained, moons(1000, 1))
    assert result.passed, str(result)
    assert {"over-fitting"} <= {row.name for row in result}  # from the figures that training left


@pytest.mark.parametrize("name", ["network 8", "image", "positive", "positive image", "simplex", "stack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_numerics_of_every_kind_of_flow(name, dtype):
    flow = FLOWS[name](dtype)
    with torch.no_grad():
        x = flow.sample(32, seed=0)
        solved = Solved.of(flow, x)
        rows = numerical(flow, x, solved)
        assert log_det_error(flow, solved) < (1e-3 if dtype == torch.float32 else 1e-8)
    assert all(row.verdict == "pass" for row in rows if row.name in ("round trip", "log-determinant")), rows


# -- bad flows are caught ---------------------------------------------------------------------------------------------


def test_stopped_after_a_few_steps():
    flow = ifpyro.fit(moons(2_000, 0), max_steps=10, seed=0, progress=False)
    found = failed(checked(flow, moons(600, 1)))
    assert {"latent classifier", "generated classifier"} <= found


def test_perturbed_network(trained):
    flow = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in flow.velocity.parameters():
            weight += 0.3 * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    found = failed(checked(flow, moons(1000, 1)))
    assert found & {"latent axes, shape", "latent width", "latent axes, width", "latent radius", "latent energy"}


@pytest.fixture(scope="module")
def over_trained():
    """A flow that has memorised 100 rows, and rows that it has not seen."""
    truth = mlp_flow(6, torch.float32)
    train, held_out = data_of(truth, 100), data_of(truth, 600, seed=1)
    recipe = Recipe(max_steps=800, batch=128, shared=1, rate=3e-3, weight_decay=0.0, average=0.99, patience=10_000)
    network = {"width": 64, "blocks": 2, "dropout": 0.0}
    flow = ifpyro.fit(
        train, validation=train, recipe=recipe, network=network, seed=0, progress=False
    )  # judged on what it is trained on, early stopping cannot help
    return flow, train, held_out


@pytest.mark.parametrize("given", ["train", "what training left"])
def test_over_trained(over_trained, given):
    flow, train, held_out = over_trained
    result = checked(flow, held_out, train=train if given == "train" else None)
    assert {"over-fitting", "latent width"} <= failed(result), str(result)
    on_train = checked(flow, train, train=train)
    assert on_train["over-fitting"].verdict == "pass"
    assert on_train["seen in training"].verdict == "fail"
    assert on_train["seen in training"].value == 1


def test_nothing_is_said_of_over_fitting_where_nothing_is_known(good):
    with pytest.raises(KeyError, match="over-fitting"):
        good["over-fitting"]


@pytest.mark.parametrize(("steps", "verdict"), [(1, "fail"), (3, "warn")])
def test_too_coarsely_solved(steps, verdict):
    flow = FLOWS["mixture 5"](torch.float32)
    flow.grid = Grid(steps)
    row = checked(flow, data_of(flow, ROWS))["solver, map"]
    assert row.verdict in (verdict, "fail"), row


def test_inverse_that_does_not_invert():
    flow = FLOWS["mixture 5"](torch.float32)
    flow.grid, flow.refinements = Grid(4), 0
    assert "round trip" in not_passed(checked(flow, data_of(flow, ROWS)))


def test_wrong_log_determinant(mixture):
    class Wrong(InflationaryFlow):
        def encode_and_log_det(self, x, **options):
            z, log_det = super().encode_and_log_det(x, **options)
            return z, log_det + 0.1

    flow, x = mixture
    wrong = Wrong(flow.basis, flow.schedule, flow.velocity)
    assert "log-determinant" in failed(checked(wrong, x[:ROWS]))


OTHER = {
    "shifted": lambda x: x + 0.3 * x.std(0),
    "rescaled": lambda x: 1.25 * (x - x.mean(0)) + x.mean(0),
    "mirrored": lambda x: x * torch.tensor([1.0, -1.0]),
    "another set": lambda x: moons(len(x), 0),
}


@pytest.mark.parametrize("name", OTHER)
def test_made_for_other_data(mixture, name):
    flow, x = mixture
    result = checked(flow, OTHER[name](x[:ROWS]))
    assert any(name.startswith("latent") for name in failed(result)), str(result)


def test_worse_than_a_gaussian():
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    flow = mlp_flow(3, torch.float32)  # a random network on the wrong data
    wrong = InflationaryFlow(Basis.from_samples(x), flow.schedule, flow.velocity)
    result = checked(wrong, x[:300], train=x[300:])
    assert result["below a Gaussian"].verdict == "fail", str(result)


def test_latents_that_are_no_numbers(mixture):
    class Broken(Velocity):
        def embed(self, t):
            return t[:, None].float()

        def forward(self, y, embedding):
            return y / (y[:, :1] > 1.0).logical_not()

    flow, x = mixture
    broken = InflationaryFlow(flow.basis, flow.schedule, Broken(), grid=Grid(2))
    result = checked(broken, x[:ROWS])
    assert "finite" in failed(result)
    assert not result.passed
    json.loads(result.to_json())


# -- evidence and size are different things ---------------------------------------------------------------------------


def test_with_many_rows_an_irrelevant_deviation_only_warns():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 2, generator=generator)
    basis = Basis(torch.zeros(2), torch.eye(2), torch.ones(2))
    gaussian = InflationaryFlow(basis, Schedule.preserving(), MLP(2, width=8), grid=Grid(2))
    result = checked(gaussian, 1.02 * x + 0.03, rows=60_000)
    assert {"latent axes, shape", "latent width"} <= not_passed(result)
    assert result.passed, str(result)
    assert result.verdict == "warn"


def test_few_rows_are_said_to_see_little(mixture):
    flow, x = mixture
    row = checked(flow, x[:40])["detectable shift"]
    assert row.verdict == "warn"
    # A shift of the size it names is found about four times in five by the test that it names.
    level, dim = 0.05 / len(MATTERS), 2
    power = stats.norm.sf(stats.norm.isf(level / (2 * dim)) - row.value * math.sqrt(40))
    assert power == pytest.approx(0.8, abs=1e-6)


def test_verdicts():
    assert by_size("a", 0.5, "", 1.0, 2.0).verdict == "pass"
    assert by_size("a", 1.5, "", 1.0, 2.0).verdict == "warn"
    assert by_size("a", 2.5, "", 1.0, 2.0).verdict == "fail"
    assert by_size("a", math.nan, "", 1.0, 2.0).verdict == "fail"
    assert by_size("a", 9.0, "", 1.0, None).verdict == "warn"
    assert by_evidence("a", 9.0, 1.0, p=0.5, level=0.01, unit="", note="").verdict == "pass"
    assert by_evidence("a", 0.1, 1.0, p=0.001, level=0.01, unit="", note="").verdict == "warn"
    assert by_evidence("a", 9.0, 1.0, p=0.001, level=0.01, unit="", note="").verdict == "fail"
    assert by_evidence("a", math.nan, 1.0, p=math.nan, level=0.01, unit="", note="").verdict == "fail"


# -- the result -------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_results(trained):
    x = moons(64, 1)
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 (it must stay as it was)
    first, second, other = (checked(trained, x, seed=seed) for seed in (3, 3, 4))
    assert first.rows == second.rows
    assert first.picture == second.picture
    assert first.rows != other.rows
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_result_is_kept_in_the_flows_file(trained, tmp_path):
    flow = copy.deepcopy(trained)
    with pytest.raises(ValueError, match=r"run ifpyro\.check"):
        stored(flow)
    result = ifpyro.check(flow, moons(300, 1), train=moons(5_000, 0))
    flow.save(tmp_path / "flow.safetensors")
    again = ifpyro.load(tmp_path / "flow.safetensors")
    assert stored(again) == result
    assert str(stored(again)) == str(result)
    again.grid = replace(again.grid, steps=3)
    with pytest.raises(ValueError, match="changed since"):
        stored(again)


def test_json_round_trip(good):
    result = good
    assert ifpyro.CheckResult.from_json(result.to_json()) == result
    nan = replace(result, rows=(replace(result.rows[0], value=math.nan),))
    assert math.isnan(ifpyro.CheckResult.from_json(nan.to_json()).rows[0].value)
    with pytest.raises(ValueError, match="to_dict"):
        ifpyro.CheckResult.from_dict({"rows": []})
    with pytest.raises(ValueError, match="upgrade"):
        ifpyro.CheckResult.from_dict({**result.to_dict(), "version": 99})


def test_table_and_picture(over_trained, tmp_path):
    flow, train, held_out = over_trained
    result = checked(flow, held_out[:100], train=train)
    lines = str(result).splitlines()
    assert len(lines) == len(result) + 2
    for row, line in zip(result, lines[1:], strict=False):
        assert line.startswith(row.verdict)
        assert row.name in line
        assert row.name in result._repr_html_()
    assert lines[-1].startswith("fail:")
    for shown in (result, ifpyro.CheckResult.from_json(result.to_json()), replace(result, picture={})):
        figure = shown.plot()
        figure.savefig(tmp_path / "check.png", dpi=40)
    assert (tmp_path / "check.png").stat().st_size > 5_000


def test_one_axis_is_drawn(tmp_path):
    flow = FLOWS["mixture 1"](torch.float32)
    checked(flow, data_of(flow, 100)).plot().savefig(tmp_path / "check.png", dpi=40)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(mixture):
    flow, x = mixture
    with pytest.raises(ValueError, match=r"held_out of shape \(N, 2\).*got \(1000, 1\)"):
        ifpyro.check(flow, x[:, :1])
    with pytest.raises(ValueError, match=r"at least 32 rows of held_out, got 31"):
        ifpyro.check(flow, x[:31])
    with pytest.raises(ValueError, match="train"):
        ifpyro.check(flow, x[:50], train=x[:5])
    bad = x[:100].clone()
    bad[[3, 7]] = math.nan
    with pytest.raises(ValueError, match=r"rows \[3, 7\]"):
        ifpyro.check(flow, bad)
    with pytest.raises(TypeError, match="held_out"):
        ifpyro.check(flow, np.array([["a", "b"]] * 50))
    for rows in (31, 50.0, True):
        with pytest.raises(ValueError, match="rows expects"):
            ifpyro.check(flow, x, rows=rows)
    for level in (0.0, 0.5, "a"):
        with pytest.raises(ValueError, match="level expects"):
            ifpyro.check(flow, x, level=level)


def test_rows_outside_the_support():
    flow = FLOWS["positive"](torch.float32)
    x = flow.sample(50, seed=0)
    x[4, 0] = -1.0
    with pytest.raises(ValueError, match=r"rows \[4\]"):
        ifpyro.check(flow, x)


def test_arrays_and_doubles_are_accepted(mixture):
    flow, x = mixture
    rows = checked(flow, x[:100].double().numpy()).rows
    assert rows == checked(flow, x[:100]).rows


def test_import_stays_light():
    import subprocess
    import sys

    code = "import sys, ifpyro; print(callable(ifpyro.check), 'sklearn' in sys.modules, 'matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["True", "False", "False"]


def test_latents_of_training_are_measured():
    flow = ifpyro.fit(moons(300, 0), max_steps=0, seed=0, progress=False)
    figures = flow.report["training"]["latents"]
    assert figures["rows"] == 270
    # An untrained flow is the Gaussian of its rows: their latents have the unit variance of the training rows.
    assert figures["mean"] == pytest.approx(269 / 270, abs=1e-3)
    assert len(figures["axes"]) == 2
