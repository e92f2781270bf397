r"""The metric of Hamiltonian moves: a linear map ``q = S w`` to coordinates in which the target is round.

With momentum ``p ~ N(0, I)`` in the whitened coordinates ``w``, Hamilton's equations read

    dq/dt = S p,        dp/dt = S^T grad log pi(q),

which is the usual mass matrix ``M = (S S^T)^{-1}``. ``S`` is a vector (per-axis scale) or a lower-triangular
matrix.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """The map ``q = S w``."""

    scale: Tensor
    """``S``: shape ``(dim,)`` for a diagonal metric, ``(dim, dim)`` lower-triangular for a dense one, and
    ``(groups, dim, dim)`` where equal runs of consecutive rows have metrics of their own."""

    def push(self, w: Tensor) -> Tensor:
        """``S w`` for rows ``w`` of shape ``(n, dim)``: a velocity in ``q``."""
        return w * self.scale if self.scale.ndim == 1 else self._by_group(w, lambda x, s: x @ s.mT)

    def pull(self, gradient: Tensor) -> Tensor:
        """``S^T g`` for rows ``g`` of shape ``(n, dim)``: a gradient in ``w``."""
        return gradient * self.scale if self.scale.ndim == 1 else self._by_group(gradient, lambda x, s: x @ s)

    def whiten(self, q: Tensor) -> Tensor:
        """``S^{-1} q`` for rows ``q`` of shape ``(n, dim)``."""
        if self.scale.ndim == 1:
            return q / self.scale
        return self._by_group(q, lambda x, s: torch.linalg.solve_triangular(s, x.mT, upper=False).mT)

    def _by_group(self, rows: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if self.scale.ndim == 2:
            return apply(rows, self.scale)
        return apply(rows.reshape(len(self.scale), -1, rows.shape[-1]), self.scale).reshape(rows.shape)


def metric_from_draws(q: Tensor, weight: Tensor | None = None, *, dense: bool | None = None) -> Metric:
    """The metric that whitens weighted draws, regularised towards its diagonal.

    Args:
        q: draws, ``(n, dim)``.
        weight: non-negative weights, ``(n,)``; equal if left out.
        dense: a full covariance or only its diagonal; by default full when the draws can carry it, that is
            when their effective number is at least ``2 dim``.
    """
    num, dim = q.shape
    weight = torch.full_like(q[:, 0], 1.0 / num) if weight is None else weight / weight.sum()
    effective = float(1.0 / weight.square().sum())
    centred = q - weight @ q
    variance = weight @ centred.square()
    # An axis on which all draws agree (resampled copies) would freeze; hold a floor relative to the other
    # axes.
    floor = 1e-6 * variance.max().clamp_min(1e-12)
    variance = variance.clamp_min(floor)
    if dense is None:
        dense = dim > 1 and effective >= 2 * dim
    if not dense:
        return Metric(variance.sqrt())
    # The draws' covariance has noise of relative size sqrt(dim / effective): pull it towards its diagonal.
    keep = effective / (effective + dim)
    covariance = keep * (centred * weight[:, None]).T @ centred
    covariance.diagonal().copy_(variance * (1.0 + 1e-6))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return Metric(variance.sqrt()) if bool(failed) else Metric(factor)


def grouped_metric(draws: Sequence[Tensor], *, dense: bool | None = None) -> Metric:
    """One metric for each of several groups of draws, ``(n, dim)`` each; see `metric_from_draws`."""
    return _stack([metric_from_draws(q, dense=dense) for q in draws])


def cross_fitted_metric(q: Tensor, weight: Tensor, groups: int, families: int = 1) -> Metric:
    """For each group of consecutive draws the metric that whitens *the others*.

    Draws moved under a metric that was fitted to themselves move too little where they happen to lie close
    together: the metric learns their luck, and SMC then underestimates the evidence in every island alike (by
    2.3 nats at 512 particles in 64 dimensions with a dense metric; the effect falls as one over their
    number). A metric from the other islands is, to each island, a fixed one.

    Args:
        q: draws, ``(n, dim)``, ``n`` a multiple of ``groups``.
        weight: non-negative weights, ``(n,)``.
        groups: how many groups, at least 2 in each family.
        families: equal runs of groups with different targets: the others are those of the same family.
    """
    each, size = groups // families, len(q) // groups
    others = [torch.arange(each * size, device=q.device) // size != group for group in range(each)]
    pairs = list(zip(q.chunk(families), weight.chunk(families), strict=True))
    return _stack([metric_from_draws(draws[rows], mass[rows]) for draws, mass in pairs for rows in others])


def _stack(metrics: Sequence[Metric]) -> Metric:
    return Metric(torch.stack([m.scale if m.scale.ndim == 2 else m.scale.diag() for m in metrics]))
