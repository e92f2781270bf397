r"""How weights descend: AdamW, and for hidden matrices momentum made orthogonal.

A gradient of a hidden layer's weights is dominated by a few directions; steps along it leave the others, which carry
fine structure, almost where they were. With the singular value decomposition ``M = U S V^T`` of a matrix's momentum
the step is instead along ``U V^T``, all of whose directions are as long (Jordan et al. 2024, "Muon"). ``U V^T`` comes
without a decomposition, from a few iterations of an odd polynomial which moves all singular values towards one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .recipe import Recipe

LARGEST = 128
"""Rows of the largest matrix whose step is made orthogonal: beyond, that would cost more than the gradient."""

_MOMENTUM = 0.95
_ITERATIONS = 3
_TINY = 1e-12  # a gradient of zero stays zero
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # steepest at zero, where singular values are brought to 0.7 to 1.2 (ibid.)


def make_optimisers(network: nn.Module, recipe: Recipe) -> list[Optimizer]:
    """What descends each parameter; every group's ``peak`` is the largest rate it should get."""
    hidden = [p for p in network.parameters() if recipe.matrix_rate and _is_hidden_matrix(p)]
    chosen = {id(p) for p in hidden}
    others = [p for p in network.parameters() if id(p) not in chosen]
    optimisers: list[Optimizer] = [
        AdamW(
            [{"params": others, "peak": recipe.rate}], betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
        )
    ]
    return [*optimisers, OrthogonalMomentum(hidden, recipe.matrix_rate, recipe.weight_decay)] if hidden else optimisers


def _is_hidden_matrix(p: Tensor) -> bool:
    """Square: between two hidden layers. Inlets, outlets and what handles time are not."""
    return p.ndim == 2 and 1 < p.shape[0] == p.shape[1] <= LARGEST


class OrthogonalMomentum(Optimizer):
    """Steps ``W <- (1 - lr * weight_decay) W - lr U V^T`` of square matrices.

    Args:
        parameters: square matrices.
        rate: the length of a step along every singular direction.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(self, parameters: Iterable[Tensor], rate: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "peak": rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all matrices; those of one size are made orthogonal together."""
        for group in self.param_groups:
            sizes: dict[int, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    sizes.setdefault(len(p), []).append((p, p.grad))
            for pairs in sizes.values():
                matrices, gradients = map(list, zip(*pairs, strict=True))
                states = [self.state[p] for p in matrices]
                for state, gradient in zip(states, gradients, strict=True):
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(gradient)
                momenta = [state["momentum"] for state in states]
                torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
                ahead = torch.stack(torch._foreach_lerp(gradients, momenta, _MOMENTUM))  # as Nesterov looks
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, orthogonal(ahead).unbind(), alpha=-group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """``U V^T`` of every matrix in ``x`` of shape ``(k, n, n)``, up to singular values between 0.7 and 1.2."""
    a, b, c = _POLYNOMIAL
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + _TINY)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x
