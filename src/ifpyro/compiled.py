"""A solver step compiled by torch, for one session."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ode import Step, Tableau, take
from .velocity import Velocity


def compile_step(velocity: Velocity, options: dict[str, Any]) -> Callable[[Step, Tensor], Tensor]:
    """:func:`~ifpyro.ode.take` of a velocity, compiled at its first call."""

    def plain(y: Tensor, embedding: tuple[Tensor, ...], rate: tuple[Tensor, ...], tableau: Tableau) -> Tensor:
        return take(velocity, Step(tableau, embedding, rate), y)

    compiled = torch.compile(plain, **{"dynamic": True, **options})

    def call(step: Step, y: Tensor) -> Tensor:
        return compiled(y, step.embedding, step.rate, step.tableau)

    return call


def try_compiled(decode: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """Run a map and its gradient once, which is when torch compiles them."""
    with torch.no_grad():
        decode(z)
    with torch.enable_grad():
        z = z.clone().requires_grad_(True)
        torch.autograd.grad(decode(z).sum(), z)
