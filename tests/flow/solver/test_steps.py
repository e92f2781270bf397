import itertools
import math

import pytest
import torch

from flows_zoo import FLOWS, latents, mixture_flow, mlp_flow
from ifpyro import Schedule
from ifpyro.flow.solver.adaptive import solve_adaptive
from ifpyro.flow.solver.grid import TABLEAUX, Grid
from ifpyro.flow.solver.inverse import invert
from ifpyro.flow.solver.steps import (
    build_solver,
    take,
    take_with_log_det,
    take_with_traces,
    velocity_and_jacobian,
)
from ifpyro.flow.solver.traces import hutchinson

RANGES = {"euler": (64, 256), "midpoint": (24, 96), "heun3": (24, 96), "rk4": (24, 96), "dopri5": (60, 150)}


def solve(flow, z, method, steps, to_data=True, power=1.0):
    solver = build_solver(flow.velocity, flow.angles, Grid(steps, power, method), z)
    for step in solver.to_data if to_data else solver.to_latent:
        z = take(flow.velocity, step, z)
    return z


def empirical_order(errors, steps):
    log_steps = torch.log(torch.tensor(steps, dtype=torch.double))
    log_errors = torch.log(torch.tensor(errors, dtype=torch.double))
    centred = log_steps - log_steps.mean()
    return -float((centred * log_errors).sum() / centred.square().sum())


@pytest.mark.parametrize("method", TABLEAUX)
def test_tableau_satisfies_the_order_conditions(method):
    """Row sums, and the conditions on trees up to the declared order that involve ``b`` and ``c`` alone."""
    tableau = TABLEAUX[method]
    for row, c in zip(tableau.a, tableau.c, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-14)
    for k in range(1, tableau.order + 1):
        total = sum(b * c ** (k - 1) for b, c in zip(tableau.b, tableau.c, strict=True))
        assert total == pytest.approx(1 / k, abs=1e-14)


@pytest.mark.parametrize("to_data", [True, False])
@pytest.mark.parametrize("method", TABLEAUX)
def test_convergence_order(method, to_data):
    flow = mixture_flow(2, torch.double, Schedule.preserving(start=0.2))
    z = latents(flow, 30)
    reference = solve(flow, z, "dopri5", 800, to_data)
    low, high = RANGES[method]
    steps = [low, round(math.sqrt(low * high)), high]
    errors = [float((solve(flow, z, method, n, to_data) - reference).square().mean().sqrt()) for n in steps]
    assert errors[-1] > 2e-14, "rounding error decides this test"
    assert empirical_order(errors, steps) == pytest.approx(TABLEAUX[method].order, abs=0.3)


@pytest.mark.parametrize("to_data", [True, False])
def test_adaptive_oracle_agrees_with_the_grid(to_data):
    flow = mixture_flow(2, torch.double, Schedule.details_first(start=0.2))
    y = latents(flow, 20)
    options = {"to_data": to_data, "tolerance": 1e-8}
    adaptive, log_det = solve_adaptive(flow.velocity, flow.angles, y, log_det=True, **options)
    torch.testing.assert_close(adaptive, solve(flow, y, "dopri5", 200, to_data), rtol=0, atol=1e-5)
    plain, zeros = solve_adaptive(flow.velocity, flow.angles, y, **options)
    torch.testing.assert_close(plain, adaptive, rtol=0, atol=1e-5)
    assert (zeros == 0).all()
    solver = build_solver(flow.velocity, flow.angles, Grid(200, 1.0, "dopri5"), y)
    total = torch.zeros(20, dtype=torch.double)
    for step in solver.to_data if to_data else solver.to_latent:
        y, part = take_with_log_det(flow.velocity, step, y)
        total += part
    torch.testing.assert_close(log_det, total, rtol=0, atol=1e-5)


def test_users_may_ask_for_a_tolerance():
    flow = mixture_flow(2, torch.double, Schedule.details_first(start=0.2))
    flow.grid = Grid(200, 1.0, "dopri5")
    z = latents(flow, 4)
    x = flow.decode(z)
    torch.testing.assert_close(flow.decode(z, adaptive=1e-8), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.encode(x, adaptive=1e-8), z, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="adaptive must be a positive number"):
        flow.decode(z, adaptive=0.0)


def divergence(velocity, y, embedding):
    """The diagonal ``dF_j/dy_j``, ``(n, D)``: weighted by ``theta_j'`` it sums to the divergence."""
    return velocity_and_jacobian(velocity, y, embedding)[1].diagonal(dim1=-2, dim2=-1)


