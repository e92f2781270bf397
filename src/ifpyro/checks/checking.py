"""``check(flow, held_out)``: what a careful user asks before trusting a flow. The questions are in ``questions.py``."""

import hashlib
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.arguments import check_seed, check_type, is_integer, is_number
from ..data.samples import as_samples, to_unconstrained
from ..data.support import support_to_dict
from ..flow.conditional import ConditionalFlow
from ..flow.flow import InflationaryFlow
from ..flow.tuning import latent_power
from .conditional import check_pairs
from .questions import (
    MEASURED_ROWS,
    PAIRS,
    Level,
    Solved,
    below_gaussian,
    encoded,
    gaussian,
    generated,
    latent,
    not_finite,
    numerical,
    over_fitting,
    power_of_tests,
    seen_in_training,
)
from .result import CheckResult
from .rows import Row
from .two_sample import Array

MINIMUM = 32  # held-out rows; below, nothing but a grossly wrong flow could be told from chance
_SHOWN = 300  # points a cloud in the picture
_QUANTILES = 41


def check(
    flow: InflationaryFlow | ConditionalFlow,
    held_out: Any,
    *,
    condition: Any = None,
    train: Any = None,
    rows: int = 2000,
    level: float = 0.01,
    seed: int = 0,
    store: bool = True,
) -> CheckResult:
    """Whether a flow can be trusted: its numerics, its latents, what it generates, and whether it over-fits.

    Args:
        flow: the flow.
        held_out: data that training has not seen, neither as samples nor for early stopping: ``(N, *event_shape)``.
        condition: the conditions of the held-out rows, ``(N, *condition_shape)``, for a conditional flow; what is asked
            then is told in :mod:`ifpyro.checks.conditional`, and ``train`` does not count.
        train: the training data, for over-fitting and the Gaussian to compare with; without them the figures that
            :func:`ifpyro.fit` left in ``flow.report`` and the flow's own mean and covariance serve.
        rows: most rows used, chosen at random; tests on pairs of rows use at most 1000 of them, numerics and
            log-densities at most 256, fewer in many dimensions.
        level: probability that a correct flow gets any tested row wrong.
        seed: of the choice of rows, of what is generated, and of permutations.
        store: keep the result in ``flow.report["check"]``, and so in the flow's file.

    Returns:
        The table; ``.passed``, ``.rows``, ``.plot()``, ``.to_json()``.

    Raises:
        TypeError: if the data are not an array of real numbers.
        ValueError: on a wrong event shape, rows that are not finite or outside the support (with their indices), too
            few rows, or options out of range.

    Example:
        >>> result = ifpyro.check(flow, flow.sample(200, seed=0))
        >>> result.passed
        True
    """
    start = time.perf_counter()
    if isinstance(flow, ConditionalFlow) != (condition is not None):
        raise ValueError(
            "a conditional flow is checked on pairs, check(flow, held_out, condition=c), and another without conditions"
        )
    if isinstance(flow, ConditionalFlow):
        _check_options(rows, level)
        found = check_pairs(flow, held_out, condition, rows=rows, level=level, seed=seed)
        if store:
            flow.report["check"] = found.to_dict()
        return found
    check_type("check", flow, InflationaryFlow, "a flow and then held-out data")
    _check_options(rows, level)
    seed = check_seed(seed)
    x = _rows_of(flow, held_out, "held_out", MINIMUM)
    seen = None if train is None else _rows_of(flow, train, "train", max(MINIMUM, flow.latent_dim + 2))
    chosen = _some(x, rows, seed)
    with torch.no_grad():
        answers, picture = _answers(flow, chosen, seen, Level.of(level), seed)
    settings = {
        "rows": len(chosen),
        "held_out_rows": len(x),
        "train_rows": None if seen is None else len(seen),
        "level": level,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 2),
    }
    result = CheckResult(tuple(answers), settings, picture, fingerprint(flow))
    if store:
        flow.report["check"] = result.to_dict()
    return result


def stored(flow: InflationaryFlow) -> CheckResult:
    """The result that :func:`check` left in the flow or its file.

    Raises:
        ValueError: if there is none, or the map has changed since.
    """
    if "check" not in flow.report:
        raise ValueError("expected a flow with a stored check, found none; run ifpyro.check(flow, held_out)")
    result = CheckResult.from_dict(flow.report["check"])
    if result.fingerprint != fingerprint(flow):
        raise ValueError("the flow has changed since it was checked; run ifpyro.check(flow, held_out) again")
    return result


