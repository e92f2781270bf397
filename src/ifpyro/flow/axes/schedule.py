r"""The angles of an inflationary flow: which axis turns into noise when.

Symbols. In the eigenbasis of the data covariance, axis ``j`` has standard deviation ``s_j``. Inflation adds noise of
standard deviation ``eta_j(t)`` to it. All that the flow ever needs is the *angle*

.. math:: \theta_j(t) = \arctan(\eta_j(t) / s_j), \qquad 0 = \text{data}, \quad \pi/2 = \text{pure noise},

because in unit-variance coordinates ``y = u / sqrt(s^2 + eta^2)`` a noised sample, the probability-flow ODE and the
regression target of the network are

.. math::

    y  &= \cos\theta \, x_0/s + \sin\theta \, n, \qquad n \sim N(0, I) \\
    dy_j/dt &= -\theta_j'(t) \, F_j(y, t) \\
    F  &= E[\sin\theta \, x_0/s - \cos\theta \, n \mid y].

``F`` vanishes for Gaussian data and nothing is singular at either end. de Albuquerque & Pearson (2024, section 3) write
the ODE for noise covariances ``C_jj = eta_j^2`` with a rescaling ``A(t)``; Karras et al. (2022, table 1) give the
preconditioning whose per-axis form removes both from the equations.

Every schedule here is a bundle of straight lines in ``log tan theta``,

.. math:: \log\tan\theta_j = o_j + a_j \, \ell, \qquad a_j \ge 0,

run through by a clock ``ell(t)``, ``t`` in ``[0, 1]``:

=================  =======================================  ==========================================================
schedule           line of axis ``j``                       meaning
=================  =======================================  ==========================================================
``preserving``     ``o = 0``, ``a = 1``                     one angle for all axes: participation ratio is constant
``reducing``       ``o = -log s_j``, ``a = (1 + g_j)/2``    ``C_jj = gamma0 exp(rho (1 + g_j) t)``: axes off the kept
                                                            ``K`` inflate slower, and are compressed after rescaling
``details_first``  ``o = -p log s_j``, ``a = 1``            small variances inflate earlier; ``p = 1`` is equal noise
``exponential``    ``reducing`` with explicit numbers       the paper's ``(gamma0, rho, g, T)``, in the paper's own time
=================  =======================================  ==========================================================

For the first three the clock is the mean angle over the axes, so that the mean angular speed is constant. Images have
hundreds of axes of small variance and a few of large, which would then all turn in the last moments; with ``octaves``
that share of the mean counts octaves of ``s`` alike instead of axes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.arguments import is_number

_HALF_PI = math.pi / 2
_CLOCK_NODES = 2049


class Angles:
    """The angles of a schedule on given axes: ``theta_j(t)`` and ``theta_j'(t)`` in double precision.

    Args:
        offset: ``o_j``, shape ``(D,)``.
        slope: ``a_j >= 0``, shape ``(D,)``.
        span: first and last value of ``ell``.
        linear_clock: ``ell`` linear in ``t``; otherwise the mean angle is.
        weights: of the axes in that mean, summing to one, shape ``(D,)``; equal by default.

    Raises:
        ValueError: if an angle would decrease, or leave ``[0, pi/2)``.
    """

    def __init__(
        self,
        offset: Tensor,
        slope: Tensor,
        span: tuple[float, float],
        linear_clock: bool,
        weights: Tensor | None = None,
    ) -> None:
        if bool((slope < 0).any()) or span[1] <= span[0] or not bool((slope > 0).any()):
            raise ValueError(
                f"a schedule expects angles that never decrease, got slopes from {slope.min():.3g} to "
                f"{slope.max():.3g} over the span {span}; use slopes >= 0 and an end after the start"
            )
        self.offset = offset.double()
        self.slope = slope.double()
        self.span = (float(span[0]), float(span[1]))
        self.linear_clock = linear_clock
        first, last = (self._theta(torch.tensor([ell], dtype=torch.double)) for ell in self.span)
        if bool((first < 0).any()) or bool((last >= _HALF_PI).any()) or not bool(last.isfinite().all()):
            raise ValueError(
                "a schedule expects angles in [0, pi/2), got "
                f"[{first.min():.6g}, {last.max():.17g}]; choose an earlier end or a smaller gap"
            )
        self._nodes = torch.linspace(*self.span, _CLOCK_NODES, dtype=torch.double)
        self._weights = None if weights is None else weights.double()
        self._mean = self._average(self._theta(self._nodes))
        self._start, self._range = self._mean[0].clone(), (self._mean[-1] - self._mean[0]).clone()

    def __call__(self, t: Tensor) -> Tensor:
        """Angles ``theta_j(t)`` in radians for ``t`` of shape ``(...)`` in ``[0, 1]``: shape ``(..., D)``."""
        return self._theta(self._clock(t))

    def speed(self, t: Tensor) -> Tensor:
        """Angular speeds ``d theta_j / dt`` in radians for ``t`` of shape ``(...)``: shape ``(..., D)``."""
        ell = self._clock(t)
        per_ell = self._rate(self._theta(ell))
        if self.linear_clock:
            return per_ell * (self.span[1] - self.span[0])
        return per_ell * (self._range.to(t.device) / self._average(per_ell).unsqueeze(-1))

    def _theta(self, ell: Tensor) -> Tensor:
        offset, slope = self.offset.to(ell.device), self.slope.to(ell.device)
        return torch.atan(torch.exp(offset + slope * ell.unsqueeze(-1)))

    def _average(self, values: Tensor) -> Tensor:
        return values.mean(-1) if self._weights is None else (values * self._weights.to(values.device)).sum(-1)

    def _rate(self, theta: Tensor) -> Tensor:
        # d theta / d ell for log tan theta = o + a ell
        return 0.5 * torch.sin(2 * theta) * self.slope.to(theta.device)

    def _clock(self, t: Tensor) -> Tensor:
        t = t.double().clamp(0, 1)
        if self.linear_clock:
            return self.span[0] + (self.span[1] - self.span[0]) * t
        nodes, mean = self._nodes.to(t.device), self._mean.to(t.device)
        target = self._start.to(t.device) + self._range.to(t.device) * t
        right = torch.searchsorted(mean, target.contiguous()).clamp(1, _CLOCK_NODES - 1)
        low, high = nodes[right - 1], nodes[right]
        ell = low + (high - low) * ((target - mean[right - 1]) / (mean[right] - mean[right - 1])).clamp(0, 1)
        for _ in range(2):  # Newton from a table of 2049 nodes: quadratic, so two steps reach rounding error
            theta = self._theta(ell)
            step = (self._average(theta) - target) / self._average(self._rate(theta))
            ell = (ell - step).clamp(min=low, max=high)
        return ell


@dataclass(frozen=True)
class Schedule(ABC):
    """A rule that gives every axis its angles, whatever the data's scales.

    Use the constructors :meth:`preserving`, :meth:`reducing`, :meth:`details_first` and :meth:`exponential`.

    Args:
        start: the noise floor ``theta_0`` in radians: no axis starts noisier than this (for ``preserving``, the
            paper's ``gamma_0`` is ``tan(theta_0)^2``).
        end: the last angle in radians: every axis ends at or beyond it.
        octaves: the share of the clock, in ``[0, 1]``, that counts octaves of ``s`` alike instead of axes.

    Example:
        >>> schedule = ifpyro.Schedule.details_first()
        >>> angles = schedule.angles(torch.tensor([2.0, 1.0, 0.1]))
        >>> angles(torch.tensor(0.5))  # half-way the small axis is nearly noise, the large one still data: radians
        tensor([0.332, 0.603, 1.427], dtype=torch.float64)
    """

    start: float = 0.01
    end: float = _HALF_PI - 1e-3
    octaves: float = 0.0

    kind: ClassVar[str] = ""
    linear_clock: ClassVar[bool] = False
    _kinds: ClassVar[dict[str, type["Schedule"]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.kind:
            Schedule._kinds[cls.kind] = cls

    def __post_init__(self) -> None:
        if not (is_number(self.start) and is_number(self.end) and 0 < self.start < self.end < _HALF_PI):
            raise ValueError(
                f"a schedule expects 0 < start < end < pi/2 (radians), got start={self.start!r}, end={self.end!r}"
            )
        if not (is_number(self.octaves) and 0 <= self.octaves <= 1):
            raise ValueError(f"a schedule expects octaves in [0, 1], got {self.octaves!r}")

    @staticmethod
    def preserving(start: float = 0.01, end: float = _HALF_PI - 1e-3) -> "Schedule":
        """All axes share one angle, ``eta_j = s_j tan theta``: the paper's dimension-preserving flow.

        Example:
            >>> ifpyro.Schedule.preserving().angles(torch.tensor([2.0, 0.1]))(torch.tensor(0.5))
            tensor([0.790, 0.790], dtype=torch.float64)
        """
        return Preserving(start=start, end=end)

    @staticmethod
    def reducing(keep: int, gap: float = 1.0, start: float = 0.01, end: float = _HALF_PI - 1e-3) -> "Schedule":
        """``C_jj = gamma0 exp(rho (1 + g_j) t)``: the paper's dimension-reducing flow.

        Args:
            keep: number ``K`` of leading axes with ``g = 1``.
            gap: the inflation gap; the other axes have ``g = 1 - gap``. In ``(0, 2)``.
            start: noise floor in radians.
            end: last angle in radians.

        Example:
            >>> ifpyro.Schedule.reducing(keep=1).angles(torch.tensor([2.0, 0.1]))(torch.tensor(0.5))
            tensor([1.045, 0.531], dtype=torch.float64)
        """
        return Reducing(start=start, end=end, keep=keep, gap=gap)

    @staticmethod
    def details_first(
        power: float = 1.0, start: float = 0.01, end: float = _HALF_PI - 1e-3, octaves: float = 0.0
    ) -> "Schedule":
        """``tan theta_j = eta(t) (s_max/s_j)^p / s_max``: small-variance axes inflate earlier.

        Args:
            power: ``p >= 0``; 0 is ``preserving``, 1 is equal noise on every axis.
            start: noise floor in radians.
            end: last angle in radians.
            octaves: share of the clock that counts octaves of ``s`` alike instead of axes; 1/2 suits images.

        Example:
            >>> ifpyro.Schedule.details_first(power=2.0).angles(torch.tensor([2.0, 0.1]))(torch.tensor(0.5))
            tensor([0.052, 1.523], dtype=torch.float64)
        """
        return DetailsFirst(start=start, end=end, power=power, octaves=octaves)

    @staticmethod
    def exponential(gamma0: float, rho: float, g: Sequence[float], T: float) -> "Schedule":
        """The paper's own parametrisation, ``C_jj(t') = gamma0 exp(rho (1 + g_j) t')``, ``t'`` from 0 to ``T``.

        Time is the paper's, ``t = t'/T``. ``g`` has one entry an axis, leading axis first.

        Example:
            >>> schedule = ifpyro.Schedule.exponential(gamma0=1e-4, rho=1.0, g=(1.0, 0.5), T=8.0)
            >>> schedule.angles(torch.tensor([2.0, 0.1]))(torch.tensor([0.0, 1.0]))
            tensor([[0.005, 0.100],
                    [1.504, 1.546]], dtype=torch.float64)
        """
        return Exponential(gamma0=gamma0, rho=rho, g=tuple(g), T=T)

    @abstractmethod
    def lines(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``(o_j, a_j)`` of ``log tan theta_j = o_j + a_j ell`` for axis scales ``s_j``, each ``(D,)``."""

    def span(self, offset: Tensor, slope: Tensor) -> tuple[float, float]:
        """First and last ``ell``: the largest angle starts at ``start``, the smallest ends at ``end``."""
        low = (math.log(math.tan(self.start)) - offset) / slope
        high = (math.log(math.tan(self.end)) - offset) / slope
        return float(low.min()), float(high.max())

    def angles(self, scale: Tensor) -> Angles:
        """The angles on axes with standard deviations ``scale`` (shape ``(D,)``, descending)."""
        scale = scale.detach().cpu().double()
        if scale.ndim != 1 or not bool((scale > 0).all()) or not bool(scale.isfinite().all()):
            raise ValueError(f"a schedule expects positive finite scales of shape (D,), got {scale}")
        offset, slope = self.lines(scale)
        weights = _clock_weights(scale, self.octaves)
        return Angles(offset, slope, self.span(offset, slope), self.linear_clock, weights)

    def check_axes(self, principal: int, dim: int) -> None:  # noqa: B027 (a schedule need not care)
        """Refuse a basis of ``dim`` axes of which only the leading ``principal`` have an order, where that matters.

        Raises:
            ValueError: if the schedule tells apart axes that the basis does not.
        """

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_dict` rebuilds the schedule.

        Example:
            >>> ifpyro.Schedule.preserving(start=0.02).to_dict()["start"]
            0.02
        """
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Schedule":
        """Rebuild a schedule from :meth:`to_dict`.

        Example:
            >>> ifpyro.Schedule.from_dict(ifpyro.Schedule.reducing(keep=2).to_dict()).keep
            2
        """
        options = dict(data)
        kind = options.pop("kind", None)
        if kind not in Schedule._kinds:
            raise ValueError(f"expected a schedule of kind {sorted(Schedule._kinds)}, got {kind!r}")
        return Schedule._kinds[kind](**options)


@dataclass(frozen=True)
class Preserving(Schedule):
    """One angle for all axes."""

    kind: ClassVar[str] = "preserving"

    def lines(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``o = 0``, ``a = 1``."""
        return torch.zeros_like(scale), torch.ones_like(scale)


@dataclass(frozen=True)
class DetailsFirst(Schedule):
    """Small-variance axes inflate earlier, the more so the larger ``power``."""

    power: float = 1.0
    kind: ClassVar[str] = "details_first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.power) and self.power >= 0):
            raise ValueError(f"details_first expects a finite power >= 0, got {self.power}")

    def lines(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``o = -p log s_j`` (up to a constant that the clock absorbs), ``a = 1``."""
        return -self.power * torch.log(scale), torch.ones_like(scale)


@dataclass(frozen=True)
class Reducing(Schedule):
    """Axes beyond the leading ``keep`` inflate slower, by ``gap``."""

    keep: int = 1
    gap: float = 1.0
    kind: ClassVar[str] = "reducing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"reducing expects keep to be an integer >= 1, got {self.keep!r}")
        if not 0 < self.gap < 2:
            raise ValueError(f"reducing expects 0 < gap < 2 (every axis must still inflate), got {self.gap}")

    def check_axes(self, principal: int, dim: int) -> None:
        """The kept axes must be principal ones."""
        if principal < self.keep <= dim:
            raise ValueError(
                f"reducing(keep={self.keep}) expects a basis with at least {self.keep} principal axes, got {principal} "
                f"among {dim}; use basis='pca', 'separable' for images, or Basis.low_rank(x, rank={self.keep}) or more"
            )

    def lines(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``o = -log s_j``, ``a = (1 + g_j)/2``; ``ell = log gamma0 / 2`` is shared at the start."""
        if self.keep > len(scale):
            raise ValueError(f"reducing expects keep <= {len(scale)} axes of the data, got keep={self.keep}")
        slope = torch.full_like(scale, (2 - self.gap) / 2)
        slope[: self.keep] = 1.0
        # At ell = 0 every axis carries the same noise, sqrt(gamma0), as large as the floor allows.
        return math.log(math.tan(self.start)) + torch.log(scale.min() / scale), slope


@dataclass(frozen=True)
class Exponential(Schedule):
    """``C_jj(t') = gamma0 exp(rho (1 + g_j) t')`` in the paper's time."""

    gamma0: float = 1e-4
    rho: float = 1.0
    g: tuple[float, ...] = (1.0,)
    T: float = 10.0
    kind: ClassVar[str] = "exponential"
    linear_clock: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "g", tuple(float(g) for g in self.g))
        if not (self.gamma0 > 0 and self.rho > 0 and self.T > 0):
            raise ValueError(
                f"exponential expects gamma0, rho, T > 0, got gamma0={self.gamma0}, rho={self.rho}, T={self.T}"
            )

    def check_axes(self, principal: int, dim: int) -> None:
        """Axes without an order must share one ``g``."""
        if len(set(self.g[principal:])) > 1:
            raise ValueError(
                f"exponential expects one g for all axes that are not principal, and this basis has {principal} "
                f"principal axes among {dim}; use basis='pca', 'separable' for images, or the same g from entry "
                f"{principal} on"
            )

    def lines(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``o = log(gamma0)/2 - log s_j``, ``a = rho (1 + g_j)/2``, ``ell = t'``."""
        if len(self.g) != len(scale):
            raise ValueError(f"exponential expects one g an axis: {len(scale)} axes, got {len(self.g)} values")
        slope = 0.5 * self.rho * (1 + torch.tensor(self.g, dtype=torch.double))
        return 0.5 * math.log(self.gamma0) - torch.log(scale), slope

    def span(self, offset: Tensor, slope: Tensor) -> tuple[float, float]:
        """From 0 to ``T``."""
        return 0.0, self.T


def _clock_weights(scale: Tensor, octaves: float) -> Tensor | None:
    """Of every axis: ``1/D``, mixed with the stretch of ``log s`` that is nearer to it than to any other axis."""
    if not octaves:
        return None
    order = scale.argsort()
    log = scale[order].log()
    middle = torch.cat([log[:1], (log[1:] + log[:-1]) / 2, log[-1:]])
    stretch = torch.empty_like(scale)
    stretch[order] = middle.diff()
    total = float(stretch.sum())
    even = torch.full_like(scale, 1 / len(scale))
    return even if total == 0 else (1 - octaves) * even + octaves * stretch / total
