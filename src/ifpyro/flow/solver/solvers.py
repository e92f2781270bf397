"""The solvers that a flow has built, for as long as they are those of its weights."""

from typing import Any

import torch
from torch import Tensor, nn

from ..axes.schedule import Angles
from ..networks.velocity import Velocity
from .grid import Grid
from .steps import Solver, build_solver


class SolverCache:
    """Embeddings of a grid's times are computed once, and again when the network's weights change."""

    def __init__(self) -> None:
        self._solvers: dict[Any, Solver] = {}
        self._state: tuple[Any, ...] = ()
        self._weights: list[Tensor] = []

    def get(self, velocity: Velocity, angles: Angles, grid: Grid, like: Tensor) -> Solver:
        """The solver of a grid for states of the dtype and device of ``like``."""
        weights = weights_of(velocity)
        if any(w.requires_grad or is_wrapped(w) for w in weights):
            return build_solver(velocity, angles, grid, like)  # of this call alone: never shared
        # A network that was trained on, or replaced, has other embeddings.
        state = tuple((w.data_ptr(), w._version) for w in weights)
        if state != self._state:
            self._solvers.clear()
            # Storage is told apart by its address, so it is kept alive for as long as the embeddings are.
            self._state, self._weights = state, [w.detach() for w in weights]
        key = (grid, like.dtype, like.device)
        if key not in self._solvers:
            # A plain tensor stands for `like`, which may be a wrapper of torch.func that must not outlive its call.
            with torch.inference_mode(False), torch.no_grad():
                plain = torch.empty(0, dtype=like.dtype, device=like.device)
                self._solvers[key] = build_solver(velocity, angles, grid, plain)
        return self._solvers[key]

    def clear(self) -> None:
        """Forget everything."""
        self._solvers.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"_solvers": {}, "_state": (), "_weights": []}


def weights_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers: what torch's own iterators yield, without their names, which take longer than a step."""
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    for child in module._modules.values():
        if child is not None:
            own += weights_of(child)
    return own


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func is at work on it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
