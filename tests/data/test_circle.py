"""Circular columns: nothing may depend on where the user's circle is cut."""

import math

import h5py
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import ifpyro
from flows_zoo import mlp_flow
from ifpyro.data.circle import circular, emptiest_place
from ifpyro.flow.solver.grid import Grid
from ifpyro.training import Recipe

TURN = 2 * math.pi
RECIPE = Recipe(max_steps=200, batch=256, shared=4, rate=5e-3, patience=1_000, check_every=50)
OPTIONS = {"recipe": RECIPE, "network": {"width": 32, "blocks": 1, "dropout": 0.0}, "progress": False, "seed": 0}


def wrapped(x, period=TURN):
    return np.remainder(x + period / 2, period) - period / 2


def phases(centre, rows=1500):
    """A phase around a place, and a column that follows it."""
    rng = np.random.default_rng(0)
    swing = 0.5 * rng.standard_normal(rows)
    return np.stack([wrapped(centre + swing), 0.6 * np.sin(swing) + 0.2 * rng.standard_normal(rows)], 1)


@pytest.fixture(scope="module")
def flows():
    """Of a phase across +-pi, and of the same data rotated by hand to where nobody cuts."""
    return {centre: ifpyro.fit(phases(centre), support={0: "circular"}, **OPTIONS) for centre in (math.pi, 0.5)}


@pytest.mark.parametrize("period", [1.0, TURN, 24.0])
def test_the_cut_turns_with_the_data(period):
    generator = torch.Generator().manual_seed(0)
    x = period * (0.1 * torch.randn(400, generator=generator, dtype=torch.double) + 0.3)
    x = torch.cat([x, 0.5 * period + x[:100]])
    cut = emptiest_place(x, period)
    for shift in (0.4 * period, -3 * period, 0.77 * period):
        turned = emptiest_place(torch.remainder(x + shift, period), period)
        difference = (turned - cut - shift + period / 2) % period - period / 2
        assert abs(difference) < 1e-9 * period
    assert ((x - cut).remainder(period) / period).min() > 0.001  # not at a value


def test_the_turn_is_the_one_of_most_values():
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(400, generator=generator, dtype=torch.double)
    for start in (0.0, 50 * TURN, -7 * TURN + 1.0):
        cut = emptiest_place(x + start, TURN)
        assert ((x + start >= cut) & (x + start < cut + TURN)).all()


def test_sparse_places_count_not_single_gaps():
    """Of dense values with one wide gap between two of them, and a sparse quarter, the quarter is cut."""
    dense = torch.linspace(0.0, 0.7, 4_000, dtype=torch.double)
    dense = dense[(dense - 0.35).abs() > 0.0008]  # the widest gap of all, were it not for what lies around it
    sparse = torch.linspace(0.7, 1.0, 200, dtype=torch.double)
    assert 0.72 < emptiest_place(torch.cat([dense, sparse]), 1.0) % 1.0 < 0.98


@pytest.mark.parametrize("values", [[0.2], [0.2, 0.2], [0.2, 0.7], [0.0] * 5])
def test_few_values_have_a_cut_too(values):
    cut = emptiest_place(torch.tensor(values, dtype=torch.double), 1.0)
    assert min((value - cut) % 1.0 for value in values) > 0.2


