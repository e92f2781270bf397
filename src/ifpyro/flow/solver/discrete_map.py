"""The discrete map of a flow and its inverse on standardised coordinates, step by step."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ...core.precision import full_precision
from ..networks.velocity import Velocity
from .checkpointing import recompute
from .inverse import invert
from .solvers import is_wrapped, weights_of
from .steps import Step, take, take_with_log_det, take_with_traces
from .traces import EXACT_UP_TO, fixed_probes, hutchinson

if TYPE_CHECKING:
    from ..flow import InflationaryFlow


def solve_to_data(flow: "InflationaryFlow", y: Tensor, with_log_det: bool) -> tuple[Tensor, Tensor]:
    """The map ``T`` of latents ``(n, D)``, and its ``log|det dT|``, ``(n,)``, zero if it is not wanted."""
    if not with_log_det and _is_recorded(flow, y):
        grid, *state = flow.map_state()
        played = flow.recordings.play(
            lambda rows: _solve_to_data(flow, rows, False)[0],
            y,
            tuple(state),
            grid,
            lambda: (flow.solver(y), *flow.basis.buffers(), *weights_of(flow.velocity)),
        )
        return played, y.new_zeros(len(y))
    return _solve_to_data(flow, y, with_log_det)


def _is_recorded(flow: "InflationaryFlow", y: Tensor) -> bool:
    """Whether a decode may be a recording: on a GPU, of tensors as they are, of frozen weights that draw nothing."""
    if not (flow.cuda_graphs and y.is_cuda and len(y)) or torch.cuda.is_current_stream_capturing():
        return False
    if torch._C._are_functorch_transforms_active() or unpack_dual(y).tangent is not None:
        return False
    if flow.velocity.training or (flow.gradient_checkpointing and y.requires_grad):
        return False
    return not any(w.requires_grad for w in weights_of(flow.velocity))


@full_precision()
def _solve_to_data(flow: "InflationaryFlow", y: Tensor, with_log_det: bool) -> tuple[Tensor, Tensor]:
    log_det = y.new_zeros(len(y))
    run, velocity = _runner(flow), flow.evaluated_velocity()
    for index, step in enumerate(flow.solver(y).to_data):
        if with_log_det:
            y, part = run(partial(_take_with_log_det, flow, velocity, step, index), y)
            log_det = log_det + part
        else:
            y = run(partial(_take, flow, velocity, step), y)
    return y, log_det


@full_precision()
def solve_to_latent(flow: "InflationaryFlow", y: Tensor, with_log_det: bool) -> tuple[Tensor, Tensor]:
    """The inverse of ``T`` at ``(n, D)``, and ``log|det dT|`` at its result, not of the inverse."""
    log_det = y.new_zeros(len(y))
    solver = flow.solver(y)
    iterations = flow.refinements + (2 if flow.dtype == torch.double else 0)
    # Reduced precision leaves residuals that are rounding, not for Newton's method to close.
    newton = flow.latent_dim <= EXACT_UP_TO and flow.autocast is None
    run, velocity = _runner(flow), flow.evaluated_velocity()
    for index, guess in zip(reversed(range(len(solver.to_data))), solver.to_latent, strict=True):
        step = solver.to_data[index]
        y = run(partial(invert, velocity, step, guess, iterations=iterations, newton=newton), y)
        if with_log_det:
            log_det = log_det + run(partial(_take_with_log_det, flow, velocity, step, index), y)[1]
    return y, log_det


def in_parts(
    solve: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Tensor, batch_size: int | None
) -> tuple[Tensor, Tensor]:
    """``solve(rows)`` with at most ``batch_size`` rows at once.

    Raises:
        ValueError: if the size is not a positive integer.
    """
    if batch_size is None:
        return solve(rows)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size expects a positive integer, got {batch_size!r}")
    states, log_dets = zip(*map(solve, rows.split(batch_size)), strict=True)
    return torch.cat(states), torch.cat(log_dets)


def _runner(flow: "InflationaryFlow") -> Callable[..., Any]:
    """How a step is called: plainly, or so that its gradient runs it again."""
    if not (flow.gradient_checkpointing and torch.is_grad_enabled()):
        return _call
    if any(w.requires_grad or is_wrapped(w) for w in weights_of(flow.velocity)):
        raise ValueError(
            "gradient checkpointing differentiates in x and z alone: it expects frozen weights, but some require "
            "gradients; call flow.requires_grad_(False), or set flow.gradient_checkpointing = False"
        )
    return recompute


def _call(function: Callable[[Tensor], Any], y: Tensor) -> Any:
    return function(y)


def _take(flow: "InflationaryFlow", velocity: Velocity, step: Step, y: Tensor) -> Tensor:
    if flow.gradient_checkpointing and torch.is_grad_enabled():
        # Within a step that runs again, every evaluation does: activations of one alone are ever held.
        return take(lambda state, embedding: recompute(lambda v: velocity(v, embedding), state), step, y)
    other = flow.gradient_checkpointing or flow.compiled_autocast != flow.autocast or is_wrapped(y)
    if flow.compiled_take is None or other:
        return take(velocity, step, y)
    return flow.compiled_take(step, y)


def _take_with_log_det(
    flow: "InflationaryFlow", velocity: Velocity, step: Step, index: int, y: Tensor
) -> tuple[Tensor, Tensor]:
    if flow.latent_dim <= flow.exact_up_to:
        return take_with_log_det(velocity, step, y)
    probes = fixed_probes(step, index, y)
    trace = hutchinson(velocity, lambda stage, at: probes[stage].expand(-1, len(at), -1))
    moved, estimates = take_with_traces(step, y, trace)
    return moved, estimates.mean(0)
