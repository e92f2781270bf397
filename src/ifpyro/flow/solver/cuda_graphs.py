"""Decodes recorded as CUDA graphs and played back, on request.

A decode is hundreds of small kernels. On a GPU it takes as long as Python takes to launch them, whether for one row or
for thousands. A recording launches them all at once: it does the same arithmetic on the same addresses, so that rows
are copied in and the result is copied out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.precision import full_precision
from .steps import is_wrapped

MOST = 24
"""Recordings of one flow: sizes of batches, grids, with and without gradient. The one that rested longest makes way."""

SEEN = 2
"""Times that a decode runs before it is recorded: a recording costs several decodes."""

_NAMES = 1000  # of decodes that are counted

Solve = Callable[[Tensor], Tensor]


class Recordings:
    """What a flow has recorded, for as long as it is the same map. For one thread and one stream at a time."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()
        self._seen: dict[Any, int] = {}
        self._kept: dict[Any, _Recording] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def play(
        self, solve: Solve, y: Tensor, state: tuple[Any, ...], grid: Any, reads: Callable[[], Sequence[Any]]
    ) -> Tensor:
        """``solve(y)``, recorded at its third call with as many rows, and then played back.

        Args:
            solve: a map of tensors on a GPU that never waits for the processor.
            y: states ``(n, D)``.
            state: what the map depends on besides its argument and its grid.
            grid: its grid.
            reads: all else that it reads, asked when it is recorded; kept alive for as long as it may be played.

        Raises:
            RuntimeError: if the map cannot be recorded.
        """
        if state != self._state:
            self.clear()
            self._state = state
        gradient = torch.is_grad_enabled() and y.requires_grad
        ambient = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (grid, y.shape, y.dtype, y.device, gradient, ambient)
        recording = self._kept.pop(key, None)
        if recording is None:
            if len(self._seen) > _NAMES:
                self._seen.clear()
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= SEEN:
                return solve(y)
            if len(self._kept) == MOST:
                del self._kept[next(iter(self._kept))]
            recording = _Recording(solve, y, gradient, reads())
        self._kept[key] = recording  # the last to go
        played: Tensor = _Play.apply(y, recording) if gradient else recording.forward(y)
        return played.clone()  # the next batch overwrites what was played

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._kept.clear()
        self._seen.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_state": (), "_seen": {}, "_kept": {}}


class _Recording:
    """One decode of ``n`` rows, and its gradient."""

    def __init__(self, solve: Solve, y: Tensor, gradient: bool, held: Sequence[Any]) -> None:
        self.turn, self.solve, self._held = 0, solve, held
        device = y.device
        # One stream for the way there and back, on the device of the rows, which need not be the current one.
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.stream(current),  # comes back even if a recording breaks off
                torch.inference_mode(False),
                torch.set_grad_enabled(gradient),
                full_precision(),
            ):
                self._start = y.detach().clone().requires_grad_(gradient)
                _warm_up(solve, self._start, gradient, stream)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=stream):
                    self._end = solve(self._start)
                if gradient:
                    self._cotangent = torch.zeros_like(self._end)
                    self._backward = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self._backward, pool=self._graph.pool(), stream=stream):
                        (self._gradient,) = torch.autograd.grad(self._end, self._start, self._cotangent)
        except RuntimeError as error:
            raise RuntimeError(
                f"a decode of {len(y)} rows cannot be recorded: the network waits for the processor on its way, or "
                f"there is too little memory; set flow.cuda_graphs = False ({error})"
            ) from error
        self._end = self._end.detach()

    def versions(self) -> tuple[int, ...]:
        """Of the weights that are read, which grow when these are changed in place."""
        return tuple(value._version for value in self._held if isinstance(value, Tensor))

    def forward(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            self._start.copy_(y)
        self._graph.replay()
        self.turn += 1
        return self._end

    def gradient(self, cotangent: Tensor) -> Tensor:
        self._cotangent.copy_(cotangent)
        self._backward.replay()
        self.turn += 1  # the way back overwrites activations as it goes
        return self._gradient.clone()


class _Play(torch.autograd.Function):
    """A recording as a differentiable function."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, recording: _Recording) -> Tensor:
        end = recording.forward(y)
        ctx.recording, ctx.turn, ctx.versions = recording, recording.turn, recording.versions()
        ctx.save_for_backward(y)
        return end.view_as(end)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (y,), recording = ctx.saved_tensors, ctx.recording
        if ctx.versions != recording.versions():
            raise RuntimeError("weights of the flow were changed in place after the decode whose gradient is asked for")
        if torch.is_grad_enabled() or is_wrapped(cotangent):  # somebody differentiates again, or in a batch
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(recording.solve(y), y, cotangent, create_graph=True)
            return gradient, None
        if recording.turn != ctx.turn:  # other rows went through since, or these went back before
            recording.forward(y)
        return recording.gradient(cotangent), None


def _warm_up(solve: Solve, y: Tensor, gradient: bool, stream: torch.cuda.Stream) -> None:
    """Kernels are chosen, and workspaces taken, before anything is recorded; on another stream, as torch asks for."""
    current = torch.cuda.current_stream(y.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(2):
            end = solve(y)
            if gradient:
                torch.autograd.grad(end, y, torch.zeros_like(end))
    current.wait_stream(stream)
