r"""TARP: coverage of whole posteriors, from distances to reference points (Lemos et al. 2023).

Around a reference point ``r`` take the ball that just reaches the truth ``theta``. The posterior's probability of that
ball, estimated by draws ``theta_l``,

    f = P(|theta_l - r| < |theta - r|),

is uniform over data sets if the posterior is right, whatever ``r`` is, and if it is uniform for enough ``r`` the
posterior is right in all its dimensions (Lemos et al. 2023, theorem 3). Where rank tests look along axes, this looks
along any direction.

A reference far from a posterior sees it along one line, and so sees shifts; one that is redrawn for each data
set sees them from all sides, where they cancel. Here a few references are shared by all data sets, and
the tests that they give are combined.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.arguments import check_seed
from .arrays import Array, check_probability, to_array, truth_and_draws
from .bands import grid, simultaneous_band
from .ranks import Uniformity, combine, uniform_ranks, uniformity

SPREAD = 2.0
"""Standard deviation of the references in units of that of the truths."""


@dataclass(frozen=True)
class Tarp:
    """TARP of ``S`` data sets with ``R`` references."""

    values: Array
    """``f`` of every reference and data set, made exactly uniform under calibration, ``(R, S)``."""
    references: Array
    """``(R, d)`` or ``(R, S, d)``"""
    tests: tuple[Uniformity, ...]
    """Of each reference."""
    p_value: float
    """All references combined."""
    credibility: Array
    """Levels at which coverage is looked at, ``(K,)``."""
    coverage: Array
    """Expected coverage there, the distribution function of ``f``, ``(R, K)``."""
    low: Array
    """Lower edge of the simultaneous band of one reference, ``(K,)``."""
    high: Array
    """Upper edge of it, ``(K,)``."""
    prob: float
    """Probability of the band."""

    @property
    def passed(self) -> bool:
        """Whether the combined p-value is at least ``1 - prob``."""
        return self.p_value >= 1 - self.prob

    def __str__(self) -> str:
        outside = sum(test.band < 1 - self.prob for test in self.tests)
        verdict = "no sign of miscalibration" if self.passed else "miscalibrated"
        return (
            f"TARP: {self.values.shape[1]} data sets, {len(self.tests)} references, {outside} outside their "
            f"{self.prob:.0%} band, p = {self.p_value:.2g}: {verdict}"
        )


def tarp(
    truth: Any,
    draws: Any,
    *,
    num_references: int = 20,
    references: Any = None,
    prob: float = 0.99,
    seed: int = 0,
) -> Tarp:
    """Test posteriors by distances to reference points.

    Args:
        truth: true values, ``(S, d)``: one row per data set.
        draws: posterior draws for each, equally weighted and independent, ``(S, L, d)``.
        num_references: how many references to draw, around the truths and beyond.
        references: your own, ``(R, d)``, or ``(R, S, d)`` with one for each data set; these may depend on data but
            not on the truth.
        prob: probability of the simultaneous band of one reference; ``1 - prob`` is the size of the test.
        seed: of references and ties.

    Raises:
        ValueError: for other shapes, or NaN.

    Distances are taken in coordinates divided by the standard deviations of the truths.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> truth, draws = rng.normal(size=(200, 3)), rng.normal(size=(200, 100, 3))
        >>> ifpyro.calibration.tarp(truth, draws).passed
        True
        >>> ifpyro.calibration.tarp(truth, draws + 0.5).passed  # shifted
        False
    """
    truth, draws = truth_and_draws(truth, draws)
    count, dim = truth.shape
    prob, rng = check_probability("prob", prob), np.random.default_rng(check_seed(seed))
    centre, scale = truth.mean(0), np.where(truth.std(0) > 0, truth.std(0), 1.0)
    if references is None:
        if num_references < 1:
            raise ValueError(f"num_references must be at least 1, got {num_references}")
        references = centre + SPREAD * scale * rng.normal(size=(num_references, dim))
    references = to_array(references, "references")
    if references.ndim not in (2, 3) or references.shape[-1] != dim or references.shape[1:-1] not in ((), (count,)):
        raise ValueError(f"references must have shape (R, {dim}) or (R, {count}, {dim}), got {tuple(references.shape)}")
    values = np.stack([_one(truth / scale, draws / scale, reference / scale, rng) for reference in references])
    points = grid(count)
    low, high = simultaneous_band(count, points, prob)
    tests = tuple(uniformity(row) for row in values)
    return Tarp(
        values=values,
        references=references,
        tests=tests,
        p_value=float(combine(np.array([test.p for test in tests]))),
        credibility=points,
        coverage=(values[:, :, None] <= points).mean(1),
        low=low,
        high=high,
        prob=prob,
    )


def _one(truth: Array, draws: Array, reference: Array, rng: np.random.Generator) -> Array:
    around = reference[:, None] if reference.ndim == 2 else reference
    distance = np.square(draws - around).sum(-1)
    return uniform_ranks(np.square(truth - reference).sum(-1), distance, rng)
