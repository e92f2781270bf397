"""Operators, observations and noise in every form in which they come."""

import numpy as np
import pytest
import torch

import ifpyro
from flows_zoo import mlp_flow
from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.flow import InflationaryFlow
from ifpyro.flow.networks.mlp import MLP
from ifpyro.flow.solver.grid import Grid
from ifpyro.infer.engines.linear_observation import LinearObservation

EVENT = (2, 3)
MASK = torch.tensor([[True, False, True], [False, False, True]])


def event_flow(event=EVENT):
    dim = int(np.prod(event))
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    basis = Basis.from_moments(torch.arange(dim).double(), root @ root.T / dim + 0.1 * torch.eye(dim), torch.empty(0))
    return InflationaryFlow(
        basis, ifpyro.Schedule.details_first(), MLP(dim, width=4, blocks=1), event_shape=event, grid=Grid(2)
    )


def rows(flow, operator, y, sd=0.1, **options):
    options = {"exact": False, "sweeps": 1, "ratio": 0.3, **options}
    return ifpyro.linear_posterior(flow, operator, y, sd, draws=6, progress=False, **options)


def test_every_form_of_one_operator_gives_the_same_draws():
    flow = event_flow()
    matrix = torch.eye(6)[MASK.flatten()]
    y = torch.tensor([0.3, 1.8, 5.2])
    wanted = rows(flow, matrix, y)
    forms = {
        "array": (matrix.numpy(), y.numpy()),
        "double": (matrix.double(), y.double()),
        "half": (matrix.half(), y),
        "bfloat16": (matrix.bfloat16(), y),
        "integers": (matrix.long(), y),
        "list": (matrix.tolist(), y.tolist()),
        "big-endian": (matrix.numpy().astype(">f8"), y.numpy().astype(">f4")),
        "sparse": (matrix.to_sparse(), y),
        "mask": (MASK, y),
        "mask as an array": (MASK.numpy(), y),
        "flat mask": (MASK.flatten(), y),
        "callable": (lambda x: x[:, MASK], y),
        "callable of the matrix": (lambda x: x.flatten(1) @ matrix.T, y),
    }
    for name, (operator, seen) in forms.items():
        found = rows(flow, operator, seen)
        assert found.dtype == torch.float32
        assert found.shape == (6, *EVENT)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_whole_events_with_a_mask():
    """What is hidden in them may be anything; where a shape has two meanings, neither is taken."""
    flow, mask = event_flow(), torch.tensor([[True, False, True], [False, True, True]])
    whole = torch.full((2, *EVENT), torch.nan)
    whole[:, mask] = torch.tensor([[0.3, 1.8, 4.1, 5.2], [0.0, 2.0, 4.0, 5.0]])
    torch.testing.assert_close(rows(flow, mask, whole), rows(flow, mask, whole[:, mask]))
    with pytest.raises(ValueError, match=r"y of shape \(2, 3\) may be whole events \(2, 3\) or observations of 3 seen"):
        rows(flow, MASK, torch.zeros(EVENT))
    line, seen = event_flow((4,)), torch.ones(4, dtype=torch.bool)  # both are the same
    assert rows(line, seen, torch.zeros(4)).shape == (6, 4)


def test_forms_of_the_noise():
    flow, y = event_flow(), torch.tensor([0.3, 1.8, 5.2])
    wanted = rows(flow, MASK, y, 0.25)
    for sd in (np.float32(0.25), torch.tensor(0.25), [0.25] * 3, np.full(3, 0.25), torch.full((3,), 0.25).half()):
        torch.testing.assert_close(rows(flow, MASK, y, sd), wanted)
    assert not torch.equal(rows(flow, MASK, y, [0.25, 0.25, 1.0]), wanted)


