r"""The leading eigenvectors of a covariance that is never made, and their completion to a basis that is never stored.

With the leading axes ``W_1`` of shape ``(D, r)``, signs ``S`` and the first ``r`` columns ``E`` of the identity,

.. math:: Q = I - M G M^T, \qquad M = W_1 S - E, \qquad G = (I - S W_{1,1:r}^T)^{-1}

is orthogonal and its first ``r`` columns are ``W_1 S``: a product of ``r`` reflections in compact form (Ballard et al.
2015, "Reconstructing Householder vectors from TSQR", for the signs). It costs ``4 D r`` operations a row.
"""

import torch
from torch import Tensor, nn

from ...data.moments import CHUNK

MOST_AXES = 256  # that are looked for unless told otherwise

# Below this ratio of smallest to largest scale, single precision can no longer tell the smallest axis from rounding.
COLLINEAR = 1e-5


def default_rank(rows: int, dim: int) -> int:
    """Most leading axes that are looked for by default: 256, or fewer for less than four rows or columns an axis."""
    return max(1, min(MOST_AXES, dim // 4, rows // 4))


def predictive_rank(x: Tensor, mean: Tensor, unit: Tensor, most: int, *, seed: int = 0) -> int:
    """The number of leading axes, at most ``most``, with which four fifths of the samples predict the others best.

    Variances along sample eigenvectors are too large where rows are few: an axis that the others do not confirm costs
    likelihood on every new row. All numbers of axes are tried, for the price of one search for ``most`` axes.

    Args:
        x: samples, ``(N, D)``.
        mean: of the columns, ``(D,)``.
        unit: of the columns, ``(D,)``.
        most: the most axes.
        seed: of the choice of rows.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held_out = max(1, min(len(x) // 5, CHUNK))
    fitted, dim = x[order[held_out:]], x.shape[1]
    axes, variance = leading_axes(fitted, mean, unit, most, seed=seed)
    white = ((x[order[:held_out]] - mean.to(x)) / unit.to(x)).double()
    total = (((fitted - mean.to(x)) / unit.to(x)).square().sum(0, dtype=torch.double) / (len(fitted) - 1)).sum()
    zero = variance.new_zeros(1)
    explained, logs = (torch.cat([zero, v.clamp_min(1e-300).cumsum(0)]) for v in (variance, variance.log()))
    squares = (white @ axes).square().mean(0)  # of the held-out rows, along every axis
    ratios, found = (torch.cat([zero, v.cumsum(0)]) for v in (squares / variance.clamp_min(1e-300), squares))
    rest = dim - torch.arange(most + 1, device=variance.device)
    level = ((total - explained) / rest).clamp_min(1e-12 * float(total) / dim)
    surprise = logs + ratios + rest * level.log() + (white.square().sum(1).mean() - found) / level
    return max(1, int(surprise.argmin()))


def leading_axes(
    x: Tensor, mean: Tensor, unit: Tensor, rank: int, *, seed: int = 0, sweeps: int = 3
) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the largest variances of ``(x - mean) / unit``, and these variances.

    Subspace iteration from a random start (Halko et al. 2011, algorithm 4.4), chunk by chunk: time and memory are
    linear in ``N`` and in ``D``.

    Args:
        x: samples, ``(N, D)``.
        mean: of the columns, ``(D,)``.
        unit: of the columns, ``(D,)``.
        rank: number ``r`` of eigenvectors.
        seed: of the random start.
        sweeps: iterations.

    Returns:
        The axes ``(D, r)`` and variances ``(r,)``, descending, in double precision.
    """
    rows, dim = x.shape
    centre, inverse = mean.to(x), (1 / unit).to(x)

    def times_covariance(q: Tensor) -> tuple[Tensor, Tensor]:
        """``Sigma q`` and ``q^T Sigma q``, times ``N - 1``."""
        moved, inner = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[1]).to(q.double())
        for part in x.split(CHUNK):
            white = (part - centre) * inverse
            scores = white @ q
            moved += white.T @ scores
            inner += scores.double().T @ scores.double()
        return moved, inner

    generator = torch.Generator().manual_seed(seed)
    columns = min(dim, rank + 16)  # a few more than asked for: the last ones converge slowly
    q = torch.randn(dim, columns, generator=generator, dtype=torch.double).to(x)
    for _ in range(sweeps):
        q = torch.linalg.qr(times_covariance(q)[0].double())[0].to(x)
    variance, turn = torch.linalg.eigh(times_covariance(q)[1] / (rows - 1))
    axes = orthonormal(q.double() @ turn.flip(1)[:, :rank])
    return axes * signs(axes), variance.flip(0)[:rank].clamp(min=0)


def orthonormal(axes: Tensor) -> Tensor:
    """The orthonormal columns nearest to nearly orthonormal ones, one after the other."""
    q, r = torch.linalg.qr(axes)
    return q * r.diagonal().sign()


def signs(axes: Tensor) -> Tensor:
    """The sign of an eigenvector is arbitrary: its largest entry is made positive, so that two machines agree."""
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(axes)


class Completion(nn.Module):
    """``Q`` with the signs ``S`` taken back: a square matrix whose first columns are the axes.

    Args:
        axes: ``W_1``, orthonormal columns, ``(D, r)`` with ``0 < r < D``.
    """

    mirror: Tensor
    core: Tensor
    sign: Tensor

    def __init__(self, axes: Tensor) -> None:
        super().__init__()
        exact, r = axes.detach().double().cpu(), axes.shape[1]
        sign = torch.geqrf(exact)[0].diagonal().sign()
        mirror = exact * sign
        core = torch.linalg.inv(torch.eye(r, dtype=torch.double) - mirror[:r].T)
        mirror[:r] -= torch.eye(r, dtype=torch.double)
        sign = torch.cat([sign, sign.new_ones(len(axes) - r)])
        for name, value in (("mirror", mirror), ("core", core), ("sign", sign)):
            self.register_buffer(name, value.to(axes), persistent=False)

    def rotate(self, u: Tensor) -> Tensor:
        """``u Q S`` for ``u`` of shape ``(..., D)``."""
        return (u - ((u @ self.mirror) @ self.core) @ self.mirror.T) * self.sign

    def rotate_back(self, a: Tensor) -> Tensor:
        """``a (Q S)^T`` for ``a`` of shape ``(..., D)``."""
        a = a * self.sign
        return a - ((a @ self.mirror) @ self.core.T) @ self.mirror.T
