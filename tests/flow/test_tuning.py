"""Where the steps of a grid lie: exact flows of mixtures, no training."""

from dataclasses import replace

import pytest
import torch

import ifpyro
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.solver.grid import Grid
from ifpyro.flow.tuning import choose_grid, doubling_error, knots_for


def late_turning(dtype=torch.double):
    """One coarse axis of two modes over many fine ones: with the mean angle as clock it turns in the last moments."""
    scale = torch.cat([torch.tensor([40.0]), torch.ones(11)]).to(dtype)
    means = torch.zeros(2, 12, dtype=dtype)
    means[:, 0] = torch.tensor([-40.0, 40.0])
    covariances = torch.diag(scale.square() * 0.05 + 0.95 * (scale == 1)).expand(2, 12, 12).clone()
    weights = torch.tensor([0.4, 0.6], dtype=dtype)
    flow = InflationaryFlow.from_gaussian_mixture(weights, means, covariances, schedule=Schedule.details_first())
    z = torch.randn(64, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return flow, z


@pytest.mark.parametrize("steps", [10, 16])
def test_measured_knots_beat_every_power_of_the_same_steps(steps):
    flow, z = late_turning()
    measured = doubling_error(flow, z, Grid(steps, knots=knots_for(flow, z)))
    powers = [doubling_error(flow, z, Grid(steps, power)) for power in (0.5, 1.0, 1.5, 2.0, 3.0)]
    assert measured < 0.5 * min(powers)


def test_steps_are_dense_where_the_velocity_is_hard():
    flow, z = late_turning()
    turns = [flow.angles(grid.times())[:, 0].diff().max() for grid in (Grid(20), Grid(20, knots=knots_for(flow, z)))]
    assert float(turns[1]) < 0.5 * float(turns[0])  # the coarse axis' largest turn in one step


def test_a_gaussian_flow_keeps_the_default_grid():
    basis, schedule = late_turning()[0].basis, Schedule.details_first()
    flow = InflationaryFlow(basis, schedule, ifpyro.flow.networks.mlp.MLP(12, 8).double())
    knots = knots_for(flow, torch.randn(8, 12, dtype=torch.double))
    torch.testing.assert_close(Grid(24, knots=knots).times(), Grid(24).times(), atol=0.01, rtol=0)


def test_knots_are_times_at_equal_shares_of_the_steps():
    knots = (0.0, 0.1, 0.4, 1.0)
    assert Grid(3, knots=knots).times().tolist() == list(knots)
    torch.testing.assert_close(
        Grid(6, knots=knots).times(), torch.tensor([0.0, 0.05, 0.1, 0.25, 0.4, 0.7, 1.0], dtype=torch.double)
    )
    for steps in (1, 2, 4, 7, 64):
        times = Grid(steps, knots=knots).times()
        assert (len(times), times[0], times[-1]) == (steps + 1, 0.0, 1.0)
        assert bool((times.diff() > 0).all())


def test_the_chosen_grid_keeps_its_promise_and_its_knots_in_a_file(tmp_path):
    flow = late_turning(torch.float32)[0]
    network = flow.velocity
    x = flow.sample(64, seed=1)
    choose_grid(flow, x, 1e-3)
    assert flow.report["numerics"]["doubling_rmse"] <= 1e-3
    assert doubling_error(flow, flow.encode(x), replace(flow.grid, steps=flow.coarse_steps)) < 1e-2
    flow.save(tmp_path / "flow")
    again = ifpyro.load(tmp_path / "flow", network=network)
    assert again.grid == flow.grid
    assert len(again.grid.knots) > 2
    assert torch.equal(again.decode(x), flow.decode(x))
