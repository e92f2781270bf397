r"""Charts: the smooth bijections ``b`` between unconstrained space and the inside of a support.

=============  ==========================  ================================
support        ``x = b(f)``                ``log |db/df|``
=============  ==========================  ================================
real           ``f``                       0
``x > l``      ``l + exp f``               ``f``
``x < h``      ``h - exp f``               ``f``
``l < x < h``  ``l + (h - l) sigmoid f``   ``log (h - l) + log sigmoid'(f)``
circle         ``c + P Phi(f)``            ``log P + log phi(f)``
simplex        stick breaking              of all but the last coordinate
=============  ==========================  ================================

``Phi`` and ``phi`` are the standard normal distribution function and density: a phase that is uniform on its circle is
standard normal in unconstrained space. Of a circle of period ``P``, values in any turn are read, and those from the cut
``c`` to ``c + P`` are returned.

Bounds, periods and cuts are kept in double precision. The buffers that are computed with are copies of them in the
chart's own dtype, made anew from the exact values whenever it changes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import StickBreakingTransform

_LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)


class Chart(nn.Module):
    """A bijection from unconstrained space onto the inside of a support, for events of one shape.

    Args:
        event_shape: shape of one data point.
        free_shape: shape of its unconstrained image.

    Attributes:
        support: the constraint it was made for, None for real data.
    """

    def __init__(self, event_shape: Sequence[int], free_shape: Sequence[int]) -> None:
        super().__init__()
        self.support: Constraint | None = None
        self.event_shape, self.free_shape = torch.Size(event_shape), torch.Size(free_shape)
        self._exact: dict[str, Tensor] = {}

    @property
    def is_real(self) -> bool:
        """Whether the support is all of the real numbers, and the bijection nothing."""
        return False

    def from_free(self, free: Tensor) -> Tensor:
        """Data ``(*batch, *event_shape)`` of unconstrained values ``(*batch, *free_shape)``."""
        raise NotImplementedError

    def to_free(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`from_free`, for data inside the support."""
        raise NotImplementedError

    def log_det(self, free: Tensor, x: Tensor) -> Tensor:
        """``log|det dx/dfree|`` in nats at a pair, ``(*batch,)``."""
        raise NotImplementedError

    def inside(self, x: Tensor) -> Tensor:
        """Which data are finite and strictly inside the support, ``(*batch,)``: those that have an image."""
        raise NotImplementedError

    def canonical(self, x: Tensor) -> Tensor:
        """The same data as :meth:`from_free` would return them: of circles, in the turn that begins at the cut."""
        return x

    def settled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The data with a point inside in place of those that are not, and which were inside, ``(*batch,)``.

        What is computed from the first and then replaced by the second's verdict has no gradient that misleads.
        """
        inside = self.inside(x)
        middle = self.from_free(x.new_zeros(self.free_shape))
        return torch.where(inside.reshape(*inside.shape, *(1,) * len(self.event_shape)), x, middle), inside

    def constrain(self, free: Tensor, with_log_det: bool) -> tuple[Tensor, Tensor | float]:
        """:meth:`from_free` of flat rows ``(*batch, D)``, and :meth:`log_det`, zero if it is not wanted."""
        free = free.reshape(*free.shape[:-1], *self.free_shape)
        x = self.from_free(free)
        return x, self.log_det(free, x) if with_log_det and not self.is_real else 0.0

    def unconstrain(self, x: Tensor, with_log_det: bool) -> tuple[Tensor, Tensor | float]:
        """The inverse of :meth:`constrain`, with the same log-determinant; NaN of what is not inside."""
        batch = x.shape[: x.ndim - len(self.event_shape)]
        if self.is_real:
            return x.reshape(*batch, self.free_shape.numel()), 0.0
        x, inside = self.settled(x)
        free = self.to_free(x)
        flat = free.reshape(*batch, self.free_shape.numel())
        log_det = self.log_det(free, x) if with_log_det else 0.0
        return torch.where(inside.unsqueeze(-1), flat, math.nan), log_det

    def keep(self, name: str, value: Tensor) -> None:
        """Register a buffer that is no part of the weights, and remember its exact value."""
        self._exact[name] = value.double().cpu()
        self.register_buffer(name, self._exact[name].clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Chart":
        super()._apply(fn, recurse)
        for name, value in self._exact.items():
            self._buffers[name] = value.to(self._buffers[name])
        return self

    def _over_event(self, flags: Tensor) -> Tensor:
        return flags.flatten(flags.ndim - len(self.event_shape)).all(-1) if self.event_shape else flags

    def _total(self, log_dets: Tensor) -> Tensor:
        return log_dets.flatten(log_dets.ndim - len(self.event_shape)).sum(-1) if self.event_shape else log_dets


class Box(Chart):
    """Every entry between bounds of its own, either of which may be infinite.

    Args:
        lower: bounds that broadcast to an event.
        upper: likewise.
        event_shape: shape of one data point.
    """

    lower: Tensor
    upper: Tensor
    below: Tensor
    above: Tensor

    def __init__(self, lower: Tensor, upper: Tensor, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, event_shape)
        self.keep("lower", lower)
        self.keep("upper", upper)
        below, above = torch.broadcast_tensors(lower.isfinite(), upper.isfinite())
        self.register_buffer("below", below.clone(), persistent=False)
        self.register_buffer("above", above.clone(), persistent=False)
        self._unbounded = not bool((below | above).any())

    @property
    def is_real(self) -> bool:
        """See :attr:`Chart.is_real`."""
        return self._unbounded

    def from_free(self, free: Tensor) -> Tensor:
        """See :meth:`Chart.from_free`."""
        if self._unbounded:
            return free
        low, high, width = self._ends()
        both, one = self.below & self.above, self.below ^ self.above
        grown = torch.where(one, free, 0.0).exp()
        share = torch.where(both, -free.abs(), 0.0).sigmoid() * width  # from the nearer end, which keeps digits there
        x = torch.where(both, torch.where(free < 0, low + share, high - share), free)
        x = torch.where(one, torch.where(self.below, low + grown, high - grown), x)
        # Where rounding reaches a bound, the neighbouring number: draws are inside.
        inward_low = torch.nextafter(self.lower, torch.full_like(self.lower, math.inf))
        inward_high = torch.nextafter(self.upper, torch.full_like(self.upper, -math.inf))
        return torch.minimum(torch.maximum(x, inward_low), inward_high)

    def to_free(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.to_free`."""
        if self._unbounded:
            return x
        low, high, _ = self._ends()
        above_low = torch.where(self.below, x - low, 1.0).log()
        below_high = torch.where(self.above, high - x, 1.0).log()
        bounded = torch.where(self.below, above_low - below_high, below_high)
        return torch.where(self.below | self.above, bounded, x)

    def log_det(self, free: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Chart.log_det`."""
        if self._unbounded:
            return x.new_zeros(x.shape[: x.ndim - len(self.event_shape)])
        both, one = self.below & self.above, self.below ^ self.above
        _, _, width = self._ends()
        softplus = torch.nn.functional.softplus
        logistic = width.log() - softplus(-free) - softplus(free)
        return self._total(torch.where(both, logistic, torch.where(one, free, 0.0)))

    def inside(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.inside`."""
        if self._unbounded:
            return self._over_event(x.isfinite())
        return self._over_event((x > self.lower) & (x < self.upper) & x.isfinite())

    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds with a number in place of infinity, and the width between them, one where there is none."""
        low, high = torch.where(self.below, self.lower, 0.0), torch.where(self.above, self.upper, 0.0)
        return low, high, torch.where(self.below & self.above, high - low, 1.0)


class Circle(Chart):
    """Every entry on a circle: ``x`` and ``x + period`` are the same point.

    Args:
        period: that broadcasts to an event.
        cut: where the turn begins that is returned, likewise.
        event_shape: shape of one data point.
    """

    period: Tensor
    cut: Tensor

    def __init__(self, period: Tensor, cut: Tensor, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, event_shape)
        self.keep("period", period)
        self.keep("cut", cut)

    def from_free(self, free: Tensor) -> Tensor:
        """See :meth:`Chart.from_free`."""
        return self.cut + self.period * _between_zero_and_one(torch.special.ndtr(free))

    def to_free(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.to_free`."""
        share = (self.canonical(x) - self.cut) / self.period
        return torch.special.ndtri(_between_zero_and_one(share))

    def log_det(self, free: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Chart.log_det`."""
        return self._total(self.period.log() - 0.5 * free.square() - _LOG_ROOT_TWO_PI)

    def inside(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.inside`: every finite value is on the circle."""
        return self._over_event(x.isfinite())

    def canonical(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.canonical`."""
        return x - self.period * ((x - self.cut) / self.period).floor().detach()


class Simplex(Chart):
    """Positive entries that sum to one along the last axis, by stick breaking."""

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, (*event_shape[:-1], event_shape[-1] - 1))
        self._transform = StickBreakingTransform()

    def from_free(self, free: Tensor) -> Tensor:
        """See :meth:`Chart.from_free`."""
        return self._transform(free).clamp(min=torch.finfo(free.dtype).tiny)

    def to_free(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.to_free`."""
        return self._transform.inv(x)

    def log_det(self, free: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Chart.log_det`."""
        rows: Tensor = self._transform.log_abs_det_jacobian(free, x)  # summed over the last axis already
        others = len(self.event_shape) - 1
        return rows.flatten(rows.ndim - others).sum(-1) if others else rows

    def inside(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.inside`; the sum may miss one by what rounding leaves."""
        tolerance = max(1e-6, 8 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1]))
        return self._over_event((x > 0) & ((x.sum(-1, keepdim=True) - 1).abs() < tolerance))


def _between_zero_and_one(share: Tensor) -> Tensor:
    """Kept off the ends, whose image is infinite, by one rounding."""
    eps = torch.finfo(share.dtype).eps
    return share.clamp(eps, 1 - eps)
