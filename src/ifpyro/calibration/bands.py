r"""Simultaneous bands of an empirical distribution function, exactly.

For ``n`` independent uniform numbers let ``N(z)`` count those at or below ``z``. Pointwise ``N(z) ~ Binomial(n, z)``.
A *simultaneous* band of probability ``P`` at points ``z_1 < ... < z_K`` takes at every point the binomial
interval with tails above ``gamma / 2``,

    low_i = min{c : P(N(z_i) <= c) > gamma/2},        high_i = max{c : P(N(z_i) >= c) > gamma/2},

with the largest ``gamma`` for which all ``K`` counts lie inside together with probability ``P`` (Säilynoja, Bürkner &
Vehtari 2022, section 2). That probability needs no simulation: seen as a Poisson process of rate ``n`` given ``n``
points in all, ``N`` has independent increments, so the law of the counts that stayed inside so far is convolved
with a Poisson law from point to point, cut to the band, and divided by ``P(Poisson(n) = n)`` in the end.
"""

import math
from functools import lru_cache

import numpy as np
from scipy import stats

from .arrays import Array

MOST_POINTS = 99
"""Points at which a whole distribution function is looked at: the hundredths, or fewer for small samples."""


def grid(n: int) -> Array:
    """Evenly spaced points inside (0, 1) at which to look at ``n`` numbers."""
    count = max(1, min(MOST_POINTS, n - 1))
    return np.arange(1, count + 1) / (count + 1)


def probability_inside(low: Array, high: Array, n: int, points: Array) -> float:
    """Probability that ``n`` uniform numbers have ``low_i <= N(z_i) <= high_i`` at every point.

    Args:
        low: least counts, ``(K,)``.
        high: largest counts, ``(K,)``.
        n: how many numbers.
        points: increasing, inside (0, 1), ``(K,)``.
    """
    low, high = np.append(low, n).astype(int), np.append(high, n).astype(int)
    steps = np.diff(np.concatenate([[0.0], points, [1.0]]))
    first, inside = 0, np.ones(1)
    for least, most, step in zip(low, high, steps, strict=True):
        if most < max(least, first):  # counts do not fall
            return 0.0
        law = stats.poisson.pmf(np.arange(most - first + 1), n * step)
        moved = np.convolve(inside, law)[: most - first + 1]
        start = max(least, first)
        first, inside = start, moved[start - first :]
    return float(min(1.0, inside[-1] / stats.poisson.pmf(n, n))) if len(inside) else 0.0


def pointwise(gamma: float, n: int, points: Array) -> tuple[Array, Array]:
    """``(low, high)``: the counts whose both tails exceed ``gamma / 2``, each ``(K,)``."""
    tail = 0.5 * gamma * (1 + 1e-10)  # "exceed" is strict; the quantile function stops at equality
    low = stats.binom.ppf(tail, n, points)
    return low, n - stats.binom.ppf(tail, n, 1 - points)


def simultaneous_band(n: int, points: Array, prob: float = 0.99) -> tuple[Array, Array]:
    """Band of the empirical distribution function of ``n`` uniform numbers.

    Args:
        n: how many numbers.
        points: increasing, inside (0, 1), ``(K,)``.
        prob: probability that the whole function stays inside.

    Returns:
        ``(low, high)``, fractions of ``n``, each ``(K,)``.
    """
    low, high = _band(n, tuple(float(z) for z in points), prob)
    return low / n, high / n


@lru_cache(maxsize=256)
def _band(n: int, points: tuple[float, ...], prob: float) -> tuple[Array, Array]:
    z = np.array(points)
    least, most = (1 - prob) / (2 * len(z)), 1 - prob  # Bonferroni, and no correction at all
    for _ in range(40):
        gamma = math.sqrt(least * most)
        if probability_inside(*pointwise(gamma, n, z), n, z) >= prob:
            least = gamma
        else:
            most = gamma
    return pointwise(least, n, z)


def smallest_tails(values: Array, points: Array) -> Array:
    """``gamma`` of samples: twice the smallest binomial tail of their counts over all points.

    Args:
        values: samples of ``n`` numbers in [0, 1], ``(..., n)``.
        points: ``(K,)``.

    Returns:
        ``(...,)``
    """
    n = values.shape[-1]
    counts = np.stack([(values <= z).sum(-1) for z in points], -1)
    below, above = stats.binom.cdf(counts, n, points), stats.binom.sf(counts - 1, n, points)
    return np.minimum(1.0, 2 * np.minimum(below, above).min(-1))


def band_p_value(values: Array, points: Array | None = None) -> float:
    """Exact p-value of the hypothesis that ``values`` are independent and uniform.

    It is below ``1 - prob`` exactly where the empirical distribution function leaves the band of probability
    ``prob`` at the same points.

    Args:
        values: ``(n,)``, in [0, 1].
        points: where to look; `grid` by default.
    """
    n = len(values)
    points = grid(n) if points is None else points
    gamma = float(smallest_tails(values, points))
    return 1.0 - probability_inside(*pointwise(gamma, n, points), n, points)