def test_a_callable_of_images_with_and_without_its_adjoint():
    """A blur: the draws are the same, and those of its matrix, exact or by the reverse process."""
    flow = event_flow((1, 4, 4))
    kernel = torch.tensor([[[[0.0, 0.2, 0.0], [0.1, 0.4, 0.1], [0.0, 0.3, 0.0]]]])

    def blur(x):
        return torch.nn.functional.conv2d(x, kernel, padding=1)

    def back(r):
        return torch.nn.functional.conv_transpose2d(r, kernel, padding=1)

    matrix = blur(torch.eye(16).reshape(16, 1, 4, 4)).flatten(1).T
    y = blur(flow.sample((2,), seed=0))
    wanted = rows(flow, matrix, y.flatten(1))
    for options in ({}, {"adjoint": back}):
        torch.testing.assert_close(rows(flow, blur, y, **options), wanted, rtol=1e-3, atol=1e-3)
    exact = rows(flow, blur, y[0], exact=True)
    assert exact.exact
    torch.testing.assert_close(exact, rows(flow, matrix, y[0].flatten(), exact=True), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="adjoint expects the transpose of operator"):
        rows(flow, blur, y, adjoint=blur)
    with pytest.raises(ValueError, match=r"adjoint expects a callable from observations \(2, 1, 4, 4\)"):
        rows(flow, blur, y, adjoint=lambda r: r[..., :2])
    with pytest.raises(ValueError, match=r"linear callable.*subtract operator\(0\)"):
        rows(flow, lambda x: blur(x) + 1, y)
    with pytest.raises(ValueError, match="linear callable"):
        rows(flow, lambda x: blur(x).square(), y)
    with pytest.raises(ValueError, match=r"operator expects a callable from events \(1, 1, 4, 4\)"):
        rows(flow, lambda x: x.sum(), y)
    with pytest.raises(ValueError, match=r"y of shape \(\*batch, 1, 4, 4\)"):
        rows(flow, blur, y.flatten(1))


def test_adjoints_are_adjoint():
    flow, generator = event_flow(), torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 6, generator=generator)
    for operator, m in ((matrix, 4), (MASK, 3), (lambda x: x.flatten(1) @ matrix.T, 4)):
        seen = LinearObservation.read(flow, operator, torch.zeros(m), 1.0)
        x = torch.randn(5, 6, generator=generator, dtype=torch.double)
        r = torch.randn(5, m, generator=generator, dtype=torch.double)
        left, right = (seen.forward(x) * r).sum(1), (x * seen.adjoint(r)).sum(1)
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.matrix(6) @ x.T, seen.forward(x).T, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_with_the_reason():
    flow = mlp_flow(3, torch.float)
    seen, y = torch.eye(3)[:2], torch.zeros(2)
    cases = [
        (ValueError, r"operator of shape \(m, 3\).*got shape \(4, 4\)", (torch.eye(4), torch.zeros(4), 0.1)),
        (ValueError, r"operator of shape \(m, 3\).*got shape \(3,\)", (torch.ones(3), torch.zeros(1), 0.1)),
        (ValueError, r"mask .* expects shape \(3,\), got \(2, 3\).*number type", (seen.bool(), y, 0.1)),
        (ValueError, "operator expects finite", (seen * torch.nan, y, 0.1)),
        (TypeError, "complex", (seen * 1j, y, 0.1)),
        (TypeError, "got str", ("mask", y, 0.1)),
        (TypeError, "got NoneType", (None, y, 0.1)),
        (ValueError, r"y of shape \(\*batch, 2\), as the operator gives, got \(3,\)", (seen, torch.zeros(3), 0.1)),
        (ValueError, r"y expects finite .* leave such entries out", (seen, y * torch.nan, 0.1)),
        (ValueError, "got 0: without noise", (seen, y, 0.0)),
        (ValueError, "got 0: without noise", (seen, y, [0.1, 0.0])),
        (ValueError, "positive finite", (seen, y, -1.0)),
        (ValueError, "positive finite", (seen, y, float("nan"))),
        (ValueError, "positive finite", (seen, y, float("inf"))),
        (
            ValueError,
            r"sd expects a number, or one for every entry of y, shape \(2,\), got shape \(3,\)",
            (seen, y, [1, 1, 1]),
        ),
    ]
    for error, words, arguments in cases:
        with pytest.raises(error, match=words):
            ifpyro.linear_posterior(flow, *arguments, progress=False)
    with pytest.raises(TypeError, match="adjoint expects a callable beside a callable operator"):
        ifpyro.linear_posterior(flow, seen, y, 0.1, adjoint=seen.T)
