"""The leading eigenvectors of a covariance that is never made."""

import torch
from torch import Tensor

from ...data.moments import CHUNK

MOST_AXES = 256  # that are looked for unless told otherwise

# Below this ratio of smallest to largest scale, single precision can no longer tell the smallest axis from rounding.
COLLINEAR = 1e-5


def default_rank(rows: int, dim: int) -> int:
    """Number of leading axes by default: 256, or fewer for less than four rows or columns an axis."""
    return max(1, min(MOST_AXES, dim // 4, rows // 4))


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
