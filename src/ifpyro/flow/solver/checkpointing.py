"""Gradients that remember one state a step instead of every activation (gradient checkpointing).

Griewank & Walther, Algorithm 799: revolve (2000), with the solver's steps as segments, and the evaluations of a step of
the map as segments of those. The backward pass runs each of them again, so that the activations of one are ever held.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.precision import full_precision
from .steps import is_wrapped


def recompute(function: Callable[[Tensor], Any], y: Tensor) -> Any:
    """``function(y)``, a tensor or a tuple of them, whose gradient runs the function again.

    The gradient is that of ``function``, of any order, and the call may stand inside torch.func's ``grad``, ``vjp``
    and ``vmap`` (not ``jvp``). Gradients reach ``y`` alone, not what the function closes over.
    """
    return _Recomputed.apply(function, y)


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[[Tensor], Any], y: Tensor) -> Any:
        return function(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, y = inputs
        ctx.save_for_backward(y)

    @staticmethod
    @full_precision()  # as in the pass that is run again
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (y,) = ctx.saved_tensors
        if not torch.is_grad_enabled() and not any(is_wrapped(v) for v in (y, *gradients)):
            # Nobody differentiates again: buffers are freed on the way back, which torch.func's product keeps.
            with torch.enable_grad():
                leaf = y.detach().requires_grad_(True)
                value = ctx.function(leaf)
            outputs = value if isinstance(value, tuple) else (value,)
            pairs = [(v, g) for v, g in zip(outputs, gradients, strict=True) if v.requires_grad]
            if not pairs:
                return None, torch.zeros_like(y)
            values, cotangents = zip(*pairs, strict=True)
            return None, torch.autograd.grad(values, leaf, cotangents)[0]
        value, pull_back = torch.func.vjp(ctx.function, y)  # type: ignore[misc]
        return None, pull_back(gradients if isinstance(value, tuple) else gradients[0])[0]
