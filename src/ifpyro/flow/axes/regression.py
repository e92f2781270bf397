r"""Ridge regression of data on the features of their conditions, with the residuals that new rows would have.

With centred features ``F = U S V^T`` and centred data ``X``, the fit at penalty ``lambda`` is ``U S^2/(S^2 + lambda)
U^T X``, its leverages are ``h_i = 1/N + sum_k U_ik^2 S_k^2/(S_k^2 + lambda)``, and leaving row ``i`` out gives the
residual

.. math:: r_i / (1 - h_i)

(Allen 1974). The penalty is the one whose left-out residuals have the least mean square; none at all, that is, a
coefficient of zero, is among those tried. The left-out residuals, not the fitted ones, say how wide a condition's data
are where there are few rows for many features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PENALTIES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0, torch.inf)
"""Tried penalties, in mean squares of the features' principal components."""

TRIED_ON = 4096
"""Rows on which penalties are compared."""


class Regression(NamedTuple):
    """A linear fit, ``x ~ intercept + f B``."""

    intercept: Tensor
    """``(D,)``"""
    coefficient: Tensor
    """``B``, ``(p, D)``"""
    residuals: Tensor
    """Of every row, had it been left out, ``(N, D)``."""
    penalty: float


def ridge(features: Tensor, x: Tensor) -> Regression:
    """Regress ``x`` of shape ``(N, D)`` on ``features`` of shape ``(N, p)``; computed in double precision."""
    f, columns = features.double(), x.double()
    centre, mean = f.mean(0), columns.mean(0)
    centred = columns - mean
    u, s, vh = torch.linalg.svd(f - centre, full_matrices=False)
    keep = s > 1e-10 * s.max().clamp(min=1e-300)
    u, s, vh = u[:, keep], s[keep], vh[keep]
    scores = u.T @ centred
    some = torch.linspace(0, len(x) - 1, min(len(x), TRIED_ON), device=x.device).long()
    weight = 1 / centred.square().mean(0).clamp(min=1e-300)
    losses = [
        float((_left_out(u[some], scores, centred[some], _share(s, penalty, len(x)), len(x)).square() * weight).mean())
        for penalty in PENALTIES
    ]
    penalty = PENALTIES[min(range(len(losses)), key=losses.__getitem__)]
    share = _share(s, penalty, len(x))
    coefficient = vh.T @ ((share / s).unsqueeze(-1) * scores)
    residuals = _left_out(u, scores, centred, share, len(x))
    return Regression((mean - centre @ coefficient).to(x), coefficient.to(x), residuals.to(x), penalty)


def _share(s: Tensor, penalty: float, rows: int) -> Tensor:
    return s.square() / (s.square() + penalty * rows)


def _left_out(u: Tensor, scores: Tensor, centred: Tensor, share: Tensor, rows: int) -> Tensor:
    leverage = 1 / rows + (u.square() * share).sum(-1, keepdim=True)
    return (centred - u @ (share.unsqueeze(-1) * scores)) / (1 - leverage).clamp(min=1e-3)
