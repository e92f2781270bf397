r"""The axes of a flow: mean, rotation and scales of the data.

Three kinds, by how many of the ``D`` axes are principal ones, ``r``:

==============  =========  ==========================================================================================
kind            ``r``      axes
==============  =========  ==========================================================================================
``pca``         ``D``      all eigenvectors of the covariance
``low_rank``    ``< D``    ``r`` leading eigenvectors; any orthonormal complement, on which one standard deviation is
                           shared by all axes (probabilistic PCA; Tipping & Bishop 1999)
``identity``    0          the columns as they are, one standard deviation for all (as in Karras et al. 2022)
==============  =========  ==========================================================================================

The complement is never stored: with the leading axes ``W_1`` of shape ``(D, r)``, signs ``S`` and the first ``r``
columns ``E`` of the identity,

.. math:: Q = I - M G M^T, \qquad M = W_1 S - E, \qquad G = (I - S W_{1,1:r}^T)^{-1}

is orthogonal and its first ``r`` columns are ``W_1 S``: a product of ``r`` reflections in compact form (Ballard et al.
2015, "Reconstructing Householder vectors from TSQR", for the signs). It costs ``4 D r`` operations a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Below this ratio of smallest to largest scale, single precision can no longer tell the smallest axis from rounding.
_COLLINEAR = 1e-5

PCA_UP_TO = 1024  # columns for which "auto" takes all eigenvectors
PCA_AT_MOST = 4096  # columns for which a D x D matrix is made at all
LOW_RANK_UP_TO = 16_384  # columns for which "auto" takes leading eigenvectors
MOST_AXES = 256  # that "low_rank" takes unless told otherwise
_CHUNK = 4096  # rows


class Basis(nn.Module):
    """The affine map between data ``x`` and standardised coordinates ``v = ((x - mu) / unit) W / s``.

    Args:
        mean: ``mu``, shape ``(D,)``.
        rotation: the principal axes as orthonormal columns, shape ``(D, r)``; ``r = D`` is ``W`` itself, fewer are
            completed to it, none leaves the columns as they are.
        scale: ``s``, standard deviation along each axis, principal axes first and descending, shape ``(D,)``.
        unit: the unit in which each column is measured, shape ``(D,)``; ones by default.
    """

    mean: Tensor
    rotation: Tensor
    scale: Tensor
    unit: Tensor
    _mirror: Tensor
    _core: Tensor
    _sign: Tensor

    def __init__(self, mean: Tensor, rotation: Tensor, scale: Tensor, unit: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        # One memory layout, that of a file: a product's last bits depend on it.
        self.register_buffer("rotation", rotation.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("unit", torch.ones_like(scale) if unit is None else unit)
        self._complete()

    @classmethod
    def choose(
        cls, x: Tensor, kind: str = "auto", *, own_units: bool = False, rank: int | None = None, seed: int = 0
    ) -> "Basis":
        """The basis of a kind for samples ``x`` of shape ``(N, D)``.

        Args:
            x: the samples.
            kind: ``"pca"``, ``"low_rank"``, ``"identity"``, or ``"auto"``, which takes them in that order up to 1,024
                and 16,384 columns and beyond.
            own_units: measure each column in its own standard deviation.
            rank: number of principal axes of ``low_rank``.
            seed: of the random subspace from which ``low_rank`` starts.

        Raises:
            ValueError: on an unknown kind, or one that these data do not allow.
        """
        kind = kind_for(kind, x.shape[1])
        if kind == "pca":
            return cls.from_samples(x, own_units=own_units)
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
        """
        if x.shape[1] > PCA_AT_MOST:
            raise ValueError(
                f"basis 'pca' expects at most {PCA_AT_MOST} columns (it keeps a D x D matrix), got {x.shape[1]}; "
                "use 'low_rank' or 'identity'"
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
        rotation = rotation * _signs(rotation)
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

    @classmethod
    def low_rank(
        cls, x: Tensor, rank: int | None = None, *, own_units: bool = False, seed: int = 0, sweeps: int = 3
    ) -> "Basis":
        """Leading eigenvectors of the sample covariance, and one standard deviation on all other axes.

        Subspace iteration from a random start (Halko et al. 2011, algorithm 4.4), chunk by chunk: time and memory are
        linear in ``N`` and in ``D``. The scales are exact standard deviations along the axes that are found, and the
        mean square of the shared one is what is left of the total variance.

        Args:
            x: the samples, ``(N, D)``.
            rank: number ``r`` of principal axes; by default 256, or fewer for less than four rows or columns an axis.
            own_units: measure each column in its own standard deviation.
            seed: of the random start.
            sweeps: iterations.

        Raises:
            ValueError: if the rank is not in ``1..min(D - 1, N - 2)``, or nothing varies beyond the principal axes.
        """
        rows, dim = x.shape
        rank = max(1, min(MOST_AXES, dim // 4, rows // 4)) if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(dim - 1, rows - 2):
            raise ValueError(
                f"basis 'low_rank' expects between 1 and {min(dim - 1, rows - 2)} principal axes for {rows} rows of "
                f"{dim} columns, got {rank!r}"
            )
        mean, sd = _moments(x)
        unit = sd if own_units else torch.ones_like(sd)
        total = float((sd / unit).square().sum())
        centre, inverse = mean.to(x), (1 / unit).to(x)

        def times_covariance(q: Tensor) -> tuple[Tensor, Tensor]:
            """``Sigma q`` and ``q^T Sigma q``, times ``N - 1``."""
            moved, inner = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[1]).to(q.double())
            for part in x.split(_CHUNK):
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
        axes = torch.linalg.qr(q.double() @ turn.flip(1)[:, :rank])
        rotation = axes.Q * axes.R.diagonal().sign()
        rotation = rotation * _signs(rotation)
        leading = variance.flip(0)[:rank].clamp(min=0)
        left = max(0.0, total - float(leading.sum())) / (dim - rank)
        scale = torch.cat([leading, leading.new_full((dim - rank,), left)]).sqrt()
        if not bool(scale.min() > _COLLINEAR * scale[0]):
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
        """
        mean, sd = _moments(x)
        unit = sd if own_units else torch.ones_like(sd)
        scale = (sd / unit).square().mean().sqrt().expand(len(mean)).clone()
        return cls(mean.to(x), x.new_zeros(len(mean), 0), scale.to(x), unit.to(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Basis":
        before = self.rotation.dtype
        super()._apply(fn, recurse)
        if self.principal and self.rotation.dtype.itemsize > before.itemsize:
            # Columns that were orthonormal to single precision would limit the round trip in double precision.
            q, r = torch.linalg.qr(self.rotation)
            self.rotation = q * r.diagonal().sign()
        if self.rotation.dtype != before:
            self._complete()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._complete()

    def _complete(self) -> None:
        """What ``rotate`` needs of a partial rotation: ``M`` and ``G`` of the module's docstring, and the signs."""
        r, axes = self.principal, self.rotation.detach().double().cpu()
        partial = 0 < r < self.dim
        if partial:
            sign = torch.geqrf(axes)[0].diagonal().sign()
            mirror = axes * sign
            core = torch.linalg.inv(torch.eye(r, dtype=torch.double) - mirror[:r].T)
            mirror[:r] -= torch.eye(r, dtype=torch.double)
        else:
            mirror, core, sign = axes[:, :0], axes[:0, :0], axes[0, :0]
        signs = torch.cat([sign, torch.ones(self.dim - len(sign), dtype=torch.double)])
        for name, value in (("_mirror", mirror), ("_core", core), ("_sign", signs)):
            self.register_buffer(name, value.to(self.rotation), persistent=False)

    @property
    def dim(self) -> int:
        """Number of axes ``D``."""
        return len(self.scale)

    @property
    def principal(self) -> int:
        """Number ``r`` of principal axes; the order of the others means nothing."""
        return self.rotation.shape[1]

    def rotate(self, u: Tensor) -> Tensor:
        """From columns to axes, ``u W``, for ``u`` of shape ``(..., D)``; in full precision under autocast too."""
        if _under_autocast(u):
            with torch.autocast(u.device.type, enabled=False):
                return self.rotate(u.to(self.scale.dtype))
        if self.principal == self.dim:
            return u @ self.rotation
        if self.principal == 0:
            return u
        return (u - ((u @ self._mirror) @ self._core) @ self._mirror.T) * self._sign

    def rotate_back(self, a: Tensor) -> Tensor:
        """From axes to columns, ``a W^T``, for ``a`` of shape ``(..., D)``; in full precision under autocast too."""
        if _under_autocast(a):
            with torch.autocast(a.device.type, enabled=False):
                return self.rotate_back(a.to(self.scale.dtype))
        if self.principal == self.dim:
            return a @ self.rotation.T
        if self.principal == 0:
            return a
        a = a * self._sign
        return a - ((a @ self._mirror) @ self._core.T) @ self._mirror.T

    def to_standard(self, x: Tensor) -> Tensor:
        """``v = ((x - mu) / unit) W / s`` for ``x`` of shape ``(..., D)``."""
        return self.rotate((x - self.mean) / self.unit) / self.scale

    def from_standard(self, v: Tensor) -> Tensor:
        """``x = mu + unit (s v) W^T`` for ``v`` of shape ``(..., D)``."""
        return self.mean + self.unit * self.rotate_back(v * self.scale)

    def log_det(self) -> Tensor:
        """``log|det dx/dv| = sum log s + sum log unit``, a scalar."""
        return self.scale.log().sum() + self.unit.log().sum()


def kind_for(kind: str, dim: int) -> str:
    """The kind of basis that ``"auto"`` means for ``dim`` columns; any other kind is itself.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in ("auto", "pca", "low_rank", "identity"):
        raise ValueError(f"basis expects 'auto', 'pca', 'low_rank', 'identity' or a Basis, got {kind!r}")
    if kind != "auto":
        return kind
    return "pca" if dim <= PCA_UP_TO else "low_rank" if dim <= LOW_RANK_UP_TO else "identity"


def _under_autocast(u: Tensor) -> bool:
    device = u.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _signs(axes: Tensor) -> Tensor:
    """The sign of an eigenvector is arbitrary: its largest entry is made positive, so that two machines agree."""
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(axes)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns in double precision, without a copy of all rows in it."""
    mean = sum((part.sum(0, dtype=torch.double) for part in x.split(_CHUNK)), x.new_zeros((), dtype=torch.double))
    mean = mean / len(x)
    square = sum(((part.double() - mean).square().sum(0) for part in x.split(_CHUNK)), torch.zeros_like(mean))
    return mean, (square / (len(x) - 1)).sqrt()
