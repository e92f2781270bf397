"""Pictures of flows and posteriors. Needs matplotlib (the extra ``demo``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .files import check_writable, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_rows(rows: Sequence[tuple[str, Any]], *, vmin: float = 0.0, vmax: float = 1.0, title: str = "") -> "Figure":
    """Rows of grey-scale images under captions.

    Args:
        rows: pairs of a caption and images of shape ``(n, height, width)``; NaN pixels are drawn in red.
        vmin: value drawn white.
        vmax: value drawn black.
        title: above all.
    """
    columns = max(len(images) for _, images in rows)
    figure = new_figure(1.05 * columns + 1.6, 1.15 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (caption, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(caption, rotation=0, ha="right", va="center")
        for axis, image in zip(line, _array(images), strict=False):
            _draw(axis, image, vmin, vmax)
        for axis in line[len(images) :]:
            axis.set_visible(False)
    figure.suptitle(title)
    return figure


def posterior_images(observation: Any, draws: Any, truth: Any, *, shown: int = 8, title: str = "") -> "Figure":
    """An image posterior at a glance: observation, mean, standard deviation, truth; below, draws.

    Args:
        observation: ``(height, width)``, NaN where nothing was seen.
        draws: ``(n, height, width)``.
        truth: ``(height, width)``.
        shown: how many draws.
        title: above all.
    """
    draws = _array(draws)
    figure = new_figure(1.25 * max(shown, 4), 3.3)
    grid = figure.add_gridspec(2, shown)
    spread = draws.std(0)
    top: list[tuple[str, np.ndarray, float]] = [
        ("observation", _array(observation), 1.0),
        ("posterior mean", draws.mean(0), 1.0),
        (f"posterior sd (max {spread.max():.2f})", spread, float(spread.max())),
        ("truth", _array(truth), 1.0),
    ]
    width = shown // len(top)
    for k, (caption, image, vmax) in enumerate(top):
        axis = figure.add_subplot(grid[0, k * width : (k + 1) * width])
        _draw(axis, image, 0.0, vmax)
        axis.set_title(caption, fontsize=9)
    for k, draw in enumerate(draws[np.linspace(0, len(draws) - 1, shown).astype(int)]):
        axis = figure.add_subplot(grid[1, k])
        _draw(axis, draw, 0.0, 1.0)
        if k == 0:
            axis.set_ylabel("draws", fontsize=9)
    figure.suptitle(title)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure to a file, in the format that its name ends in, atomically."""
    kind = check_picture(path)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format=kind))


def check_picture(path: str | Path) -> str:
    """The format of a picture by the ending of its name, before anything is drawn.

    Raises:
        ImportError: without matplotlib.
        ValueError: if matplotlib does not write that format, or nothing can be written there.
    """
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    kind = check_writable(path).suffix.lower().removeprefix(".")
    if kind not in known:
        raise ValueError(f"expected the name of a picture to end in .png, .pdf or .svg, got {path}")
    return kind


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches, tied to no window or notebook."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; install it with: pip install 'ifpyro[demo]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw(axis: Any, image: np.ndarray, vmin: float, vmax: float) -> None:
    import matplotlib

    colours = matplotlib.colormaps["gray_r"].with_extremes(bad="#e8a0a0")
    axis.imshow(np.ma.masked_invalid(image), cmap=colours, vmin=vmin, vmax=vmax)
    axis.set_xticks([])
    axis.set_yticks([])


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
