r"""Solving the flow: Runge-Kutta on a fixed grid, and its exact Jacobian.

The state is ``y`` of shape ``(n, D)``; time runs from 0 (data) to 1 (latent). A fixed-grid solve *towards the data* is
the map ``T`` that a model means when it says "the flow": a composition of steps

.. math:: \Phi(y) = y + \sum_i b_i k_i, \qquad k_i = -h\,\theta'(t_i) \odot F(y + \sum_j a_{ij} k_j,\; t_i).

Nothing is adaptive inside it, so each row is a smooth function of itself alone, gradients are those of the map that is
evaluated, and

* its log-determinant is that of the product of the step Jacobians ``I + sum_i b_i dk_i/dy`` (not the integral of a
  divergence, which would carry a discretisation error of its own);
* its inverse is found step by step (:mod:`ifpyro.flow.solver.inverse`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.schedule import Angles
from ..networks.velocity import Velocity
from .grid import TABLEAUX, Grid, Tableau


@dataclass(frozen=True)
class Step:
    """All that one step needs besides the state: per stage, an embedding and the rate ``-h theta'(t_i)``."""

    tableau: Tableau
    embedding: tuple[Tensor, ...]  # stages of (E,)
    rate: tuple[Tensor, ...]  # stages of (D,)


@dataclass(frozen=True)
class Solver:
    """The steps of a grid in both directions, each in the order in which it is taken."""

    to_data: tuple[Step, ...]
    to_latent: tuple[Step, ...]


def build_solver(velocity: Velocity, angles: Angles, grid: Grid, like: Tensor) -> Solver:
    """Evaluate angles, speeds and embeddings of every stage of every step once.

    Args:
        velocity: the flow's velocity.
        angles: the flow's angles.
        grid: where the steps are.
        like: a tensor with the dtype and device of the states.
    """
    tableau = TABLEAUX[grid.method]
    nodes = grid.times().to(like.device)
    c = torch.tensor(tableau.c, dtype=torch.double, device=like.device)

    def steps(start: Tensor, end: Tensor) -> tuple[Step, ...]:
        h = (end - start).unsqueeze(-1)
        t = start.unsqueeze(-1) + c * h  # (steps, stages)
        embedding = velocity.embed(t.flatten()).unflatten(0, t.shape)
        rate = (-h.unsqueeze(-1) * angles.speed(t)).to(like)
        # Copies, not views: a compiled step would have to check where in its storage each view lies.
        return tuple(
            Step(tableau, tuple(v.clone() for v in e), tuple(v.clone() for v in r))
            for e, r in zip(embedding, rate, strict=True)
        )

    forward = steps(nodes[:-1], nodes[1:])
    backward = steps(nodes[1:].flip(0), nodes[:-1].flip(0))
    return Solver(to_data=backward, to_latent=forward)


def take(velocity: Callable[[Tensor, Tensor], Tensor], step: Step, y: Tensor) -> Tensor:
    """One Runge-Kutta step ``Phi(y)``; ``y`` of shape ``(n, D)``."""
    values: list[Tensor] = []
    for row, embedding in zip(step.tableau.a, step.embedding, strict=True):
        values.append(velocity(_move(y, step, row, values), embedding))
    return _move(y, step, step.tableau.b, values)


def take_with_log_det(velocity: Velocity, step: Step, y: Tensor) -> tuple[Tensor, Tensor]:
    """One step and ``log|det dPhi/dy|`` (shape ``(n,)``)."""
    result, jacobian = take_with_jacobian(velocity, step, y)
    return result, torch.linalg.slogdet(jacobian).logabsdet


def take_with_jacobian(velocity: Velocity, step: Step, y: Tensor) -> tuple[Tensor, Tensor]:
    """One step and ``dPhi_i/dy_j`` (shape ``(n, D, D)``), from the Jacobians of the velocity at the stages."""
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand(*y.shape, -1)
    values: list[Tensor] = []
    tangents: list[Tensor] = []  # dk_i / dy, (n, D, D)
    for i, row in enumerate(step.tableau.a):
        value, jacobian = velocity_and_jacobian(velocity, _move(y, step, row, values), step.embedding[i])
        values.append(value)
        inner = jacobian @ _combine(eye, row, tangents) if any(row) else jacobian
        tangents.append(step.rate[i].unsqueeze(-1) * inner)
    return _move(y, step, step.tableau.b, values), _combine(eye, step.tableau.b, tangents)


Trace = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From stage, state ``(n, D)``, embedding and rate: ``F``, and estimates ``(p, n)`` of the trace of rate ``* F'``."""


def take_with_traces(step: Step, y: Tensor, trace: Trace) -> tuple[Tensor, Tensor]:
    """One step and estimates ``(p, n)`` of its share of the log-determinant, ``sum_i b_i (-h) tr(theta' F')``.

    Unlike :func:`take_with_log_det` this is the quadrature of the divergence (Grathwohl et al. 2019, eq. 8), which
    agrees with the map's own log-determinant up to the solver's order.

    Args:
        step: the step to take.
        y: states, ``(n, D)``.
        trace: evaluates the velocity and estimates the trace.
    """
    values: list[Tensor] = []
    total = y.new_zeros(())
    for i, row in enumerate(step.tableau.a):
        value, estimates = trace(i, _move(y, step, row, values), step.embedding[i], step.rate[i])
        values.append(value)
        total = total + step.tableau.b[i] * estimates
    return _move(y, step, step.tableau.b, values), total


def velocity_and_jacobian(velocity: Velocity, y: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """``F`` of shape ``(n, D)`` and ``dF_i/dy_j`` of shape ``(n, D, D)``, by ``D`` batched forward-mode products."""
    dim = y.shape[-1]
    directions = torch.eye(dim, dtype=y.dtype, device=y.device).unsqueeze(-2).expand(dim, *y.shape)
    value, products = velocity.with_products(y, embedding, directions)
    return value, products.movedim(0, -1)


def _move(y: Tensor, step: Step, weights: tuple[float, ...], values: list[Tensor]) -> Tensor:
    """``y + sum_i w_i k_i`` with ``k_i = rate_i * F_i``."""
    for weight, rate, value in zip(weights, step.rate, values, strict=False):  # a stage knows those before it alone
        if weight:
            y = torch.addcmul(y, value, rate, value=weight)
    return y


def _combine(y: Tensor, weights: tuple[float, ...], increments: list[Tensor]) -> Tensor:
    for weight, increment in zip(weights, increments, strict=True):
        if weight:
            y = torch.add(y, increment, alpha=weight)
    return y


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
