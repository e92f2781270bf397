r"""Are two samples from one distribution, or one sample from a standard Gaussian? Arrays in, effect and p-value out.

Every test answers two questions apart: is a difference *there* (the p-value, from the exact null distribution or from
permuted labels), and how *large* is it (the effect, an estimate that does not grow with the number of rows). Knows no
flow. Needs scipy; the classifier also needs scikit-learn (the extra ``check``).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

_DIRECTIONS = 32  # random projections of the sliced distance
_AT_ONCE = 256  # permutations held in memory together


@dataclass(frozen=True)
class Outcome:
    """What a test found.

    Attributes:
        effect: size of the difference, in the unit that the test's docstring names; near zero (or one half, for the
            classifier's accuracy) where there is none.
        p: probability of at least this much under no difference.
        worst: the axis with the largest difference, for tests that look at one axis at a time.
    """

    effect: float
    p: float
    worst: int | None = None


def energy(x: Array, y: Array, rng: np.random.Generator, permutations: int) -> Outcome:
    r"""Energy distance of ``x`` ``(n, D)`` and ``y`` ``(m, D)`` by permutation.

    .. math:: H = 1 - \frac{E|X - X'| + E|Y - Y'|}{2\,E|X - Y|},

    in 0 to 1, zero for equal distributions. Its numerator is estimated without bias (no point is paired with itself),
    so it may be slightly negative. Two Gaussians ``d`` standard deviations apart on every axis have ``H`` of about
    ``d^2 / 4``. Source: Szekely & Rizzo 2013, section 6 and 7.
    """
    from scipy.spatial.distance import pdist, squareform

    n, m = len(x), len(y)
    # Single precision serves: the rounding of a mean over thousands of pairs is far below its Monte Carlo error.
    distance = squareform(pdist(np.concatenate([x, y])).astype(np.float32))
    row, total = distance.sum(1, dtype=np.float64), float(distance.sum(dtype=np.float64))

    def statistic(first: Array) -> tuple[Array, Array]:
        """Energy distance and ``2 E|X - Y|`` for labels ``(N, permutations)``, one where a row belongs to ``x``."""
        within = np.einsum("nk,nk->k", first, distance @ first.astype(np.float32))
        marginal = row @ first
        other = total - 2 * marginal + within
        cross = 2 * (marginal - within) / (n * m)
        return cross - within / (n * (n - 1)) - other / (m * (m - 1)), cross

    labels = np.repeat([1.0, 0.0], [n, m])
    observed, scale = (float(value[0]) for value in statistic(labels[:, None]))
    null = [statistic(labels[order])[0] for order in _orders(n + m, permutations, rng)]
    return Outcome(observed / scale if scale else 0.0, _p_value(observed, np.concatenate(null)))


def sliced_wasserstein(x: Array, y: Array, rng: np.random.Generator, permutations: int) -> Outcome:
    r"""Sliced Wasserstein-1 distance by permutation.

    The mean over random directions of :math:`\int |F_x - F_y|`, each in units of the pooled standard deviation of that
    projection. The effect is what is left after subtracting the mean of the permuted distances, which is what equal
    distributions give at these sample sizes. Source: Bonneel et al. 2015; here with the first power.
    """
    n, m = len(x), len(y)
    pooled = np.concatenate([x, y])
    directions = rng.standard_normal((x.shape[1], _DIRECTIONS)) if x.shape[1] > 1 else np.ones((1, 1))
    projected = pooled @ (directions / np.linalg.norm(directions, axis=0))
    projected = projected / np.where(projected.std(0) > 0, projected.std(0), 1.0)
    sorting = projected.argsort(0)
    gaps = np.diff(np.take_along_axis(projected, sorting, 0), axis=0).astype(np.float32)

    def statistic(weights: Array) -> Array:
        """Distances for signed weights ``(N, permutations)``: ``1/n`` on rows of ``x``, ``-1/m`` on those of ``y``."""
        result = np.zeros(weights.shape[1])
        for k in range(sorting.shape[1]):
            difference = np.cumsum(weights[sorting[:, k]], axis=0)[:-1]
            result += gaps[:, k] @ np.abs(difference, out=difference)
        return result / sorting.shape[1]

    weights = np.repeat([1 / n, -1 / m], [n, m]).astype(np.float32)
    observed = float(statistic(weights[:, None])[0])
    null = np.concatenate([statistic(weights[order]) for order in _orders(n + m, permutations, rng)])
    return Outcome(observed - float(null.mean()), _p_value(observed, null))


def classifier(x: Array, y: Array, rng: np.random.Generator) -> Outcome:
    """Classifier two-sample test: the accuracy of telling ``x`` from ``y``, 0.5 where it is guessing.

    Each half of the rows is scored by a classifier that was trained on the other half. Given the classifier, the ranks
    of the scores have the null distribution of Mann and Whitney; the two halves share rows, so the p-value is twice the
    smaller of theirs. Source: Lopez-Paz & Oquab 2017; ranks instead of the accuracy, which throws scores away.
    """
    from scipy.stats import mannwhitneyu

    size = min(len(x), len(y))
    x, y = x[rng.permutation(len(x))[:size]], y[rng.permutation(len(y))[:size]]
    half = size // 2
    accuracy, p = [], []
    for train, test in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        score = _trained(x[train], y[train], int(rng.integers(2**31)))
        first, second = score(x[test]), score(y[test])
        accuracy.append((np.mean(first > 0.5) + np.mean(second <= 0.5)) / 2)
        p.append(float(mannwhitneyu(first, second, alternative="greater", method="asymptotic").pvalue))
    return Outcome(float(np.mean(accuracy)), min(1.0, 2 * min(p)))


def axes_normal(z: Array) -> Outcome:
    """Kolmogorov-Smirnov test of every column of ``z`` ``(n, D)`` against N(0, 1).

    The effect is the largest distance of the distribution functions, a probability; the p-value is the smallest one
    times the number of columns.
    """
    from scipy.stats import ks_1samp, norm

    results = [ks_1samp(column, norm.cdf) for column in z.T]
    worst = int(np.argmin([result.pvalue for result in results]))
    return Outcome(float(results[worst].statistic), min(1.0, float(results[worst].pvalue) * z.shape[1]), worst)


def axes_power(z: Array) -> Outcome:
    """Mean square of every column of ``z`` ``(n, D)`` against 1, its expectation under N(0, 1).

    The effect is the worst column's mean square minus one; the sum of squares has a chi-square distribution, whose
    two-sided tail, times the number of columns, is the p-value. Sees widths where Kolmogorov-Smirnov sees shapes.
    """
    power, p = np.square(z).mean(0), _chi_square(np.square(z).sum(0), len(z))
    worst = int(np.argmin(p))
    return Outcome(float(power[worst]) - 1, min(1.0, float(p[worst]) * z.shape[1]), worst)


def total_power(z: Array) -> Outcome:
    """Mean square of all entries of ``z`` ``(n, D)`` minus one, with its exact chi-square tail, two-sided."""
    p = _chi_square(np.square(z).sum(keepdims=True), z.size)
    return Outcome(float(np.square(z).mean()) - 1, float(p[0, 0]))


def radial_normal(z: Array) -> Outcome:
    """Kolmogorov-Smirnov test of ``|z|^2`` against chi-square with ``D`` degrees of freedom; ``z`` is ``(n, D)``."""
    from scipy.stats import chi2, ks_1samp

    result = ks_1samp(np.square(z).sum(1), chi2(z.shape[1]).cdf)
    return Outcome(float(result.statistic), float(result.pvalue))


def mean_above(x: Array, mean: float = 0.0, standard_error: float = 0.0) -> Outcome:
    """Is the mean of ``x`` ``(n,)`` above another mean with a standard error of its own? One-sided t test."""
    from scipy.stats import t

    effect = float(x.mean()) - mean
    spread = float(np.hypot(x.std(ddof=1) / np.sqrt(len(x)), standard_error))
    return Outcome(effect, float(t.sf(effect / spread, len(x) - 1)) if spread else float(effect <= 0))


def _trained(x: Array, y: Array, seed: int) -> Any:
    """A function from rows to the probability of belonging to ``x``: the mean vote of a forest and a linear model.

    The forest sees shapes in few dimensions; the logistic regression on values, their squares and sizes sees shifts and
    widths that are spread thinly over many.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "the classifier test needs scikit-learn; install it with: pip install 'ifpyro[check]'"
        ) from error

    rows, label = np.concatenate([x, y]), np.repeat([1, 0], [len(x), len(y)])
    forest = RandomForestClassifier(60, min_samples_leaf=5, max_samples=0.5, random_state=seed).fit(rows, label)
    centre = StandardScaler().fit(rows)

    def widened(rows: Array) -> Array:
        v = centre.transform(rows)
        return np.concatenate([v, v**2, np.abs(v)], 1)

    unit = StandardScaler().fit(widened(rows))
    linear = LogisticRegression(C=0.01, max_iter=1000).fit(unit.transform(widened(rows)), label)

    def score(rows: Array) -> Array:
        votes = forest.predict_proba(rows)[:, 1] + linear.predict_proba(unit.transform(widened(rows)))[:, 1]
        return votes / 2

    return score


def _orders(rows: int, permutations: int, rng: np.random.Generator) -> Any:
    """Random orders of the rows, ``(rows, k)``, in blocks of bounded memory."""
    for start in range(0, permutations, _AT_ONCE):
        columns = min(_AT_ONCE, permutations - start)
        yield np.argsort(rng.random((rows, columns), dtype=np.float32), axis=0)


def _p_value(observed: float, null: Array) -> float:
    # The observed labelling is one of the permutations: without it p could be zero, and would be too small on average.
    return (1 + int(np.sum(null >= observed))) / (1 + len(null))


def _chi_square(total: Array, freedom: int) -> Array:
    from scipy.stats import chi2

    return np.minimum(1.0, 2 * np.minimum(chi2.sf(total, freedom), chi2.cdf(total, freedom)))
