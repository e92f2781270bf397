r"""Where the truth ranks among posterior draws, and whether such ranks are uniform.

If ``theta`` and ``theta_1, ..., theta_L`` are independent draws of one posterior, the rank of ``theta`` among the
others is uniform on ``0..L`` (Cook, Gelman & Rubin 2006; Talts et al. 2018). With ties broken at random and the step
of the last rank filled evenly,

    u = (#{theta_l < theta} + V (1 + #{theta_l = theta})) / (L + 1),        V ~ U(0, 1),

is uniform on (0, 1) *exactly*, for any ``L``, which may differ from data set to data set.

Uniformity of ``n`` such numbers is judged by three exact tests, each sharp where the others are blunt:

* the simultaneous band of their distribution function (`ifpyro.calibration.bands`), for any departure;
* the mean of the normal scores ``Phi^-1(u)``, for posteriors that are shifted: ``sqrt(n) mean ~ N(0, 1)``;
* their sum of squares, for posteriors that are too narrow or too wide: ``chi^2`` with ``n`` degrees of freedom.

The three p-values are combined by the Cauchy rule (Liu & Xie 2020), which allows them to depend on each other.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from .arrays import Array
from .bands import band_p_value


class Uniformity(NamedTuple):
    """P-values of one sample of ranks. Small values speak against calibration."""

    p: float
    """The verdict: `band`, `location` and `spread` combined."""
    band: float
    """Of the simultaneous band: below 0.01 exactly where the picture shows a line outside its 99% band."""
    location: float
    """Of the mean normal score."""
    spread: float
    """Of the sum of squared normal scores."""
    mean_score: float
    """Mean normal score: above 0 where posteriors lie below the truth; minus the shift in units of the posterior
    sd."""
    sd_score: float
    """Root mean square of the normal scores: above 1 where posteriors are too narrow, by about that factor."""


def uniform_ranks(truth: Array, draws: Array, rng: np.random.Generator) -> Array:
    """``u`` of every coordinate of every data set.

    Args:
        truth: ``(S, ...)``.
        draws: ``(S, L, ...)``.
        rng: fills the steps and breaks ties.

    Returns:
        numbers in (0, 1), of the shape of ``truth``.
    """
    below = (draws < truth[:, None]).sum(1)
    ties = (draws == truth[:, None]).sum(1)
    return (below + rng.random(truth.shape) * (ties + 1)) / (draws.shape[1] + 1)


def uniformity(values: Array) -> Uniformity:
    """Judge whether numbers in (0, 1), ``(n,)``, are independent and uniform."""
    n = len(values)
    scores = normal_scores(values)
    location = float(2 * stats.norm.sf(abs(scores.mean()) * np.sqrt(n)))
    squares = float(np.square(scores).sum())
    spread = float(min(1.0, 2 * min(stats.chi2.cdf(squares, n), stats.chi2.sf(squares, n))))
    band = band_p_value(values)
    p = float(combine(np.array([band, location, spread])))
    return Uniformity(p, band, location, spread, float(scores.mean()), float(np.sqrt(squares / n)))


def normal_scores(values: Array) -> Array:
    """``Phi^-1(u)``, finite also where rounding put ``u`` on 0 or 1."""
    return stats.norm.ppf(np.clip(values, 1e-12, 1 - 1e-12))


def combine(p_values: Array) -> Array:
    """One p-value from several that may depend on each other, along the last axis (Cauchy combination).

    ``1/2 - arctan(mean tan((1/2 - p) pi)) / pi``: for small values close to their smallest times their number where
    one stands out, and to their common size where all agree. Values above 0.95 count as 0.95: a discrete test can say
    1, which would outvote everything.
    """
    p = np.clip(p_values, 1e-15, 0.95)
    return 0.5 - np.arctan(np.tan((0.5 - p) * np.pi).mean(-1)) / np.pi