@pytest.mark.parametrize("name", ["mixture 1", "mixture 5", "network 8"])
def test_jacobian_and_divergence_against_autograd(name):
    flow = FLOWS[name](torch.double)
    y = latents(flow, 7)
    embedding = flow.velocity.embed(torch.tensor([0.3], dtype=torch.double))[0]
    value, jacobian = velocity_and_jacobian(flow.velocity, y, embedding)
    torch.testing.assert_close(value, flow.velocity(y, embedding))
    expected = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: flow.velocity(v[None], embedding)[0], row) for row in y]
    )
    torch.testing.assert_close(jacobian, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        divergence(flow.velocity, y, embedding), expected.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("method", TABLEAUX)
def test_log_det_of_a_step_is_that_of_its_map(method):
    flow = mlp_flow(3, torch.double)
    y = latents(flow, 5)
    step = build_solver(flow.velocity, flow.angles, Grid(3, 1.5, method), y).to_data[1]
    moved, log_det = take_with_log_det(flow.velocity, step, y)
    torch.testing.assert_close(moved, take(flow.velocity, step, y), rtol=1e-13, atol=1e-13)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: take(flow.velocity, step, v[None])[0], y[row])
        assert float(log_det[row]) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-12)


def with_signs(flow, signs):
    return hutchinson(flow.velocity, lambda _, y: signs[:, None].expand(-1, len(y), -1))


def test_hutchinson_is_unbiased():
    """The mean over all sign vectors is the exact trace of the quadrature, and single probes are not."""
    flow = mlp_flow(3, torch.double)
    y = latents(flow, 6)
    step = build_solver(flow.velocity, flow.angles, Grid(4), y).to_data[2]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.double)
    moved, estimates = take_with_traces(step, y, with_signs(flow, signs))
    estimate = estimates.mean(0)
    torch.testing.assert_close(moved, take(flow.velocity, step, y))
    increments, exact = [], 0.0
    for i, row in enumerate(step.tableau.a):
        stage = y + sum((weight * k for weight, k in zip(row, increments, strict=True)), torch.zeros(()))
        increments.append(step.rate[i] * flow.velocity(stage, step.embedding[i]))
        exact = exact + step.tableau.b[i] * (step.rate[i] * divergence(flow.velocity, stage, step.embedding[i])).sum(-1)
    torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=1e-12)
    assert (estimates[0] - exact).abs().max() > 1e-4


def test_hutchinson_converges_to_the_log_det_of_the_map():
    """Trace quadrature and log-determinant differ by the solver's error alone."""
    flow = mlp_flow(2, torch.double)
    y = latents(flow, 6)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.double)
    differences = []
    for steps in (8, 16, 32):
        state, exact, estimate = y, 0.0, 0.0
        for step in build_solver(flow.velocity, flow.angles, Grid(steps), y).to_data:
            estimate = estimate + take_with_traces(step, state, with_signs(flow, signs))[1].mean(0)
            state, part = take_with_log_det(flow.velocity, step, state)
            exact = exact + part
        differences.append(float((exact - estimate).abs().max()))
    assert differences[0] > 8 * differences[1] > 64 * differences[2]


@pytest.mark.parametrize("name", ["mixture 2", "mixture 5", "network 8"])
def test_inverse_contracts_to_the_discrete_map(name):
    """Every iteration gains digits: the map is inverted, not only the equation that it approximates."""
    flow = FLOWS[name](torch.double)
    y = latents(flow, 50)
    solver = build_solver(flow.velocity, flow.angles, Grid(16), y)
    step, back = solver.to_data[3], solver.to_latent[-4]
    target = take(flow.velocity, step, y)
    errors = [float((invert(flow.velocity, step, back, target, n) - y).square().mean().sqrt()) for n in (0, 1, 2, 4)]
    assert errors[0] > 1e-9, "nothing to refine"
    assert errors[3] < 1e-3 * errors[0]
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_grid_is_denser_near_the_data():
    times = Grid(10, 2.0).times()
    torch.testing.assert_close(times, (torch.arange(11) / 10).double() ** 2, rtol=1e-7, atol=1e-12)
    assert Grid(10, 2.0).evaluations == 40
    assert Grid(10, method="dopri5").evaluations == 60
    assert (times[0], times[-1]) == (0, 1)
