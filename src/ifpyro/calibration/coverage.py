r"""Coverage of central intervals.

The central interval of level ``p`` of a posterior covers the truth if ``|2 u - 1| <= p``, ``u`` being the truth's
uniform rank among the draws (`ifpyro.calibration.ranks`). Coverage as a function of the level is therefore an
empirical distribution function of numbers that are uniform under calibration, exactly so for any number of draws,
and the simultaneous band of one applies. (Intervals between sample quantiles of L draws are too short by a part of
order 1/L; the ends of these are picked at random between neighbouring draws, and are not.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.arguments import check_seed
from .arrays import Array, check_levels, check_probability, truth_and_draws
from .bands import band_p_value, simultaneous_band
from .ranks import uniform_ranks

LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Coverage:
    """Coverage of ``S`` data sets, per level and coordinate.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> truth, draws = rng.normal(size=(100, 1)), rng.normal(size=(100, 50, 1))
        >>> result = ifpyro.calibration.coverage(truth, draws, levels=(0.5, 0.9))
        >>> result.levels, result.covered.shape
        (array([0.5, 0.9]), (2, 1))
    """

    levels: Array
    """``(K,)``"""
    covered: Array
    """Fraction of data sets whose interval covers the truth, ``(K, d)``."""
    error: Array
    """Binomial standard error at the nominal level, ``(K,)``: of one coordinate."""
    low: Array
    """Lower edge of the simultaneous band over the levels, ``(K,)``."""
    high: Array
    """Upper edge of it, ``(K,)``."""
    p_value: Array
    """Of that band, per coordinate, ``(d,)``."""
    pooled: Array
    """Coverage over all coordinates together, ``(K,)``."""
    pooled_error: Array
    """Its standard error, ``(K,)``, from the spread between data sets: coordinates of one of them may depend on each
    other."""
    width: Array
    """Mean width of the intervals, ``(K, d)``: what is paid for coverage."""
    prob: float
    """Probability of the band."""

    @property
    def inside(self) -> Array:
        """Whether each coordinate stays inside the band at all levels, ``(d,)``."""
        return self.p_value >= 1 - self.prob

    def __str__(self) -> str:
        lines = [f"{'level':>6} {'covered':>8} {'+-':>6} {'lowest':>7} {'highest':>8}   band of one coordinate"]
        for k, level in enumerate(self.levels):
            lines.append(
                f"{level:6.3g} {self.pooled[k]:8.3f} {self.pooled_error[k]:6.3f} {self.covered[k].min():7.3f} "
                f"{self.covered[k].max():8.3f}   {self.low[k]:.3f} to {self.high[k]:.3f}"
            )
        return "\n".join(lines)


def coverage(
    truth: Any, draws: Any, levels: Sequence[float] = LEVELS, *, prob: float = 0.99, seed: int = 0
) -> Coverage:
    """How often central posterior intervals cover the truth.

    Args:
        truth: true values, ``(S, d)``: one row per data set.
        draws: posterior draws for each, equally weighted, ``(S, L, d)``.
        levels: nominal levels, increasing, ``(K,)``.
        prob: probability of the simultaneous band over the levels, per coordinate.
        seed: of the random interval ends.

    Raises:
        ValueError: for other shapes, NaN, or levels out of range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> centre = rng.normal(size=(200, 1))  # posteriors N(centre, 1) of 200 data sets
        >>> truth, draws = centre + rng.normal(size=(200, 1)), centre[:, None] + rng.normal(size=(200, 100, 1))
        >>> ifpyro.calibration.coverage(truth, draws).inside
        array([ True])
        >>> ifpyro.calibration.coverage(truth, centre[:, None] + 0.5 * (draws - centre[:, None])).inside  # too narrow
        array([False])
    """
    truth, draws = truth_and_draws(truth, draws)
    points, prob = check_levels(levels), check_probability("prob", prob)
    count = len(truth)
    fold = np.abs(2 * uniform_ranks(truth, draws, np.random.default_rng(check_seed(seed))) - 1)
    inside = fold <= points[:, None, None]  # (K, S, d)
    low, high = simultaneous_band(count, points, prob)
    ends = np.quantile(draws, np.stack([0.5 - points / 2, 0.5 + points / 2]), axis=1)  # (2, K, S, d)
    per_set = inside.mean(-1)
    return Coverage(
        levels=points,
        covered=inside.mean(1),
        error=np.sqrt(points * (1 - points) / count),
        low=low,
        high=high,
        p_value=np.array([band_p_value(column, points) for column in fold.T]),
        pooled=per_set.mean(1),
        pooled_error=per_set.std(1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(points), np.nan),
        width=(ends[1] - ends[0]).mean(1),
        prob=prob,
    )
