"""Circular columns: angles, phases, hours."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint


class Circular(Constraint):
    """Values on a circle, see :func:`circular`."""

    is_discrete = False
    event_dim = 0

    def __init__(self, period: Any = 2 * math.pi, cut: Any = None) -> None:
        self.period = exact_number(period, "support circular: period")
        lengths = torch.as_tensor(self.period)
        if not bool(((lengths > 0) & lengths.isfinite()).all()):
            raise ValueError(f"support circular: period expects positive numbers, got {period!r}")
        self.cut = None if cut is None else exact_number(cut, "support circular: cut")
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Every finite number is a point of the circle."""
        return value.isfinite()

    def __repr__(self) -> str:
        return f"circular(period={self.period}, cut={self.cut})"


def circular(period: Any = 2 * math.pi, cut: Any = None) -> Circular:
    """The support of angles, phases, hours: ``x`` and ``x + period`` are the same point.

    Samples may come in any turn, and in several. Densities and latents of ``x`` are those of its point, whatever its
    turn; what a flow returns lies in the turn from ``cut`` to ``cut + period``, and to have it elsewhere (hours from 0
    to 24) use ``torch.remainder``. A likelihood has to be periodic in ``x`` itself, as ``VonMises``, or a function of
    its sine and cosine, is. By default the circle is cut where the training data are scarcest, so that the answer does
    not depend on where theirs was. The map from the latent is smooth within that turn and does not lead across the cut:
    where a prior without an empty place meets a likelihood that puts the posterior there, it has two modes in the
    latent, which :class:`~ifpyro.SMC` weighs correctly and single chains rarely cross between.

    Args:
        period: length of the circle, or one for every column.
        cut: where a turn begins; by default where the training data are scarcest (of a flow that is not trained,
            ``-period / 2``).

    Example:
        >>> hours = torch.remainder(1.5 * torch.randn(400, 1), 24.0)  # around midnight
        >>> flow = ifpyro.fit(hours, support=ifpyro.circular(period=24.0), max_steps=20, seed=0, progress=False)
        >>> torch.allclose(flow.log_prob(torch.tensor([[23.5]])), flow.log_prob(torch.tensor([[-0.5]])), atol=1e-4)
        True
    """
    return Circular(period, cut)


def emptiest_place(x: Tensor, period: float) -> float:
    """Where a circle is best cut: the middle of the widest gap within the widest arc that holds ``sqrt(N)`` values.

    Gaps of single neighbours would follow chance where values are dense. The place moves with the values: of data that
    are turned by an angle, the cut is turned by it too. Of its representatives it is the one from which the turn begins
    that holds most values as they came.

    Args:
        x: values in any turn, ``(N,)``, double precision.
        period: length of the circle.
    """
    points = torch.remainder(x, period).sort().values
    count = len(points)
    ahead = max(1, min(count, round(math.sqrt(count))))
    around = torch.cat([points, points + period, points[:1] + 2 * period])
    start = int((around[ahead : ahead + count] - around[:count]).argmax())
    arc = around[start : start + ahead + 1]
    middles = 0.5 * (arc[1:] + arc[:-1])
    central = 1 - (middles - 0.5 * (arc[0] + arc[-1])).abs() / (arc[-1] - arc[0])  # 1 to 1/2: of like gaps the inmost
    widest = int((arc.diff() * central).argmax())
    cut = float(arc[widest] + arc[widest + 1]) / 2
    turns = ((x - cut) / period).floor()
    return cut + period * float(turns.mode().values)


def exact_number(value: Any, name: str) -> float | Tensor:
    """A float, or a double tensor on the CPU, of whatever the user gave as a bound.

    Raises:
        ValueError: if it is no number, or NaN.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} expects a number or an array of numbers, got {value!r}")
    try:
        number = value.detach().double().cpu() if isinstance(value, Tensor) else torch.tensor(np.asarray(value, float))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} expects a number or an array of numbers, got {value!r}") from error
    if bool(number.isnan().any()):
        raise ValueError(f"{name} expects numbers, got NaN in {value!r}")
    return float(number) if number.ndim == 0 else number
