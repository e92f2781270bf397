"""Whether a conditional flow can be trusted, for all conditions at once.

The latent of every condition is ``N(0, I)``. The latents of held-out pairs are hence tested for that, and for not
depending on the condition; and pairs of generated samples and conditions are compared with held-out pairs, which a flow
that ignores its condition cannot pass.
"""

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..data.samples import as_samples, to_unconstrained
from ..flow.conditional import ConditionalFlow
from ..flow.flow import log_normal
from ..flow.tuning import affordable, round_trip
from .questions import MEASURED_ROWS, PAIRS, Level, generated, latent, not_finite, over_fitting, power_of_tests
from .result import CheckResult
from .rows import Row, by_evidence, by_size
from .two_sample import Array, mean_above

BINS = 5
"""Groups of conditions, by each feature, in which latents are looked at."""

MATTERS = {"latent and condition": 0.1, "latent in groups": 0.25, "below regression": 0.01}
"""Tests: the size above which a significant deviation fails, in standard deviations or nats an axis."""

ROUND_TRIP = (1e-3, 1e-2)


@dataclass(frozen=True)
class Pairs:
    """Held-out pairs in numbers."""

    x: Tensor
    c: Tensor
    features: Tensor


def check_pairs(
    flow: ConditionalFlow, held_out: Any, condition: Any, *, rows: int = 2000, level: float = 0.01, seed: int = 0
) -> CheckResult:
    """Whether a conditional flow can be trusted, measured on held-out pairs.

    Args:
        flow: The flow.
        held_out: Data that training has not seen, ``(N, *event_shape)``.
        condition: Their conditions, ``(N, *condition_shape)``.
        rows: Most pairs used, chosen at random.
        level: Probability that a correct flow gets any tested row wrong.
        seed: Of the choice of pairs, of what is generated, and of permutations.

    Raises:
        TypeError: If the data are not arrays of real numbers.
        ValueError: On wrong shapes, too few pairs, rows outside the support, or conditions that cannot be given.
    """
    began = time.perf_counter()
    x = as_samples(held_out, "held_out", flow.dtype).to(flow.device)
    c = condition if isinstance(condition, Tensor) else torch.as_tensor(np.asarray(condition))
    if x.shape[1:] != flow.event_shape or len(x) < 32 or len(c) != len(x):
        raise ValueError(
            f"expected at least 32 held-out rows of shape {tuple(flow.event_shape)} with a condition each, got "
            f"{tuple(x.shape)} and {tuple(c.shape)}"
        )
    to_unconstrained(x, flow.chart, "held_out")  # refuses rows outside, with their indices
    chosen = torch.as_tensor(np.random.default_rng(seed).permutation(len(x))[:rows], device=x.device)
    x, c = flow.chart.canonical(x[chosen]), c.to(x.device)[chosen]
    with torch.no_grad():
        checked = flow.conditions.check(c, flow.dtype, flow.device)
        answers = _answers(flow, Pairs(x, c, flow.conditions(checked)), Level.of(level), seed)
    settings = {
        "rows": len(x),
        "held_out_rows": len(x),
        "train_rows": None,
        "level": level,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 2),
    }
    return CheckResult(tuple(answers), settings, {})


def _answers(flow: ConditionalFlow, pairs: Pairs, level: Level, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    x, c = pairs.x, pairs.c
    z = flow.encode(x, c, batch_size=2048)
    drawn = flow.sample(c[:PAIRS], seed=seed)
    answers = [not_finite(z.isfinite().all(-1), drawn.flatten(1).isfinite().all(-1))]
    if answers[0].verdict == "fail":
        return answers
    few = affordable(MEASURED_ROWS, flow)
    error = round_trip(flow.given(c[:few]), x[:few])[0]
    answers.append(by_size("round trip", error, "sd", *ROUND_TRIP, f"RMSE over {len(x[:few])} pairs"))
    answers.append(power_of_tests(len(x), flow.latent_dim, level))
    latents, features = _numbers(z), _numbers(pairs.features)
    answers += latent(latents, rng, level)
    answers += [_dependence(latents, features, level), _groups(latents, features, level)]
    on_train = flow.report.get("training", {}).get("latents")
    if on_train is not None:
        answers.append(over_fitting(latents, on_train, level))
    together = [
        np.concatenate([_numbers(rows.flatten(1)), features[: len(rows)]], 1) for rows in (x[:PAIRS], drawn[:PAIRS])
    ]
    answers += generated(together[0], together[1], rng, level)
    answers.append(_below_regression(flow, pairs, few, level))
    return answers


def _dependence(z: Array, features: Array, level: Level) -> Row:
    """The largest correlation of a latent, or of its square, with a feature."""
    spread = features.std(0)
    f = (features - features.mean(0)) / np.where(spread > 0, spread, 1.0)
    moments = np.concatenate([z, (z**2 - 1) / math.sqrt(2)], 1)
    moments = (moments - moments.mean(0)) / moments.std(0)
    correlation = np.abs(moments.T @ f) / len(z)
    axis, feature = np.unravel_index(correlation.argmax(), correlation.shape)
    worst = float(correlation.max())
    p = min(1.0, correlation.size * 2 * float(stats.norm.sf(worst * math.sqrt(len(z)))))
    what = "mean" if axis < z.shape[1] else "width"
    note = f"largest correlation: {what} of axis {axis % z.shape[1]} with feature {feature}"
    name = "latent and condition"
    return by_evidence(name, worst, MATTERS[name], p, level.each, "sd", note)


def _groups(z: Array, features: Array, level: Level) -> Row:
    """The largest shift of latents among groups of like conditions."""
    worst, p, note, count = 0.0, 1.0, "", 0
    for feature in range(features.shape[1]):
        column = features[:, feature]
        edges = np.unique(np.quantile(column, np.linspace(0, 1, BINS + 1)))
        for low, high in pairwise(edges):
            rows = (column >= low) & ((column < high) | (high == edges[-1]))
            if rows.sum() < 20:
                continue
            count += 1
            mean = z[rows].mean(0)
            found = float(stats.chi2.sf(rows.sum() * float(mean @ mean), z.shape[1]))
            if found <= p:
                worst, p = float(np.abs(mean).max()), found
                note = f"worst for feature {feature} in [{low:.3g}, {high:.3g}], {rows.sum()} pairs"
    name = "latent in groups"
    return by_evidence(name, worst, MATTERS[name], min(1.0, max(count, 1) * p), level.each, "sd", note)


def _below_regression(flow: ConditionalFlow, pairs: Pairs, few: int, level: Level) -> Row:
    x, c = pairs.x[:few], pairs.c[:few]
    given = flow.given(c)
    own = _numbers(given.log_prob(x))
    v, _, inside = given.standardise(x, with_log_det=True)
    other = _numbers(log_normal(v) - flow.basis.log_det() - inside)
    deficit = mean_above(other - own)
    note = f"mean log-density {own.mean():.2f}, regression {other.mean():.2f}, {len(own)} pairs"
    name = "below regression"
    return by_evidence(name, deficit.effect / flow.latent_dim, MATTERS[name], deficit.p, level.each, "nat/axis", note)


def _numbers(values: Tensor) -> Array:
    return values.double().cpu().numpy()
