r"""The axes of a flow: mean, rotation and scales of the data.

Four kinds, by how many of the ``D`` axes are principal ones, ``r``, that is, have a scale of their own:

==============  =========  ==========================================================================================
kind            ``r``      axes
==============  =========  ==========================================================================================
``pca``         ``D``      all eigenvectors of the covariance
``separable``   ``D``      of images and other arrays: products of eigenvectors along each dimension, nearly principal
                           (:mod:`ifpyro.flow.axes.separable`)
``low_rank``    ``< D``    ``r`` leading eigenvectors; any orthonormal complement (:mod:`ifpyro.flow.axes.completion`),
                           on which one standard deviation is shared by all axes (probabilistic PCA; Tipping & Bishop
                           1999)
``identity``    0          the columns as they are, one standard deviation for all (as in Karras et al. 2022)
==============  =========  ==========================================================================================
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data.moments import mean_and_sd
from .low_rank import COLLINEAR, Completion, default_rank, leading_axes, orthonormal, predictive_rank, signs
from .separable import SeparableAxes, fits, separable_axes

KINDS = ("auto", "pca", "separable", "low_rank", "identity")
PCA_UP_TO = 1024  # columns for which "auto" takes all eigenvectors
PCA_AT_MOST = 4096  # columns for which a D x D matrix is made at all
LOW_RANK_UP_TO = 16_384  # columns of vectors for which "auto" takes leading eigenvectors


class Basis(nn.Module):
    """The affine map between data ``x`` and standardised coordinates ``v = ((x - mu) / unit) W / s``.

    Args:
        mean: ``mu``, shape ``(D,)``.
        rotation: the principal axes as orthonormal columns, shape ``(D, r)``; ``r = D`` is ``W`` itself, fewer are
            completed to it, none leaves the columns as they are. Or separable axes, which are ``W`` too.
        scale: ``s``, standard deviation along each axis, principal axes first and descending, shape ``(D,)``.
        unit: the unit in which each column is measured, shape ``(D,)``; ones by default.

    Example:
        >>> basis = ifpyro.Basis.choose(flow.sample(1000, seed=0))
        >>> basis.kind, basis.dim, basis.principal
        ('pca', 2, 2)
    """

    mean: Tensor
    rotation: Tensor | SeparableAxes
    scale: Tensor
    unit: Tensor
    _completion: Completion | None

    def __init__(self, mean: Tensor, rotation: Tensor | SeparableAxes, scale: Tensor, unit: Tensor | None = None):
        super().__init__()
        self.register_buffer("mean", mean)
        if isinstance(rotation, SeparableAxes):
            self.rotation = rotation
        else:
            # One memory layout, that of a file: a product's last bits depend on it.
            self.register_buffer("rotation", rotation.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("unit", torch.ones_like(scale) if unit is None else unit)
        self._complete()

    @classmethod
    def choose(
        cls,
        x: Tensor,
        kind: str = "auto",
        *,
        own_units: bool = False,
        rank: int | None = None,
        seed: int = 0,
        event_shape: Sequence[int] | None = None,
    ) -> "Basis":
        """The basis of a kind for samples ``x`` of shape ``(N, D)``.

        Args:
            x: the samples.
            kind: ``"pca"``, ``"separable"``, ``"low_rank"``, ``"identity"``, or ``"auto"``: ``pca`` up to 1,024
                columns; beyond, ``separable`` for events of at least two dimensions, for vectors ``low_rank`` up to
                16,384 columns and ``identity`` from there on.
            own_units: measure each column in its own standard deviation.
            rank: number of principal axes of ``low_rank``.
            seed: of the random subspace from which ``low_rank`` starts.
            event_shape: of the events that the rows are, such as ``(C, H, W)``; vectors by default.

        Raises:
            ValueError: on an unknown kind, or one that these data do not allow.

        Example:
            >>> x = torch.randn(100, 12)
            >>> ifpyro.Basis.choose(x, "low_rank", rank=3).principal
            3
            >>> ifpyro.Basis.choose(x, "separable", event_shape=(3, 4)).kind
            'separable'
        """
        shape = (x.shape[1],) if event_shape is None else event_shape
        kind = kind_for(kind, x.shape[1], shape)
        if kind == "pca":
            return cls.from_samples(x, own_units=own_units)
        if kind == "separable":
            return cls.separable(x, shape, own_units=own_units)
        if kind == "low_rank":
            return cls.low_rank(x, rank, own_units=own_units, seed=seed)
        return cls.one_scale(x, own_units=own_units)

    @classmethod
    def from_samples(cls, x: Tensor, *, own_units: bool = False) -> "Basis":
        """Eigenbasis of the sample covariance of ``x``, shape ``(N, D)``; computed in double precision.

        Args:
            x: the samples.
            own_units: measure each column in its own standard deviation, so that the axes are those of the correlation.

        Raises:
            ValueError: beyond 4,096 columns, or if columns are collinear.

        Example:
            >>> x = torch.randn(10_000, 2) * torch.tensor([1.0, 5.0])
            >>> ifpyro.Basis.from_samples(x).scale.round()
            tensor([5., 1.])
        """
        if x.shape[1] > PCA_AT_MOST:
            raise ValueError(
                f"basis 'pca' expects at most {PCA_AT_MOST} columns (it keeps a D x D matrix), got {x.shape[1]}; "
                "use 'separable' for images and other arrays, 'low_rank' or 'identity'"
            )
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
        rotation = rotation * signs(rotation)
        if not bool(scale[-1] > COLLINEAR * scale[0]):
            axis = rotation[:, -1].abs()
            columns = torch.nonzero(axis > 0.1 * axis.max()).flatten().tolist()[:10]
            raise ValueError(
                f"expected columns that are linearly independent, but columns {columns} (among others) are collinear: "
                f"the data's smallest scale is {float(scale[-1] / scale[0]):.1e} of the largest (limit "
                f"{COLLINEAR:.0e}). Drop redundant columns, bring columns of very unlike units to a "
                "common scale, or add a little noise"
            )
        return cls(mean.to(like), rotation.to(like), scale.to(like))

    @classmethod
    def separable(cls, x: Tensor, event_shape: Sequence[int], *, own_units: bool = False) -> "Basis":
        """Products of the eigenvectors along each dimension of an event; see :mod:`ifpyro.flow.axes.separable`.

        Args:
            x: the samples, ``(N, D)``.
            event_shape: of at least two dimensions and ``D`` entries.
            own_units: measure each column in its own standard deviation.

        Raises:
            ValueError: if events are vectors, or some entries are combinations of others.

        Example:
            >>> images = torch.randn(50, 8 * 8)
            >>> ifpyro.Basis.separable(images, (8, 8)).kind
            'separable'
        """
        mean, sd = mean_and_sd(x)
        unit = sd if own_units else torch.ones_like(sd)
        axes, scale = separable_axes(x, mean, unit, event_shape)
        return cls(mean.to(x), axes, scale, unit.to(x))

    @classmethod
    def low_rank(
        cls, x: Tensor, rank: int | None = None, *, own_units: bool = False, seed: int = 0, sweeps: int = 3
    ) -> "Basis":
        """Leading eigenvectors of the sample covariance, and one standard deviation on all other axes.

        Time and memory are linear in ``N`` and in ``D``. The scales are exact standard deviations along the axes that
        are found, and the mean square of the shared one is what is left of the total variance.

        Args:
            x: the samples, ``(N, D)``.
            rank: number ``r`` of principal axes; by default that with which a part of the samples predicts the others
                best, up to 256, or fewer for less than four rows or columns an axis.
            own_units: measure each column in its own standard deviation.
            seed: of the random start.
            sweeps: iterations.

        Raises:
            ValueError: if the rank is not in ``1..min(D - 1, N - 2)``, or nothing varies beyond the principal axes.

        Example:
            >>> basis = ifpyro.Basis.low_rank(torch.randn(200, 50), rank=4)
            >>> basis.principal, basis.dim
            (4, 50)
        """
        rows, dim = x.shape
        mean, sd = mean_and_sd(x)
        unit = sd if own_units else torch.ones_like(sd)
        rank = predictive_rank(x, mean, unit, default_rank(rows, dim), seed=seed) if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(dim - 1, rows - 2):
            raise ValueError(
                f"basis 'low_rank' expects between 1 and {min(dim - 1, rows - 2)} principal axes for {rows} rows of "
                f"{dim} columns, got {rank!r}"
            )
        rotation, leading = leading_axes(x, mean, unit, rank, seed=seed, sweeps=sweeps)
        left = max(0.0, float((sd / unit).square().sum()) - float(leading.sum())) / (dim - rank)
        scale = torch.cat([leading, leading.new_full((dim - rank,), left)]).sqrt()
        if not bool(scale.min() > COLLINEAR * scale[0]):
            raise ValueError(
                f"basis 'low_rank' expects variance beyond its {rank} principal axes, but all other columns are "
                "combinations of them: reduce the columns first, ask for fewer axes, or add a little noise"
            )
        return cls(mean.to(x), rotation.to(x), scale.to(x), unit.to(x))

    @classmethod
    def one_scale(cls, x: Tensor, *, own_units: bool = False) -> "Basis":
        """The columns themselves, one standard deviation for all: the root of their mean variance.

        Args:
            x: the samples, ``(N, D)``.
            own_units: measure each column in its own standard deviation (which leaves a scale of one).

        Example:
            >>> ifpyro.Basis.one_scale(torch.randn(200, 50)).kind
            'identity'
        """
        mean, sd = mean_and_sd(x)
        unit = sd if own_units else torch.ones_like(sd)
        scale = (sd / unit).square().mean().sqrt().expand(len(mean)).clone()
        return cls(mean.to(x), x.new_zeros(len(mean), 0), scale.to(x), unit.to(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Basis":
        before = self.scale.dtype
        super()._apply(fn, recurse)
        if isinstance(self.rotation, Tensor) and self.principal and self.scale.dtype.itemsize > before.itemsize:
            # Columns that were orthonormal to single precision would limit the round trip in double precision.
            self.rotation = orthonormal(self.rotation)
        if self.scale.dtype != before:
            self._complete()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._complete()

    def _complete(self) -> None:
        axes = self.rotation
        self._completion = Completion(axes) if isinstance(axes, Tensor) and 0 < axes.shape[1] < self.dim else None

    @property
    def dim(self) -> int:
        """Number of axes ``D``."""
        return len(self.scale)

    @property
    def kind(self) -> str:
        """``"pca"``, ``"separable"``, ``"low_rank"`` or ``"identity"``."""
        if isinstance(self.rotation, SeparableAxes):
            return "separable"
        return {self.dim: "pca", 0: "identity"}.get(self.rotation.shape[1], "low_rank")

    @property
    def principal(self) -> int:
        """Number ``r`` of principal axes; the order of the others means nothing."""
        return self.dim if isinstance(self.rotation, SeparableAxes) else self.rotation.shape[1]

    def with_mean(self, mean: Tensor) -> "Basis":
        """The same axes about another mean, or means of rows, ``(..., D)``; what does not differ is shared."""
        other = copy.copy(self)
        other.__dict__.update(_buffers={**self._buffers, "mean": mean}, _modules=dict(self._modules))
        return other

    def rotate(self, u: Tensor) -> Tensor:
        """From columns to axes, ``u W``, for ``u`` of shape ``(..., D)``; in full precision under autocast too."""
        if _under_autocast(u):
            with torch.autocast(u.device.type, enabled=False):
                return self.rotate(u.to(self.scale.dtype))
        if isinstance(self.rotation, SeparableAxes):
            return self.rotation.rotate(u)
        if self._completion is not None:
            return self._completion.rotate(u)
        return u @ self.rotation if self.principal else u

    def rotate_back(self, a: Tensor) -> Tensor:
        """From axes to columns, ``a W^T``, for ``a`` of shape ``(..., D)``; in full precision under autocast too."""
        if _under_autocast(a):
            with torch.autocast(a.device.type, enabled=False):
                return self.rotate_back(a.to(self.scale.dtype))
        if isinstance(self.rotation, SeparableAxes):
            return self.rotation.rotate_back(a)
        if self._completion is not None:
            return self._completion.rotate_back(a)
        return a @ self.rotation.T if self.principal else a

    def to_standard(self, x: Tensor) -> Tensor:
        """``v = ((x - mu) / unit) W / s`` for ``x`` of shape ``(..., D)``.

        Example:
            >>> x = flow.sample(1000, seed=0)
            >>> flow.basis.to_standard(x).std(0).round()
            tensor([1., 1.])
        """
        return self.rotate((x - self.mean) / self.unit) / self.scale

    def from_standard(self, v: Tensor) -> Tensor:
        """``x = mu + unit (s v) W^T`` for ``v`` of shape ``(..., D)``.

        Example:
            >>> torch.allclose(flow.basis.from_standard(torch.zeros(2)), flow.basis.mean)
            True
        """
        return self.mean + self.unit * self.rotate_back(v * self.scale)

    def log_det(self) -> Tensor:
        """``log|det dx/dv| = sum log s + sum log unit``, a scalar.

        Example:
            >>> flow.basis.log_det()
            tensor(-1.104)
        """
        return self.scale.log().sum() + self.unit.log().sum()


def kind_for(kind: str, dim: int, event_shape: Sequence[int] = ()) -> str:
    """The kind of basis that ``"auto"`` means for ``dim`` columns that are an event's; any other kind is itself.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"basis expects {', '.join(map(repr, KINDS))} or a Basis, got {kind!r}")
    if kind != "auto":
        return kind
    if dim <= PCA_UP_TO:
        return "pca"
    if fits(event_shape) and max(event_shape) <= PCA_UP_TO:
        return "separable"
    return "low_rank" if dim <= LOW_RANK_UP_TO else "identity"


def _under_autocast(u: Tensor) -> bool:
    device = u.device.type
    if device in ("cpu", "cuda"):  # known to have it: torch.compile stumbles over the question
        return torch.is_autocast_enabled(device)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
