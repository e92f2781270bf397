"""Rows that lie between separated parts of the data, where the fixed-point iteration alone does not close."""

import pytest
import torch

from ifpyro import InflationaryFlow, Schedule
from ifpyro.flow.solver.grid import Grid
from ifpyro.flow.solver.inverse import invert
from ifpyro.flow.solver.steps import take


def two_clusters(dtype, steps=5):
    weights = torch.tensor([0.4, 0.6], dtype=dtype)
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.5]], dtype=dtype)
    covariances = torch.diag_embed(torch.tensor([[0.25, 0.2], [0.3, 0.1]], dtype=dtype))
    return InflationaryFlow.from_gaussian_mixture(
        weights, means, covariances, schedule=Schedule.preserving(), grid=Grid(steps), refinements=1
    )


def between(dtype, n=41):
    """Points on the way from one cluster to the other."""
    along = torch.linspace(-1.6, 1.6, n, dtype=dtype)
    return torch.stack([along, 0.1 * along], -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.double, 1e-9)])
def test_points_between_clusters_come_back(dtype, tolerance):
    flow, x = two_clusters(dtype), between(dtype)
    assert float((flow.decode(flow.encode(x)) - x).abs().max()) < tolerance


def test_newton_closes_what_the_iteration_leaves_open():
    flow, x = two_clusters(torch.double), between(torch.double)
    solver = flow.map.steps(x)
    y, worst = flow.basis.to_standard(x), {}
    for step, guess in zip(reversed(solver.to_data), solver.to_latent, strict=True):
        for newton in (False, True):
            found = invert(flow.velocity, step, guess, y, 3, newton=newton)
            residual = float((take(flow.velocity, step, found) - y).abs().max())
            worst[newton] = max(worst.get(newton, 0.0), residual)
        y = found
    assert worst[False] > 1e-3, "nothing is left to Newton's method"
    assert worst[True] < 1e-10


def test_gradient_is_that_of_the_inverse_function():
    flow, x = two_clusters(torch.double), between(torch.double)
    to_latent = torch.func.vmap(torch.func.jacrev(flow.encode))  # by rows, without Newton: only where that is enough
    x = x.requires_grad_(True)
    z = flow.encode(x)
    forward = torch.stack([torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0] for i in range(2)], 1)
    back = torch.func.vmap(torch.func.jacfwd(flow.decode))(z.detach())
    product = forward @ back
    torch.testing.assert_close(product, torch.eye(2, dtype=torch.double).expand_as(product), atol=1e-7, rtol=0)
    at_a_mean = torch.tensor([[-2.0, 0.0]], dtype=torch.double)
    flow.refinements = 8
    near = to_latent(at_a_mean)[0] @ torch.func.jacfwd(flow.decode)(flow.encode(at_a_mean)[0])
    torch.testing.assert_close(near, torch.eye(2, dtype=torch.double), atol=1e-6, rtol=0)


def test_log_density_of_points_between_clusters_is_that_of_the_map():
    flow, x = two_clusters(torch.double), between(torch.double)
    z, log_det = flow.encode_and_log_det(x)
    jacobian = torch.func.vmap(torch.func.jacfwd(flow.decode))(z)
    torch.testing.assert_close(log_det, -torch.linalg.slogdet(jacobian).logabsdet, atol=1e-9, rtol=0)


def test_rows_do_not_depend_on_their_batch_mates():
    flow, x = two_clusters(torch.double), between(torch.double, 9)
    alone = torch.cat([flow.encode(row) for row in x.split(1)])
    torch.testing.assert_close(flow.encode(x), alone, atol=1e-12, rtol=0)


def test_rows_that_are_not_numbers_stay_alone():
    flow, x = two_clusters(torch.double), between(torch.double)
    spoilt = torch.cat([x, torch.full((1, 2), float("nan"), dtype=torch.double)])
    torch.testing.assert_close(flow.encode(spoilt)[:-1], flow.encode(x), atol=1e-12, rtol=0)


def test_a_guess_alone_is_left_alone():
    flow = two_clusters(torch.float32)
    flow.refinements = 0
    x = between(torch.float32)
    assert float((flow.decode(flow.encode(x)) - x).abs().max()) > 1e-3
