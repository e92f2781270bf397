"""Distribution functions of ranks in their simultaneous bands."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.figures import new_figure
from .arrays import Array
from .bands import grid, simultaneous_band

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ecdf_differences(
    values: Array, captions: Sequence[str], *, prob: float = 0.99, title: str = "", columns: int = 4
) -> "Figure":
    """Empirical minus uniform distribution function, one panel per sample.

    A calibrated engine stays inside the band everywhere with probability ``prob``. Above it on the left and below
    on the right: posteriors too narrow. The other way round: too wide. A hill: posteriors lie above the truth.

    Args:
        values: numbers in (0, 1), ``(Q, n)``.
        captions: of the panels.
        prob: of the simultaneous band.
        title: above all.
        columns: panels in a row.

    Example:
        >>> ranks = np.random.default_rng(0).uniform(size=(2, 100))
        >>> figure = ifpyro.calibration.ecdf_differences(ranks, ["x[0]", "x[1]"])
        >>> figure.savefig("ranks.png")
    """
    values = np.atleast_2d(values)
    points = grid(values.shape[1])
    low, high = simultaneous_band(values.shape[1], points, prob)
    columns = min(columns, len(values))
    rows = math.ceil(len(values) / columns)
    figure = new_figure(2.6 * columns + 0.4, 2.0 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis, sample, caption in zip(axes.flat, values, captions, strict=False):
        line = (sample[:, None] <= points).mean(0)
        outside = bool(((line < low - 1e-12) | (line > high + 1e-12)).any())
        axis.fill_between(points, low - points, high - points, color="0.85", lw=0, step="mid")
        axis.axhline(0.0, color="0.6", lw=0.7)
        axis.plot(points, line - points, color="#c03030" if outside else "#205080", lw=1.3)
        axis.set_title(caption, fontsize=9)
    for axis in axes.flat[len(values) :]:
        axis.set_visible(False)
    figure.supylabel("ECDF − uniform", fontsize=9)
    figure.supxlabel("rank", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
