"""A solver step compiled by torch, for one session."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..networks.velocity import Velocity
from .grid import Tableau
from .steps import Step, take, weights_of


def compile_step(velocity: Velocity, options: dict[str, Any]) -> Callable[[Step, Tensor], Tensor]:
    """:func:`~ifpyro.flow.solver.steps.take` of a velocity, compiled at its first call with each tableau.

    Networks that look alike (the same ``repr`` and shapes) share what was compiled.
    """
    options = {"dynamic": True, **options}
    shapes = tuple(weight.shape for weight in weights_of(velocity))
    kind = repr(velocity), shapes, repr(sorted(options.items()))
    compiled: dict[Any, Callable[..., Tensor]] = {}

    def call(step: Step, y: Tensor) -> Tensor:
        state = step.tableau, y.dtype, y.device
        if state not in compiled:
            compiled[state] = torch.compile(_own_step(*kind, *state), **options)
        y = y.clone() if y._is_view() else y  # torch compiles anew for views: it is cheaper to have none
        return compiled[state](velocity, y, step.embedding, step.rate, step.tableau)

    return call


@cache
def _own_step(*kind: Any) -> Callable[..., Tensor]:
    """A step with a code object of its own for every kind of network, tableau and state.

    torch compiles one code object eight times, whichever network and tableau it is called with, and then runs it as it
    is with no more than a warning. One kind needs up to six: gradients wanted or not, recorded or not, one row or many.
    """
    return FunctionType(_step.__code__.replace(), _step.__globals__, _step.__name__)


def _step(
    velocity: Velocity, y: Tensor, embedding: tuple[Tensor, ...], rate: tuple[Tensor, ...], tableau: Tableau
) -> Tensor:
    return take(velocity, Step(tableau, embedding, rate), y)


def try_compiled(decode: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """Run a map and its gradient once, which is when torch compiles them."""
    with torch.no_grad():
        decode(z)
    with torch.enable_grad():
        z = z.clone().requires_grad_(True)
        torch.autograd.grad(decode(z).sum(), z)
