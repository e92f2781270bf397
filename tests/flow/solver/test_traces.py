"""Estimated log-densities of many axes: unbiased, with a standard error that is right."""

import math

import pytest
import torch
from scipy import stats

from flows_zoo import latents, mixture_flow, mlp_flow, random_mlp
from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.flow import log_normal
from ifpyro.flow.networks.velocity import Velocity
from ifpyro.flow.solver.grid import Grid
from ifpyro.flow.solver.steps import build_solver, take_with_traces
from ifpyro.flow.solver.traces import hutch_plus_plus, hutchinson

DIM, ROWS, PROBES = 64, 240, 12
METHODS = ["hutchinson", "hutch++"]


def large_flow():
    """Axes of very unlike scales, and a network whose log-determinant is several nats."""
    scale = torch.logspace(0.5, -1.5, DIM, dtype=torch.double)
    eye = torch.eye(DIM, dtype=torch.double)
    basis = Basis(torch.zeros(DIM).double(), eye, scale)
    network = random_mlp(DIM, torch.double, size=0.5)
    return InflationaryFlow(basis, Schedule.details_first(), network, grid=Grid(5))


@pytest.fixture(scope="module")
def known():
    """A flow, data, the exact log-density of the map, and that with an exact trace in the quadrature."""
    flow = large_flow()
    x = flow.decode(latents(flow, ROWS))
    exact = flow.log_prob(x)
    y = flow.encode(x)
    base, total = log_normal(y), 0.0
    directions = torch.eye(DIM, dtype=torch.double).unsqueeze(1).expand(-1, ROWS, -1)
    for step in flow.map.steps(y).to_data:
        y, traces = take_with_traces(step, y, hutchinson(flow.velocity, lambda _, at: directions))
        total = total + traces.sum(0)
    flow.exact_up_to = 1
    return flow, x, exact, base - total - flow.basis.log_det()


@pytest.mark.parametrize("method", METHODS)
def test_standard_error_covers_the_exact_trace(known, method):
    flow, x, _, exact = known
    value, error = flow.log_prob_estimate(x, probes=PROBES, method=method, seed=1, batch_size=100)
    assert value.shape == error.shape == (ROWS,)
    count = PROBES if method == "hutchinson" else PROBES // 3
    score = (value - exact) / error
    for level in (0.5, 0.9):
        inside = float((score.abs() < stats.t.ppf(0.5 + level / 2, count - 1)).double().mean())
        assert inside == pytest.approx(level, abs=3.5 * math.sqrt(level * (1 - level) / ROWS))
    miss = value - exact
    assert abs(float(miss.mean())) < 3.5 * float(miss.std()) / math.sqrt(ROWS), "biased"
    assert float(error.mean()) > 0.02, "there is nothing to estimate"
    again = flow.log_prob_estimate(x, probes=PROBES, method=method, seed=1, batch_size=100).value
    assert torch.equal(again, value)
    assert not torch.equal(flow.log_prob_estimate(x, probes=PROBES, method=method, seed=2).value, value)


def test_quadrature_is_the_log_det_of_the_map_up_to_the_solver(known):
    """What the estimates converge to differs from the map's own density far less than they are known."""
    flow, x, exact, quadrature = known
    error = flow.log_prob_estimate(x, probes=48).standard_error
    difference = (exact - quadrature).abs()
    assert 1e-9 < float(difference.mean()) < 0.1 * float(error.mean())


def test_log_prob_is_a_fixed_function(known):
    flow, x, exact, _ = known
    z, log_det = flow.encode_and_log_det(x)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x))
    torch.testing.assert_close(flow.decode_and_log_det(z)[1], -log_det, rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.log_prob(x[:5], batch_size=2), flow.log_prob(x)[:5])
    miss = (flow.log_prob(x) - exact).square().mean().sqrt()
    assert 1e-3 < float(miss) < 4 * float(flow.log_prob_estimate(x, probes=8).standard_error.mean())
    leaf = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)
    h = 1e-5 * torch.eye(DIM, dtype=torch.double)[3]
    slope = (flow.log_prob(x[:1] + h) - flow.log_prob(x[:1] - h)) / 2e-5
    assert float(gradient[0, 3]) == pytest.approx(float(slope), rel=1e-5, abs=1e-6)


