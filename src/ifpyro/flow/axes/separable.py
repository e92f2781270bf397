r"""Axes of images and other arrays: a principal component analysis along each dimension of the event.

For events of shape ``(n_1, ..., n_m)``, such as images ``(C, H, W)``, with one orthogonal matrix for each dimension,

.. math:: W = (U_1 \otimes U_2 \otimes \dots \otimes U_m) P, \qquad
          U_k^T \Big( \frac{1}{N} \sum_i X_{i(k)} X_{i(k)}^T \Big) U_k = \text{diagonal},

where :math:`X_{i(k)}` of shape ``(n_k, D / n_k)`` is the centred event ``i`` unfolded along dimension ``k``, and ``P``
puts the axes in the order of their variances. These are the axes of multilinear principal component analysis with no
axis dropped (Lu, Plataniotis & Venetsanopoulos 2008), which are those of the higher-order singular value decomposition
(De Lathauwer et al. 2000). Where the covariance is a Kronecker product they are its eigenvectors; for stationary images
they are near to the two-dimensional cosine transform, and the axes are nearly uncorrelated.

A rotation costs ``D (n_1 + ... + n_m)`` operations a row instead of ``D^2``, and the matrices take
``n_1^2 + ... + n_m^2`` numbers. To find them takes time and memory linear in ``N`` and in ``D``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .low_rank import COLLINEAR, orthonormal, signs

LONGEST = 4096  # dimension along which a square matrix is made
_ENTRIES = 2**22  # of a chunk


class SeparableAxes(nn.Module):
    """The orthogonal matrix ``W = (U_1 x U_2 x ... x U_m) P``; see the module's docstring.

    Args:
        factors: ``U_k``, shape ``(n_k, n_k)`` each.
        order: ``P``: which column of the Kronecker product axis ``j`` is, shape ``(D,)``.
    """

    order: Tensor
    _place: Tensor

    def __init__(self, factors: Sequence[Tensor], order: Tensor) -> None:
        super().__init__()
        self.event_shape = torch.Size(len(factor) for factor in factors)
        for k, factor in enumerate(factors):
            self.register_buffer(f"factor_{k}", factor.contiguous())
        self.register_buffer("order", order)
        self.register_buffer("_place", order.argsort(), persistent=False)

    @property
    def factors(self) -> list[Tensor]:
        """``U_k`` of every dimension."""
        return [self.get_buffer(f"factor_{k}") for k in range(len(self.event_shape))]

    def rotate(self, u: Tensor) -> Tensor:
        """``u W`` for ``u`` of shape ``(..., D)``."""
        return self._along_each(u, [factor.T for factor in self.factors]).index_select(-1, self.order)

    def rotate_back(self, a: Tensor) -> Tensor:
        """``a W^T`` for ``a`` of shape ``(..., D)``."""
        return self._along_each(a.index_select(-1, self._place), self.factors)

    def _along_each(self, u: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Every dimension of the event multiplied from the left by its matrix."""
        shape, before, after = u.shape, u.shape[:-1].numel(), u.shape[-1]
        for matrix in matrices:
            size = len(matrix)
            after //= size
            u = matrix @ u.reshape(before, size, after) if after > 1 else u.reshape(before, size) @ matrix.T
            before *= size
        return u.reshape(shape)

    def _apply(self, fn: Any, recurse: bool = True) -> "SeparableAxes":
        before = self.factors[0].dtype
        super()._apply(fn, recurse)
        if self.factors[0].dtype.itemsize > before.itemsize:
            # Columns that were orthonormal to single precision would limit the round trip in double precision.
            for k, factor in enumerate(self.factors):
                self.register_buffer(f"factor_{k}", orthonormal(factor))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._place = self.order.argsort()

    def extra_repr(self) -> str:
        """Shape of the events."""
        return f"event_shape={tuple(self.event_shape)}"


def fits(event_shape: Sequence[int]) -> bool:
    """Whether events of a shape can have separable axes."""
    return len(event_shape) >= 2 and max(event_shape) <= LONGEST


def separable_axes(x: Tensor, mean: Tensor, unit: Tensor, event_shape: Sequence[int]) -> tuple[SeparableAxes, Tensor]:
    """Separable axes of ``(x - mean) / unit``, and the exact standard deviation along each, descending.

    Two passes over the rows, chunk by chunk.

    Args:
        x: samples, ``(N, D)``, flattened events.
        mean: of the columns, ``(D,)``.
        unit: of the columns, ``(D,)``.
        event_shape: of an event, ``D`` entries in at least two dimensions.

    Raises:
        ValueError: if events are vectors or too long, or entries are combinations of others.
    """
    shape = torch.Size(event_shape)
    if not fits(shape) or shape.numel() != x.shape[1]:
        raise ValueError(
            "basis 'separable' expects events of at least two dimensions, such as images (C, H, W), none longer than "
            f"{LONGEST}, got {x.shape[1]} columns of events {tuple(shape)}; use 'pca', 'low_rank' or 'identity'"
        )
    mean, unit = mean.to(x).double(), unit.to(x).double()
    parts = x.split(max(1, _ENTRIES // x.shape[1]))
    covariances = [torch.zeros(n, n, dtype=torch.double, device=x.device) for n in shape]
    for part in parts:
        centred = ((part.double() - mean) / unit).reshape(-1, *shape)
        for k, covariance in enumerate(covariances):
            unfolded = centred.movedim(k + 1, 0).flatten(1)
            covariance.addmm_(unfolded, unfolded.T)
    factors = [torch.linalg.eigh(covariance)[1].flip(1) for covariance in covariances]
    factors = [factor * signs(factor) for factor in factors]
    unordered = SeparableAxes(factors, torch.arange(x.shape[1], device=x.device))
    squares = sum((unordered.rotate((part.double() - mean) / unit).square().sum(0) for part in parts), 0 * mean)
    scale, order = (squares / (len(x) - 1)).sqrt().sort(descending=True, stable=True)
    if not bool(scale[-1] > COLLINEAR * scale[0]):
        raise ValueError(
            f"basis 'separable' expects variance along all its {math.prod(shape)} axes, but some entries of an event "
            f"are combinations of others: the smallest scale is {float(scale[-1] / scale[0]):.1e} of the largest "
            f"(limit {COLLINEAR:.0e}). Drop entries that repeat others, or add a little noise"
        )
    return SeparableAxes([factor.to(x) for factor in factors], order), scale.to(x)
