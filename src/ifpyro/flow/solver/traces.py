r"""Log-densities of many axes, by stochastic traces of the velocity's Jacobian.

Beyond a hundred axes or so the exact Jacobian of every step is too dear. The log-determinant is then the quadrature of
the divergence (Grathwohl et al. 2019, eq. 8), at every evaluation of the velocity a trace, each estimated from products
of the Jacobian ``A`` with ``p`` vectors:

``hutchinson``  ``g^T A g`` averaged over sign vectors ``g`` (Hutchinson 1990)
``hutch++``     the trace on a subspace ``Q`` that holds the largest part of ``A``, exactly, and Hutchinson on the rest:
                ``tr(Q^T A Q) + g^T (I - QQ^T) A (I - QQ^T) g``, ``Q`` from a third of the products (Meyer et al. 2021)

Every evaluation has vectors of its own. Their errors are then independent and partly cancel in the sum, which makes the
estimate several times better than one set of vectors for the whole path. Given ``Q``, every vector is an unbiased
estimate of the same sum, so their spread tells the standard error.

What is estimated is the quadrature, which differs from the log-determinant of the discrete map by the order of the
solver: where the solver is fine enough for the positions, far less than the standard error.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..networks.velocity import Velocity
from .steps import Step, Trace

EXACT_UP_TO = 128  # axes; beyond, one Jacobian an evaluation costs more than a trained flow's own accuracy is worth
PROBES = 8  # of `log_prob` beyond that


def fixed_probes(step: Step, index: int, y: Tensor) -> Tensor:
    """Signs for the stages of the step number ``index``, ``(stages, p, 1, D)``: the same for every row and call.

    A log-density with them is a fixed function, as an accept step needs.
    """
    generator = torch.Generator(y.device).manual_seed(index)
    return signs((step.tableau.stages, PROBES, 1, y.shape[-1]), generator, y)


def hutchinson(velocity: Velocity, probes: Callable[[int, Tensor], Tensor]) -> Trace:
    """A trace by Hutchinson's estimate; ``probes(stage, y)`` are the vectors, ``(p, n, D)``."""

    def trace(stage: int, y: Tensor, embedding: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        g = probes(stage, y)
        value, products = velocity.with_products(y, embedding, g)
        return value, (g * rate * products).sum(-1)

    return trace


def hutch_plus_plus(velocity: Velocity, probes: Callable[[int, Tensor], Tensor]) -> Trace:
    """A trace by Hutch++; half of the vectors sketch ``Q``, the other half are projected: ``p/2`` estimates."""

    def trace(stage: int, y: Tensor, embedding: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        sketch, g = probes(stage, y).chunk(2)
        value, products = velocity.with_products(y, embedding, sketch)
        q = torch.linalg.qr((rate * products).permute(1, 2, 0))[0]  # (n, D, k)
        columns = q.permute(2, 0, 1)
        rest = g - torch.einsum("ndk,pnk->pnd", q, torch.einsum("ndk,pnd->pnk", q, g))
        products = velocity.with_products(y, embedding, torch.cat([columns, rest]))[1]
        on_q, on_rest = (torch.cat([columns, rest]) * rate * products).sum(-1).split([len(columns), len(rest)])
        return value, on_q.sum(0) + on_rest

    return trace


METHODS = {"hutchinson": hutchinson, "hutch++": hutch_plus_plus}
"""Estimates of a trace by name."""


def trace_maker(method: str, probes: int, dim: int, generator: torch.Generator) -> Callable[[Velocity], Trace]:
    """An estimate of traces with fresh vectors at every evaluation, for any velocity.

    Args:
        method: a name in `METHODS`.
        probes: products of the Jacobian at every evaluation.
        dim: number of axes.
        generator: of the vectors.

    Raises:
        ValueError: on an unknown method, or too few probes to have a spread.
    """
    if method not in METHODS:
        raise ValueError(f"method expects one of {sorted(METHODS)}, got {method!r}")
    plus = method == "hutch++"
    least = 6 if plus else 2
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < least:
        raise ValueError(f"probes expects an integer >= {least} for {method!r} (one has no spread), got {probes!r}")
    # The products with Q itself are the third third. Q need not span everything, but a spread takes two estimates.
    vectors = max(4, min(2 * (probes // 3), 2 * (dim - 1))) if plus else probes

    def fresh(_: int, y: Tensor) -> Tensor:
        return signs((vectors, *y.shape), generator, y)

    return lambda velocity: METHODS[method](velocity, fresh)


def signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Random signs, with the dtype and device of a tensor."""
    return (2.0 * torch.randint(0, 2, shape, generator=generator, device=like.device) - 1.0).to(like.dtype)
