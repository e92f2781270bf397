"""The axes of a flow: mean, rotation and scales of the data."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Below this ratio of smallest to largest scale, single precision can no longer tell the smallest axis from rounding.
_COLLINEAR = 1e-5


class Basis(nn.Module):
    """The affine map between data ``x`` and standardised coordinates ``v = ((x - mu) / unit) W / s``.

    Args:
        mean: ``mu``, shape ``(D,)``.
        rotation: ``W``, orthonormal columns are the axes, shape ``(D, D)``.
        scale: ``s``, standard deviation along each axis, descending, shape ``(D,)``.
        unit: the unit in which each column is measured, shape ``(D,)``; ones by default.
    """

    mean: Tensor
    rotation: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, mean: Tensor, rotation: Tensor, scale: Tensor, unit: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        # One memory layout, that of a file: a product's last bits depend on it.
        self.register_buffer("rotation", rotation.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("unit", torch.ones_like(scale) if unit is None else unit)

    @classmethod
    def from_samples(cls, x: Tensor, *, own_units: bool = False) -> "Basis":
        """Eigenbasis of the sample covariance of ``x``, shape ``(N, D)``; computed in double precision.

        Args:
            x: the samples.
            own_units: measure each column in its own standard deviation, so that the axes are those of the correlation.
        """
        mean, columns = x.double().mean(0), x.double()
        unit = columns.std(0) if own_units else torch.ones_like(mean)
        covariance = torch.cov((columns / unit).T).reshape(len(mean), -1)
        basis = cls.from_moments(mean, covariance, x)
        return cls(basis.mean, basis.rotation, basis.scale, unit.to(x))

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, like: Tensor) -> "Basis":
        """Eigenbasis of a covariance, as tensors of the dtype and device of ``like``.

        Raises:
            ValueError: if the covariance is singular to working precision.
        """
        variance, rotation = torch.linalg.eigh(covariance)
        scale = variance.clamp(min=0).sqrt().flip(0)
        rotation = rotation.flip(1)
        # The sign of an eigenvector is arbitrary: fix it, so that two machines agree.
        largest = rotation.gather(0, rotation.abs().argmax(0, keepdim=True))
        rotation = rotation * torch.where(largest < 0, -1.0, 1.0)
        if not bool(scale[-1] > _COLLINEAR * scale[0]):
            axis = rotation[:, -1].abs()
            columns = torch.nonzero(axis > 0.1 * axis.max()).flatten().tolist()[:10]
            raise ValueError(
                f"expected columns that are linearly independent, but columns {columns} (among others) are collinear: "
                f"the data's smallest scale is {float(scale[-1] / scale[0]):.1e} of the largest (limit "
                f"{_COLLINEAR:.0e}). Drop redundant columns, bring columns of very unlike units to a "
                "common scale, or add a little noise"
            )
        return cls(mean.to(like), rotation.to(like), scale.to(like))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Basis":
        before = self.rotation.dtype
        super()._apply(fn, recurse)
        if self.rotation.dtype.itemsize > before.itemsize:
            # Columns that were orthonormal to single precision would limit the round trip in double precision.
            q, r = torch.linalg.qr(self.rotation)
            self.rotation = q * r.diagonal().sign()
        return self

    @property
    def dim(self) -> int:
        """Number of axes ``D``."""
        return len(self.scale)

    def to_standard(self, x: Tensor) -> Tensor:
        """``v = ((x - mu) / unit) W / s`` for ``x`` of shape ``(..., D)``."""
        return ((x - self.mean) / self.unit) @ self.rotation / self.scale

    def from_standard(self, v: Tensor) -> Tensor:
        """``x = mu + unit (s v) W^T`` for ``v`` of shape ``(..., D)``."""
        return self.mean + self.unit * ((v * self.scale) @ self.rotation.T)

    def log_det(self) -> Tensor:
        """``log|det dx/dv| = sum log s + sum log unit``, a scalar."""
        return self.scale.log().sum() + self.unit.log().sum()
