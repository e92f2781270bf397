"""From a support to its chart, and events whose parts have charts of their own."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from .charts import Box, Chart, Circle, Simplex
from .circle import Circular, emptiest_place

_SIMPLEX = type(constraints.simplex)


def chart_of(support: Constraint | None, event_shape: Sequence[int]) -> Chart:
    """The bijection from unconstrained space onto a support, for events of a shape.

    Args:
        support: as :func:`~ifpyro.data.support.as_support` returns it.
        event_shape: shape of one data point.

    Raises:
        ValueError: if the support does not fit the event.
    """
    shape = torch.Size(event_shape)
    chart = _chart_of(support, shape)
    chart.support = None if chart.is_real else support
    return chart


def _chart_of(support: Any, shape: torch.Size) -> Chart:
    if isinstance(support, _SIMPLEX):
        if not shape or shape[-1] < 2:
            raise ValueError(
                f"support simplex expects at least two entries on the last axis, got events {tuple(shape)}"
            )
        return Simplex(shape)
    if isinstance(support, constraints.cat | constraints.stack):
        return _joined(support, shape)
    if isinstance(support, Circular):
        cut = -support.period / 2 if support.cut is None else support.cut
        return Circle(_fitting(support.period, shape), _fitting(cut, shape), shape)
    lower, upper = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return Box(_fitting(lower, shape), _fitting(upper, shape), shape)


def in_words(support: Constraint | None) -> str:
    """A support as an error names it; torch does not say what its cats and stacks hold."""
    if isinstance(support, constraints.cat | constraints.stack):
        return f"{type(support).__name__}({', '.join(map(in_words, support.cseq))})"
    return "Real()" if support is None else str(support)


def located(support: Any, device: torch.device) -> Any:
    """The same support with its bounds on a device."""
    if isinstance(support, constraints.stack):
        return constraints.stack([located(part, device) for part in support.cseq], support.dim)
    if isinstance(support, constraints.cat):
        return constraints.cat([located(part, device) for part in support.cseq], support.dim, support.lengths)
    bounds = {} if support is None else {k: v for k, v in vars(support).items() if isinstance(v, Tensor)}
    if all(value.device == device for value in bounds.values()):
        return support
    moved = copy.copy(support)
    for name, value in bounds.items():
        # Not every device knows double precision.
        exact = torch.float64 if device.type != "mps" else torch.float32
        setattr(moved, name, value.to(device, exact))
    return moved


def is_uncut(support: Constraint | None) -> bool:
    """Whether there is a circle whose cut is to be found from the data."""
    if isinstance(support, constraints.cat | constraints.stack):
        return any(is_uncut(part) for part in support.cseq)
    return isinstance(support, Circular) and support.cut is None


def with_cuts(support: Constraint | None, x: Tensor) -> Constraint | None:
    """The support with every circle that has no cut cut where samples ``(N, *event)`` are scarcest."""
    if isinstance(support, constraints.cat):
        lengths = list(support.lengths)
        dim = _event_axis(support.dim, x.ndim - 1)
        pieces = zip(support.cseq, x.split(lengths, dim), strict=True)
        return constraints.cat([with_cuts(part, piece) for part, piece in pieces], support.dim, lengths)
    if isinstance(support, constraints.stack):
        pieces = zip(support.cseq, x.unbind(_event_axis(support.dim, x.ndim - 1)), strict=True)
        return constraints.stack([with_cuts(part, piece) for part, piece in pieces], support.dim)
    if not isinstance(support, Circular) or support.cut is not None:
        return support
    columns = x.flatten(1).double().cpu()
    periods = torch.as_tensor(support.period, dtype=torch.double).expand(x.shape[1:]).flatten().tolist()
    cuts = [emptiest_place(column, period) for column, period in zip(columns.unbind(1), periods, strict=True)]
    same = isinstance(support.period, float) and len(cuts) == 1
    return Circular(support.period, cuts[0] if same else torch.tensor(cuts, dtype=torch.double).reshape(x.shape[1:]))


class Joined(Chart):
    """Parts of an event, each with a chart of its own, along one axis.

    Args:
        parts: their charts.
        dim: the axis, negative.
        stacked: whether each part is one slice without that axis, or some of its entries.
        event_shape: shape of one data point.
    """

    def __init__(self, parts: Sequence[Chart], dim: int, stacked: bool, event_shape: Sequence[int]) -> None:
        shapes = [part.free_shape for part in parts]
        if stacked:
            aligned = len(set(shapes)) == 1
        else:
            aligned = len({(*shape[: len(shape) + dim], *shape[len(shape) + dim + 1 :]) for shape in shapes}) == 1
        # Images that do not fit together (simplices below longer rows) lie behind each other.
        empty = [torch.empty(shape, device="meta") for shape in shapes]
        free_shape = torch.Size([sum(map(torch.Size.numel, shapes))])
        if aligned:
            free_shape = (torch.stack(empty, dim) if stacked else torch.cat(empty, dim)).shape
        super().__init__(event_shape, free_shape)
        self.parts = nn.ModuleList(parts)
        self._dim, self._stacked, self._aligned = dim, stacked, aligned

    def from_free(self, free: Tensor) -> Tensor:
        """See :meth:`Chart.from_free`."""
        return self._join(
            [part.from_free(piece) for part, piece in zip(self._charts, self._split_free(free), strict=True)]
        )

    def to_free(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.to_free`."""
        pieces = [part.to_free(piece) for part, piece in zip(self._charts, self._split(x), strict=True)]
        if self._aligned:
            return self._join(pieces)
        batch = x.shape[: x.ndim - len(self.event_shape)]
        return torch.cat([piece.reshape(*batch, -1) for piece in pieces], -1)

    def log_det(self, free: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Chart.log_det`."""
        pieces = zip(self._charts, self._split_free(free), self._split(x), strict=True)
        return torch.stack([part.log_det(image, piece) for part, image, piece in pieces]).sum(0)

    def inside(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.inside`."""
        pieces = zip(self._charts, self._split(x), strict=True)
        return torch.stack([part.inside(piece) for part, piece in pieces]).all(0)

    def canonical(self, x: Tensor) -> Tensor:
        """See :meth:`Chart.canonical`."""
        return self._join([part.canonical(piece) for part, piece in zip(self._charts, self._split(x), strict=True)])

    @property
    def _charts(self) -> list[Chart]:
        return list(self.parts)  # type: ignore[arg-type]

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        if self._stacked:
            return x.unbind(self._dim)
        return x.split([part.event_shape[self._dim] for part in self._charts], self._dim)

    def _split_free(self, free: Tensor) -> Sequence[Tensor]:
        if not self._aligned:
            batch = free.shape[:-1]
            pieces = free.split([part.free_shape.numel() for part in self._charts], -1)
            return [piece.reshape(*batch, *part.free_shape) for part, piece in zip(self._charts, pieces, strict=True)]
        if self._stacked:
            return free.unbind(self._dim)
        return free.split([part.free_shape[self._dim] for part in self._charts], self._dim)

    def _join(self, pieces: list[Tensor]) -> Tensor:
        return torch.stack(pieces, self._dim) if self._stacked else torch.cat(pieces, self._dim)


def _fitting(value: float | Tensor, shape: torch.Size) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.double)
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"support expects bounds that broadcast to events of shape {tuple(shape)}, got bounds of shape "
            f"{tuple(value.shape)}"
        )
    return value


def _event_axis(dim: int, axes: int) -> int:
    """An axis of events, counted from the end: without a sign it counts those of one event, as torch's default does."""
    if not -axes <= dim < axes:
        raise ValueError(f"support expects dim among the {axes} axes of one event (rows do not count), got {dim}")
    return dim - axes if dim >= 0 else dim


def _joined(support: Any, shape: torch.Size) -> Chart:
    stacked, dim = isinstance(support, constraints.stack), _event_axis(support.dim, len(shape))
    before, after = shape[: len(shape) + dim], shape[len(shape) + dim + 1 :]
    lengths = [1] * len(support.cseq) if stacked else list(support.lengths)
    if sum(lengths) != shape[dim]:
        how = "entries" if stacked else "entries in the sum of its lengths"
        raise ValueError(
            f"support expects {shape[dim]} {how} along axis {dim} of events of shape {tuple(shape)}, got {sum(lengths)}"
        )
    inner = [(*before, *after) if stacked else (*before, length, *after) for length in lengths]
    parts = [_chart_of(part, torch.Size(own)) for part, own in zip(support.cseq, inner, strict=True)]
    if all(isinstance(part, Box) for part in parts):
        return _one_box(parts, dim, stacked, shape)  # many columns in one go
    return Joined(parts if stacked else _merged(parts, dim), dim, stacked, shape)


def _merged(parts: list[Chart], dim: int) -> list[Chart]:
    """Parts of a cat with neighbouring boxes made one."""
    merged: list[Chart] = []
    for part in parts:
        if merged and isinstance(part, Box) and isinstance(merged[-1], Box):
            shape = list(part.event_shape)
            shape[dim] += merged[-1].event_shape[dim]
            merged[-1] = _one_box([merged[-1], part], dim, False, torch.Size(shape))
        else:
            merged.append(part)
    return merged


def _one_box(parts: Sequence[Any], dim: int, stacked: bool, shape: torch.Size) -> Box:
    join = torch.stack if stacked else torch.cat
    lower = join([part.lower.expand(part.event_shape) for part in parts], dim)
    upper = join([part.upper.expand(part.event_shape) for part in parts], dim)
    return Box(lower, upper, shape)