def test_densities_know_no_turn_and_integrate_to_one():
    flow = mlp_flow(1, torch.double, support=circular(24.0, cut=3.0))
    flow.grid = Grid(8)
    hours = torch.linspace(3.0, 27.0, 101, dtype=torch.double)[:-1, None] + 0.12
    density = flow.log_prob(hours).exp()
    assert float(density.sum() * 24.0 / 100) == pytest.approx(1.0, abs=1e-3)
    for turns in (-2, 5):
        torch.testing.assert_close(flow.log_prob(hours + 24.0 * turns).exp(), density, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(flow.encode(hours + 24.0 * turns), flow.encode(hours), rtol=0, atol=1e-8)
    z = torch.linspace(-3, 3, 20, dtype=torch.double)[:, None]
    x = flow.decode(z)
    assert ((x > 3.0) & (x < 27.0)).all()
    torch.testing.assert_close(flow.encode(x), z, rtol=0, atol=1e-8)
    assert flow.log_prob(torch.tensor([[3.0], [27.0]]).double()).isfinite().all()


def test_a_uniform_phase_is_gaussian():
    rng = np.random.default_rng(0)
    x = rng.uniform(-math.pi, math.pi, (4000, 1))
    flow = ifpyro.fit(x, support="circular", max_steps=0, progress=False, seed=0)
    grid = torch.linspace(-3, 3, 101)[:, None]
    assert (flow.log_prob(grid) + math.log(TURN)).abs().mean() < 0.05


def test_rotated_data_make_the_same_flow(flows):
    across, inside = flows[math.pi], flows[0.5]
    x = inside.sample(500, seed=1)
    turned = x + torch.tensor([math.pi - 0.5, 0.0])
    torch.testing.assert_close(across.log_prob(turned), inside.log_prob(x), rtol=0, atol=2e-3)
    assert float((across.support.cseq[0].cut - inside.support.cseq[0].cut) % TURN) == pytest.approx(math.pi - 0.5)
    draws = across.sample(2000, seed=0)[:, 0]
    assert draws.max() - draws.min() < TURN
    assert ifpyro.check(across, phases(math.pi, 3000)[1500:], rows=300, store=False).passed


def test_the_circle_is_in_the_file(flows, tmp_path):
    flow = flows[math.pi]
    flow.save(tmp_path / "flow.safetensors")
    again = ifpyro.load(tmp_path / "flow.safetensors")
    x = flow.sample(5, seed=0)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert again.support.cseq[0].cut == flow.support.cseq[0].cut


def model(flow, at, y):
    x = pyro.sample("x", flow.prior())
    pyro.sample("angle", dist.VonMises(x[..., 0], 8.0), obs=at)
    pyro.sample("y", dist.Normal(x[..., 1], 0.3), obs=y)


@pytest.mark.slow
def test_evidence_and_posterior_are_those_of_data_rotated_by_hand(flows):
    evidence, error, angle, spread = [], [], [], []
    y = torch.tensor(0.25)
    for centre, flow in flows.items():
        at = torch.tensor(wrapped(centre + 0.3)).float()
        smc = ifpyro.SMC(lambda at, y, flow=flow: model(flow, at, y), num_particles=128, num_islands=2, seed=1)
        smc.run(at, y)
        evidence.append(float(smc.log_evidence))
        error.append(float(smc.log_evidence_se))
        draws = torch.as_tensor(smc.get_samples()["x"]).reshape(-1, 2)[:, 0] - centre
        angle.append(float(torch.atan2(draws.sin().mean(), draws.cos().mean())))
        spread.append(float(torch.remainder(draws + math.pi, TURN).std()) / math.sqrt(100))
        # The integral over the circle and the line, by quadrature.
        phase = torch.linspace(centre - math.pi, centre + math.pi, 121)[:-1]
        line = torch.linspace(-2.5, 2.5, 101)
        nodes = torch.cartesian_prod(phase, line)
        likelihood = dist.VonMises(nodes[:, 0], 8.0).log_prob(at) + dist.Normal(nodes[:, 1], 0.3).log_prob(y)
        exact = (flow.log_prob(nodes) + likelihood).double().logsumexp(0) + math.log(TURN / 120 * 5.0 / 100)
        assert evidence[-1] == pytest.approx(float(exact), abs=3 * error[-1] + 0.01)
    assert abs(evidence[0] - evidence[1]) < 2 * math.hypot(*error)
    assert abs(angle[0] - angle[1]) < 2 * math.hypot(*spread)


def test_data_that_are_never_loaded_whole(tmp_path):
    data = phases(math.pi).astype(np.float32)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=data, chunks=(100, 2))
    np.save(tmp_path / "x.npy", data)
    sources = [h5py.File(tmp_path / "x.h5", "r")["x"], np.load(tmp_path / "x.npy", mmap_mode="r")]
    recipe = Recipe(max_steps=20, batch=64, shared=2, rate=2e-3, check_every=10)
    for source in sources:
        flow = ifpyro.fit(source, support=["circular", "real"], **{**OPTIONS, "recipe": recipe})
        assert abs(wrapped(flow.support.cseq[0].cut)) < 0.8  # opposite of pi
        draws = flow.sample(500, seed=0)[:, 0]
        assert float(draws.std()) < 0.8
