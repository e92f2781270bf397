"""Sums of products of probabilities, on their logarithms: what opt_einsum needs of a backend, also inside ``vmap``.

Pyro has such a backend of its own, whose logarithm torch cannot run in a batch.
"""

from typing import Any

import torch
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import LogRing as PyroRing
from torch import Tensor

__all__ = ["einsum", "tensordot", "transpose"]


class LogRing(PyroRing):
    """Pyro's ring of logarithms on this backend."""

    _backend = __name__


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Logarithm of the sum of products of the exponentials of ``operands``."""
    left, output = equation.split("->")
    letters = {symbol: chr(97 + k) for k, symbol in enumerate(sorted(set(left + output) - {","}))}
    shifts, scaled = [], []
    for dims, operand in zip(left.split(","), operands, strict=True):
        summed = [k for k, symbol in enumerate(dims) if symbol not in output]
        top = operand.detach()
        if summed:
            top = top.amax(summed, keepdim=True)
        top = top.clamp(min=torch.finfo(top.dtype).min)  # nothing but impossible: -inf - -inf would be nan
        scaled.append((operand - top).exp())
        shifts.append(_spread(top.squeeze(summed) if summed else top, [s for s in dims if s in output], output))
    plain = ",".join("".join(letters[s] for s in dims) for dims in left.split(","))
    total = torch.einsum(f"{plain}->{''.join(letters[s] for s in output)}", *scaled)
    return sum(shifts, _Log.apply(total))


def transpose(a: Tensor, axes: Any) -> Tensor:
    """Axes in another order."""
    return a.permute(axes)


tensordot = Tensordot(einsum)


def _spread(value: Tensor, dims: list[str], output: str) -> Tensor:
    """A tensor of some of the output's axes, in the output's order and with ones for those it lacks."""
    ordered = value.permute([dims.index(s) for s in output if s in dims])
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if s in dims else 1 for s in output])


class _Log(torch.autograd.Function):
    """A logarithm whose gradient at zero is large and finite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / x.clamp(min=torch.finfo(x.dtype).eps)
