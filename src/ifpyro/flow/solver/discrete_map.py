"""The discrete map between latents and standardised coordinates, and its inverse: the map that *is* the model.

A fixed grid of Runge-Kutta steps, each of which :mod:`ifpyro.flow.solver.steps` takes and
:mod:`ifpyro.flow.solver.inverse` inverts. Nothing here knows of data, of a basis, or of Pyro.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from ...core.arguments import check_batch_size, check_positive
from ...core.precision import full_precision
from ..axes.schedule import Angles
from ..networks.autocast import Autocast
from ..networks.velocity import Velocity
from .adaptive import solve_adaptive
from .checkpointing import recompute
from .compiled import compile_step
from .cuda_graphs import Recordings
from .fidelity import Evaluations, current_fidelity
from .grid import Grid, cheap_grid
from .inverse import invert
from .steps import Solver, SolverCache, Step, is_wrapped, take, take_with_log_det, take_with_traces, weights_of
from .traces import EXACT_UP_TO, fixed_probes, hutchinson, trace_maker


@dataclass(frozen=True)
class Switches:
    """How a map is run; :class:`ifpyro.InflationaryFlow` describes each of them.

    Attributes:
        refinements: Fixed-point iterations a step of the inverse in single precision; two more in double.
        exact_up_to: Axes up to which log-determinants are exact.
        autocast: Reduced precision of the network's products, or None.
        gradient_checkpointing: Whether gradients run every step again instead of remembering its activations.
        cuda_graphs: Whether decodes on a GPU are recorded and played back.
    """

    refinements: int = 2
    exact_up_to: int = EXACT_UP_TO
    autocast: torch.dtype | None = None
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False


class DiscreteMap:
    """The map ``T`` from latents ``(n, D)`` to standardised coordinates, and its inverse.

    Args:
        velocity: The network.
        angles: The angles of its axes.
        grid: The fine grid, which defines the model.
        coarse_steps: Steps of the cheap map under ``ifpyro.fidelity("coarse")``.
        switches: How the map is run.
        frame: A module whose buffers the network may read besides its own.
    """

    def __init__(
        self,
        velocity: Velocity,
        angles: Angles,
        grid: Grid,
        coarse_steps: int,
        switches: Switches,
        frame: nn.Module | None = None,
    ) -> None:
        self.velocity, self.angles = velocity, angles
        self.grid, self.coarse_steps, self.switches = grid, coarse_steps, switches
        self.recordings = Recordings()
        self.compiled_take: Callable[[Step, Tensor], Tensor] | None = None
        self._compiled_autocast: torch.dtype | None = None
        self._solvers = SolverCache()
        self._frame = frame

    # -- the map ----------------------------------------------------------------------------------------------------

    def to_data(self, z: Tensor, *, log_det: bool = False) -> tuple[Tensor, Tensor]:
        """``T(z)`` of latents ``(n, D)``, and ``log|det dT|``, ``(n,)``: zero if it is not asked for."""
        if not log_det and self._is_recorded(z):
            grid, *state = self.state()
            played = self.recordings.play(
                lambda rows: self._to_data(rows, False)[0],
                z,
                tuple(state),
                grid,
                lambda: (self.steps(z), *self._reads()),
            )
            return played, z.new_zeros(len(z))
        return self._to_data(z, log_det)

    @full_precision()
    def to_latent(self, v: Tensor, *, log_det: bool = False) -> tuple[Tensor, Tensor]:
        """The inverse of ``T`` at ``(n, D)``, and ``log|det dT|`` at its result, not of the inverse."""
        total = v.new_zeros(len(v))
        solver = self.steps(v)
        iterations = self.switches.refinements + (2 if v.dtype == torch.double else 0)
        # Reduced precision leaves residuals that are rounding, not for Newton's method to close.
        newton = v.shape[-1] <= EXACT_UP_TO and self.switches.autocast is None
        run, velocity = self._runner(), self.evaluated_velocity()
        for index, guess in zip(reversed(range(len(solver.to_data))), solver.to_latent, strict=True):
            step = solver.to_data[index]
            v = run(partial(invert, velocity, step, guess, iterations=iterations, newton=newton), v)
            if log_det:
                total = total + run(partial(self._take_with_log_det, velocity, step, index), v)[1]
        return v, total

    @full_precision()
    def on_grid(self, z: Tensor, grid: Grid) -> Tensor:
        """The solve of latents ``(n, D)`` on any grid, step by step as it stands: for those who measure it."""
        velocity = self.evaluated_velocity()
        for step in self.steps(z, grid).to_data:
            z = take(velocity, step, z)
        return z

    @full_precision()
    def adaptive(self, y: Tensor, *, to_data: bool, tolerance: float) -> tuple[Tensor, Tensor]:
        """The differential equation itself, to a tolerance, from ``(n, D)`` in either direction; and zeros."""
        tolerance = check_positive("adaptive", tolerance)
        return solve_adaptive(self.evaluated_velocity(), self.angles, y, to_data=to_data, tolerance=tolerance)

    @full_precision()
    def estimate(
        self, v: Tensor, *, probes: int, method: str, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of ``T`` at ``(n, D)``, and an estimate of ``log|det dT|`` there with its standard error.

        Args:
            v: Standardised coordinates.
            probes: Products of the Jacobian at every evaluation of the velocity.
            method: A name in :data:`~ifpyro.flow.solver.traces.METHODS`.
            generator: Of the random vectors, which differ from row to row.
        """
        z = self.to_latent(v)[0]
        y, total = z, v.new_zeros(())
        trace = trace_maker(method, probes, v.shape[-1], generator)(self.evaluated_velocity())
        for step in self.steps(y).to_data:
            y, parts = take_with_traces(step, y, trace)
            total = total + parts
        return z, total.mean(0), total.std(0) / len(total) ** 0.5

    # -- what it is made of -----------------------------------------------------------------------------------------

    def steps(self, like: Tensor, grid: Grid | None = None) -> Solver:
        """The steps of a grid, that of the current fidelity by default, for states like a tensor."""
        return self._solvers.get(self.velocity.timed(), self.angles, grid or self._current_grid(), like)

    def evaluated_velocity(self) -> Velocity:
        """The velocity in the precision in which it is evaluated."""
        return self.velocity if self.switches.autocast is None else Autocast(self.velocity, self.switches.autocast)

    def state(self) -> tuple[Any, ...]:
        """What the map depends on besides its argument: a remembered result holds while this compares equal."""
        read = self._reads()
        if any(is_wrapped(w) for w in read):
            return (object(),)  # weights of one vmapped call equal no others
        switches = self.switches
        return (
            self._current_grid(),
            (switches.refinements, switches.exact_up_to, switches.autocast),
            torch.is_grad_enabled() and any(w.requires_grad for w in read),
            tuple((w.dtype, w.device, w.data_ptr(), w._version) for w in read),
        )

    def switch(self, **changes: Any) -> None:
        """Change some of the switches."""
        self.switches = replace(self.switches, **changes)

    def compile(self, options: dict[str, Any]) -> None:
        """Compile the step, for this session; results agree with the uncompiled ones to rounding."""
        self.compiled_take = compile_step(self.evaluated_velocity(), options)
        self._compiled_autocast = self.switches.autocast

    def clear(self) -> None:
        """Forget steps and recordings: the network has moved to another dtype or device."""
        self._solvers.clear()
        self.recordings.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled_take": None}

    def driven_by(self, velocity: Velocity, frame: nn.Module | None) -> "DiscreteMap":
        """The same grid and switches with another velocity whose time embeddings are the same: steps are shared."""
        other = DiscreteMap(velocity, self.angles, self.grid, self.coarse_steps, self.switches, frame)
        if velocity.timed() is self.velocity.timed():
            other._solvers = self._solvers
        return other

    def of_rows(self, rows: Tensor) -> "DiscreteMap":
        """The map of some rows of a batch whose rows have conditions of their own."""
        return self.driven_by(self.velocity.of_rows(rows), self._frame)

    # -- internals --------------------------------------------------------------------------------------------------

    @full_precision()
    def _to_data(self, z: Tensor, log_det: bool) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(len(z))
        run, velocity = self._runner(), self.evaluated_velocity()
        for index, step in enumerate(self.steps(z).to_data):
            if log_det:
                z, part = run(partial(self._take_with_log_det, velocity, step, index), z)
                total = total + part
            else:
                z = run(partial(self._take, velocity, step), z)
        return z, total

    def _take(self, velocity: Velocity, step: Step, y: Tensor) -> Tensor:
        checkpointing = self.switches.gradient_checkpointing
        if checkpointing and torch.is_grad_enabled():
            # Within a step that runs again, every evaluation does: activations of one alone are ever held.
            return take(lambda state, embedding: recompute(lambda v: velocity(v, embedding), state), step, y)
        other = checkpointing or self._compiled_autocast != self.switches.autocast or is_wrapped(y)
        if self.compiled_take is None or other:
            return take(velocity, step, y)
        return self.compiled_take(step, y)

    def _take_with_log_det(self, velocity: Velocity, step: Step, index: int, y: Tensor) -> tuple[Tensor, Tensor]:
        if y.shape[-1] <= self.switches.exact_up_to:
            return take_with_log_det(velocity, step, y)
        probes = fixed_probes(step, index, y)
        trace = hutchinson(velocity, lambda stage, at: probes[stage].expand(-1, len(at), -1))
        moved, estimates = take_with_traces(step, y, trace)
        return moved, estimates.mean(0)

    def _runner(self) -> Callable[..., Any]:
        """How a step is called: plainly, or so that its gradient runs it again."""
        if not (self.switches.gradient_checkpointing and torch.is_grad_enabled()):
            return _call
        if any(w.requires_grad or is_wrapped(w) for w in weights_of(self.velocity)):
            raise ValueError(
                "gradient checkpointing differentiates in x and z alone: it expects frozen weights, but some require "
                "gradients; call flow.requires_grad_(False), or set flow.gradient_checkpointing = False"
            )
        return recompute

    def _is_recorded(self, y: Tensor) -> bool:
        """Whether a decode may be a recording: on a GPU, of plain tensors, by frozen weights that draw nothing."""
        if not (self.switches.cuda_graphs and y.is_cuda and len(y)) or torch.cuda.is_current_stream_capturing():
            return False
        if torch._C._are_functorch_transforms_active() or unpack_dual(y).tangent is not None:
            return False
        if self.velocity.training or (self.switches.gradient_checkpointing and y.requires_grad):
            return False
        return not any(w.requires_grad for w in weights_of(self.velocity))

    def _reads(self) -> list[Tensor]:
        """All tensors that an evaluation may read."""
        frame = [] if self._frame is None else list(self._frame.buffers())
        return [*frame, *weights_of(self.velocity)]

    def _current_grid(self) -> Grid:
        level = current_fidelity()
        if level == "fine":
            return self.grid
        if isinstance(level, Evaluations):
            return cheap_grid(level.count, self.grid)
        return replace(self.grid, steps=self.coarse_steps if level == "coarse" else level)


def in_parts(solve: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor, batch_size: int | None) -> tuple[Tensor, ...]:
    """``solve(rows)`` with at most ``batch_size`` rows at once.

    Raises:
        ValueError: if the size is not a positive integer.
    """
    batch_size = check_batch_size(batch_size)
    if batch_size is None:
        return solve(rows)
    return tuple(torch.cat(parts) for parts in zip(*map(solve, rows.split(batch_size)), strict=True))


def _call(function: Callable[[Tensor], Any], y: Tensor) -> Any:
    return function(y)
