r"""What the first ``k`` latents keep of the data: the measured price of a :class:`~ifpyro.flow.decoder.Decoder`.

A decoder keeps ``k`` latents and sets the others to their mean, zero: a manifold of ``k`` dimensions in the space of
the data. What it loses is the share of the variance of held-out data

.. math:: e_k = \frac{\sum_i \| x_i - T(z_{i,1..k}, 0) \|^2}{\sum_i \| x_i - \mu \|^2}

that it does not reconstruct, ``mu`` being the mean of the training data; ``e`` of the first ``k`` principal components
of the training data stands beside it. Distances are Euclidean in the space of the data; where a flow measures columns
in their own units, so does the distance.

An axis that inflates late is generated first, from noise, and those that inflate earlier are generated given it. With
``details_first`` the leading latents therefore carry what the leading axes hold, and more of the rest than a linear
projection. In the paper's reducing order it is the compressed axes that come first, and a kept latent says what is left
to say given *them*.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .axes.basis import PCA_UP_TO
from .axes.low_rank import default_rank, leading_axes
from .flow import InflationaryFlow

_ROWS = 1024
_FEWEST = 32


def measure(flow: InflationaryFlow, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """What is lost when only the first ``k`` latents, or principal components, of held-out data are kept.

    Args:
        flow: the flow.
        train: the data it was trained on, ``(N, *event_shape)``: they give the mean and the principal components.
        held_out: other data; at most the first 1024 rows are used, fewer in more than 128 dimensions.

    Returns:
        Plain data: ``k``, the powers of two up to the number of principal axes (256 beyond 1,024 columns), and that
        where it is all; ``error`` and ``pca``, the shares ``e_k`` of the flow and of principal components;
        ``error_se``, the standard error over rows; and the ``rows``.
    """
    dim = flow.latent_dim
    most = min(flow.basis.principal, dim if dim <= PCA_UP_TO else default_rank(len(train), dim))
    ks = [2**i for i in range(dim.bit_length()) if 2**i < dim and 2**i <= most]
    ks += [dim] if most == dim else []
    rows = max(_FEWEST, min(_ROWS, _ROWS * 128**2 // dim**2))
    ours, theirs, total = lost(flow, train, held_out[:rows], ks)
    error = ours.mean(-1) / total.mean()
    spread = (ours - error.unsqueeze(-1) * total).square().mean(-1).sqrt()
    return {
        "k": ks,
        "error": error.tolist(),
        "error_se": (spread / (total.mean() * len(total) ** 0.5)).tolist(),
        "pca": (theirs.mean(-1) / total.mean()).tolist(),
        "rows": len(total),
    }


def lost(flow: InflationaryFlow, train: Tensor, x: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of data to what is left of them, row by row.

    Args:
        flow: the flow.
        train: the data it was trained on, ``(N, *event_shape)``.
        x: data, ``(rows, *event_shape)``.
        ks: numbers of latents.

    Returns:
        Distances to the flow's reconstruction from ``k`` latents, ``(len(ks), rows)``; to the principal components',
        of the same shape; and to the mean, ``(rows,)``.
    """
    columns = train.flatten(1).double()
    own_units = bool((flow.basis.unit != 1).any())
    unit = columns.std(0) if own_units else torch.ones_like(columns[0])
    mean = columns.mean(0)
    axes = _principal_axes((columns - mean) / unit, max(ks))
    rows = x.flatten(1).double()
    with torch.no_grad():
        z = flow.encode(x)
        left = torch.stack([flow.decoder(k)(z[:, :k]).flatten(1).double() for k in ks])
    centred = (rows - mean) / unit
    total = centred.square().sum(-1)
    scores = (centred @ axes).square()
    theirs = torch.stack([total - scores[:, :k].sum(-1) for k in ks])
    return ((left - rows) / unit).square().sum(-1), theirs, total


def _principal_axes(centred: Tensor, count: int) -> Tensor:
    """Eigenvectors of the covariance, leading first, ``(D, r)``: all of them, or ``count`` where that is too many."""
    dim = centred.shape[1]
    if dim > PCA_UP_TO:
        return leading_axes(centred, torch.zeros_like(centred[0]), torch.ones_like(centred[0]), count)[0]
    return torch.linalg.eigh(torch.cov(centred.T).reshape(centred.shape[1], -1))[1].flip(1)