def test_vectors_of_their_own_at_every_evaluation_are_worth_it(known):
    flow, x, _, exact = known
    y, total = flow.encode(x), 0.0
    generator = torch.Generator().manual_seed(0)
    shared = (2.0 * torch.randint(0, 2, (PROBES, ROWS, DIM), generator=generator) - 1).double()
    base = log_normal(y)
    for step in flow.map.steps(y).to_data:
        y, parts = take_with_traces(step, y, hutchinson(flow.velocity, lambda _, at: shared))
        total = total + parts.mean(0)
    one_set = base - total - flow.basis.log_det() - exact
    own = flow.log_prob_estimate(x, probes=PROBES).value - exact
    assert float(own.std()) < 0.6 * float(one_set.std())


class LowRank(Velocity):
    """A nonlinear velocity whose Jacobian has rank two."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("a", torch.randn(12, 2, generator=generator, dtype=torch.double))
        self.register_buffer("b", torch.randn(2, 12, generator=generator, dtype=torch.double))

    def embed(self, t):
        return t.unsqueeze(-1)

    def forward(self, y, embedding):
        return torch.tanh(0.3 * y @ self.a) @ self.b


def test_hutch_plus_plus_is_exact_where_the_sketch_holds_the_jacobian():
    basis = Basis(torch.zeros(12).double(), torch.eye(12).double(), torch.ones(12).double())
    flow = InflationaryFlow(basis, Schedule.preserving(), LowRank(), grid=Grid(4))
    y = latents(flow, 7)
    step = build_solver(flow.velocity, flow.angles, flow.grid, y).to_data[1]
    every = torch.eye(12).double().unsqueeze(1).expand(-1, 7, -1)
    moved, exact = take_with_traces(step, y, hutchinson(flow.velocity, lambda _, at: every))
    generator = torch.Generator().manual_seed(1)
    signs = (2.0 * torch.randint(0, 2, (6, 7, 12), generator=generator) - 1).double()
    again, traces = take_with_traces(step, y, hutch_plus_plus(flow.velocity, lambda _, at: signs))
    torch.testing.assert_close(again, moved)
    torch.testing.assert_close(traces, exact.sum(0).expand(3, -1), rtol=0, atol=1e-12)
    assert float(take_with_traces(step, y, hutchinson(flow.velocity, lambda _, at: signs))[1].std(0).min()) > 1e-3


def test_exact_up_to_a_size_of_ones_choice():
    flow = mixture_flow(5, torch.double, grid=Grid(8))
    x = flow.sample((2, 3), seed=0)
    value, error = flow.log_prob_estimate(x)
    assert torch.equal(value, flow.log_prob(x))
    assert torch.equal(error, torch.zeros(2, 3).double())
    flow.exact_up_to = 4
    value, error = flow.log_prob_estimate(x, probes=4)
    assert value.shape == (2, 3)
    assert (error > 0).all()


@pytest.mark.parametrize("dim", [1, 2])
def test_a_sketch_of_all_axes_is_exact(dim):
    flow = mixture_flow(dim, torch.double, grid=Grid(32))
    x = flow.sample(4, seed=0)
    exact, flow.exact_up_to = flow.log_prob(x), 0
    value, error = flow.log_prob_estimate(x, probes=12, method="hutch++")
    torch.testing.assert_close(value, exact, rtol=0, atol=1e-3)
    assert float(error.abs().max()) < 1e-12


def test_supports_and_bad_input():
    from torch.distributions import constraints

    flow = mlp_flow(4, torch.double, event_shape=(2, 2), support=constraints.positive)
    x = flow.sample(3, seed=0)
    flow.exact_up_to, exact = 1, flow.log_prob(x)
    value, error = flow.log_prob_estimate(x, probes=64)
    assert ((value - exact).abs() < 5 * error + 1e-3).all()
    with pytest.raises(ValueError, match="method expects one of"):
        flow.log_prob_estimate(x, method="hutch")
    with pytest.raises(ValueError, match="probes expects an integer >= 2"):
        flow.log_prob_estimate(x, probes=1)
    with pytest.raises(ValueError, match="probes expects an integer >= 6"):
        flow.log_prob_estimate(x, probes=5, method="hutch++")