def fingerprint(flow: InflationaryFlow) -> str:
    """A digest of all that decides the flow's fine map."""
    digest = hashlib.sha256(repr((flow.schedule.to_dict(), flow.grid, flow.refinements)).encode())
    if flow.support is not None:
        digest.update(repr(support_to_dict(flow.support)).encode())
    for name, tensor in sorted(flow.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _answers(
    flow: InflationaryFlow, x: Tensor, train: Tensor | None, level: Level, seed: int
) -> tuple[list[Row], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    drawn = flow.sample(min(PAIRS, max(len(x), MINIMUM)), seed=seed)
    z = encoded(flow, x)
    usable, whole = z.isfinite().all(-1), drawn.flatten(1).isfinite().all(-1)
    answers = [not_finite(usable, whole)]
    x, z, drawn = x[usable], z[usable], drawn[whole]
    if min(len(x), len(drawn)) < MINIMUM:
        return answers, {}  # what is left is no sample of anything
    latents, solved = _numbers(z), Solved.of(flow, x)
    answers += numerical(flow, x, solved)
    answers.append(power_of_tests(len(x), flow.latent_dim, level))
    answers += latent(latents, rng, level)
    on_train = flow.report.get("training", {}).get("latents")
    free = None
    if train is not None:
        answers.append(seen_in_training(x, train))
        on_train = latent_power(flow, train)
        free = to_unconstrained(train, flow.chart, "train")
    if on_train is not None:
        answers.append(over_fitting(latents, on_train, level))
    answers += generated(_numbers(x.flatten(1)), _numbers(drawn.flatten(1)), rng, level)
    answers.append(below_gaussian(solved, gaussian(flow, free), level))
    return answers, _picture(flow, x, drawn, latents, on_train)


def _picture(
    flow: InflationaryFlow, x: Tensor, drawn: Tensor, z: Array, on_train: dict[str, Any] | None
) -> dict[str, Any]:
    """The few numbers that the picture shows, however large the data."""
    from scipy.stats import chi2

    own = gaussian(flow, None)  # its latents are the standardised coordinates of the data
    clouds = [own.encode(rows[:_SHOWN])[:, :2] for rows in (x, drawn)]
    few = x[:MEASURED_ROWS]
    times, path = flow.trajectory(few, flow.grid.steps)
    finer = flow.trajectory(few, 2 * flow.grid.steps)[1][::2]
    error = ((path - finer) / finer.std(1, keepdim=True)).square().mean((1, 2)).sqrt()
    share = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    quantiles = np.quantile(z, share, axis=0)
    radius = np.histogram(chi2.cdf(np.square(z).sum(1), z.shape[1]), bins=20, range=(0, 1))[0]
    return {
        "share": _short(share),
        "quantiles": {
            "low": _short(quantiles.min(1)),
            "all": _short(np.quantile(z, share)),
            "high": _short(quantiles.max(1)),
        },
        "radius": radius.tolist(),
        "power": _short(np.square(z).mean(0)),
        "train_power": None if on_train is None else on_train["axes"],
        "held_out": _short(_numbers(clouds[0])),
        "generated": _short(_numbers(clouds[1])),
        "times": _short(_numbers(times)),
        "path_error": _numbers(error).tolist(),
    }


def _rows_of(flow: InflationaryFlow, x: Any, name: str, least: int) -> Tensor:
    rows = as_samples(x, name, flow.dtype).to(flow.device)
    if rows.shape[1:] != flow.event_shape:
        raise ValueError(
            f"expected {name} of shape (N, {', '.join(map(str, flow.event_shape))}), as the flow was trained on, got "
            f"{tuple(rows.shape)}"
        )
    if len(rows) < least:
        raise ValueError(f"expected at least {least} rows of {name}, got {len(rows)}; fewer could not tell anything")
    to_unconstrained(rows, flow.chart, name)  # refuses rows outside, with their indices
    return flow.chart.canonical(rows)


def _some(x: Tensor, rows: int, seed: int) -> Tensor:
    """At most ``rows`` of ``x``, in random order."""
    # Not torch's generator: with the seed of fit() it would repeat fit()'s choice, and pick its validation rows first.
    chosen = np.random.default_rng(seed).permutation(len(x))[:rows]
    return x[torch.as_tensor(chosen, device=x.device)]


def _check_options(rows: int, level: float) -> None:
    if not is_integer(rows, MINIMUM):
        raise ValueError(f"rows expects an integer of at least {MINIMUM}, got {rows!r}")
    if not (is_number(level) and 1e-3 <= level <= 0.2):
        raise ValueError(
            f"level expects a probability between 0.001 (below, permutations take minutes) and 0.2, got {level!r}"
        )


def _numbers(values: Tensor) -> Array:
    return values.double().cpu().numpy()


def _short(values: Array) -> Any:
    return np.round(values, 4).tolist()
