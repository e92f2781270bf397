"""The picture of a check: what its table says in numbers. Needs matplotlib and scipy (the extra ``check``)."""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..core.figures import new_figure
from .rows import COLOURS, Row, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#3367a8", "#d1701f", "#b8b8b8"


class _Result(Protocol):
    """What a picture asks of a check."""

    @property
    def rows(self) -> tuple[Row, ...]: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def picture(self) -> dict[str, Any]: ...

    @property
    def verdict(self) -> Verdict: ...

    def __getitem__(self, name: str) -> Row: ...


def check_figure(result: _Result) -> "Figure":
    """Six panels: verdicts, latent quantiles, latent radius, latent variance, samples beside data, solver error."""
    figure = new_figure(13.5, 7.6)
    panels = figure.subplots(2, 3)
    _verdicts(panels[0, 0], result)
    if result.picture:
        _quantiles(panels[0, 1], result)
        _radius(panels[0, 2], result.picture)
        _power(panels[1, 0], result.picture)
        _clouds(panels[1, 1], result.picture)
        _path(panels[1, 2], result)
    else:
        for panel in panels.flat[1:]:
            panel.set_visible(False)
    for panel in panels.flat:
        panel.title.set_fontsize(10)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    verdict = result.verdict
    figure.suptitle(
        f"check on {result.settings['rows']} held-out rows: {verdict}", color=COLOURS[verdict], weight="bold"
    )
    return figure


def _verdicts(axis: Any, result: _Result) -> None:
    """Every row's value over the size at which it fails (or warns, where it never fails), on a logarithmic scale."""
    floor = 1e-3
    for k, row in enumerate(result.rows):
        share = min(max(_share_of_limit(row), 1.3 * floor), 30.0)
        axis.plot([floor, share], [k, k], color=COLOURS[row.verdict], lw=5, solid_capstyle="butt")
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xscale("log")
    axis.set_xlim(floor, 40)
    axis.set_yticks(range(len(result.rows)), [row.name for row in result.rows])
    for label, row in zip(axis.get_yticklabels(), result.rows, strict=True):
        label.set_color(COLOURS[row.verdict])
    axis.invert_yaxis()
    axis.set_xlabel("value / limit", fontsize=8)
    axis.set_title("pass, warn, fail (tests need evidence as well as size)")


def _share_of_limit(row: Row) -> float:
    limit = row.fail_above or row.warn_above or 1.0
    value = row.value if np.isfinite(row.value) else np.inf
    if row.unit == "accuracy":  # guessing is no difference
        value, limit = value - 0.5, limit - 0.5
    return max(value, 0.0) / limit


def _quantiles(axis: Any, result: _Result) -> None:
    from scipy.stats import norm

    share, quantiles = np.asarray(result.picture["share"]), result.picture["quantiles"]
    normal, axes = norm.ppf(share), len(result.picture["power"])
    axis.axhline(0, color="black", lw=0.8)
    low, high, pooled = (np.asarray(quantiles[name]) - normal for name in ("low", "high", "all"))
    axis.fill_between(normal, low, high, color=_BLUE, alpha=0.2, lw=0, label="range over axes")
    axis.plot(normal, pooled, color=_BLUE, label="all axes together")
    error = np.sqrt(share * (1 - share) / result.settings["rows"]) / norm.pdf(normal)  # of a sample quantile
    widest = error * norm.isf(0.005 / axes)
    axis.plot(normal, widest, color="black", lw=0.8, ls="--", label="99% of ranges, if right")
    axis.plot(normal, -widest, color="black", lw=0.8, ls="--")
    reach = max(0.3, 1.1 * float(np.max(np.abs([low, high, widest]))))
    axis.set_ylim(-reach, reach)
    axis.set_xlabel("quantile of N(0, 1)", fontsize=8)
    axis.set_ylabel("latent's quantile, less that of N(0, 1)", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.set_title("held-out latents: quantiles, flat is right")


def _radius(axis: Any, picture: dict[str, Any]) -> None:
    from scipy.stats import binom

    counts = np.asarray(picture["radius"])
    total, bins = int(counts.sum()), len(counts)
    low, high = binom.ppf([0.005, 0.995], total, 1 / bins)
    axis.axhspan(low, high, color=_GREY, alpha=0.4, lw=0, label="99% a bar, if right")
    axis.bar((np.arange(bins) + 0.5) / bins, counts, 0.9 / bins, color=_BLUE)
    axis.set_xlabel("chi-square CDF of |z|²", fontsize=8)
    axis.set_ylabel("held-out rows", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.set_title("held-out latents: radius, flat is right")


def _power(axis: Any, picture: dict[str, Any]) -> None:
    held_out, train = np.asarray(picture["power"]), picture["train_power"]
    axes = np.arange(len(held_out))
    axis.axhline(1, color="black", lw=0.8)
    style = {"ls": "", "marker": "o", "ms": max(3.0, 6.0 - len(axes) / 20)}
    axis.plot(axes, held_out, color=_ORANGE, label=f"held out, mean {held_out.mean():.2f}", **style)
    if train is not None:
        axis.plot(axes, train, color=_BLUE, label=f"train, mean {np.mean(train):.2f}", **style)
    axis.set_ylim(0, max(1.6, 1.25 * held_out.max()))
    axis.set_xlim(-0.5, len(axes) - 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("latent axis, leading first", fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    axis.set_title("variance of latents: one is right, a gap is over-fitting")


def _clouds(axis: Any, picture: dict[str, Any]) -> None:
    held_out, generated = (np.asarray(picture[name]) for name in ("held_out", "generated"))
    axis.set_title("samples beside data, in standard deviations")
    if held_out.shape[1] == 1:
        both = np.concatenate([held_out, generated])
        bins = np.linspace(both.min(), both.max(), 25)
        axis.hist(held_out[:, 0], bins, density=True, color=_ORANGE, alpha=0.5, label="held out")
        axis.hist(generated[:, 0], bins, density=True, histtype="step", color=_BLUE, lw=1.5, label="generated")
        axis.set_xlabel("the only axis", fontsize=8)
    else:
        axis.plot(*held_out.T, "o", color=_ORANGE, ms=3, alpha=0.6, mew=0, label="held out")
        axis.plot(*generated.T, "o", color=_BLUE, ms=3, alpha=0.6, mew=0, label="generated")
        axis.set_xlabel("leading axis", fontsize=8)
        axis.set_ylabel("second axis", fontsize=8)
    axis.legend(fontsize=8, frameon=False)


def _path(axis: Any, result: _Result) -> None:
    times, error = np.asarray(result.picture["times"]), np.asarray(result.picture["path_error"], dtype=float)
    row = result["solver, map"]
    axis.plot(times[1:], np.maximum(error[1:], 1e-9), "o-", color=_BLUE, ms=4)
    for limit, verdict in ((row.warn_above, "warn"), (row.fail_above, "fail")):
        axis.axhline(limit, color=COLOURS[verdict], lw=0.8, ls="--")
        axis.text(1.0, limit, f"{verdict} ", color=COLOURS[verdict], fontsize=8, ha="right", va="bottom")
    axis.set_yscale("log")
    axis.set_xlabel("time of each step: 0 data, 1 latent", fontsize=8)
    axis.set_ylabel("RMSE so far, standard deviations", fontsize=8)
    axis.set_title(f"solver: {len(times) - 1} steps against twice as many")
