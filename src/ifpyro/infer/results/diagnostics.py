r"""Convergence figures of draws, for many quantities in one pass.

The definitions are those of Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), which ArviZ follows too: R-hat of
rank-normalised split chains (the larger of that of the draws and that of their distance from the median), and the
effective sample sizes

.. math:: \mathrm{ESS} = \frac{S}{\tau}, \qquad \tau = -1 + 2 \sum_k P_k, \qquad P_k = \rho_{2k} + \rho_{2k+1},

with the sum over pairs of autocorrelations cut at the first pair that is not positive and made monotone (Geyer 1992).
ArviZ computes one quantity at a time and takes seconds to import; here the columns of an image are one array.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import chdtri, ndtri
from torch import Tensor

Array = NDArray[Any]

CHUNK = 1 << 21
"""Numbers worked on at a time, which bounds memory."""

MOST = 1 << 23
"""Numbers of one site that get figures; of more, the columns that look worst."""

SHORTEST = 8
"""Draws per chain below which neither R-hat nor an effective sample size says anything."""

NEGLIGIBLE = 1.005
"""R-hat that needs no explanation."""

_EQUAL = 1e-5  # spread of log-weights that is rounding
_ITERATIONS = 12


class Figures(NamedTuple):
    """Figures of every quantity, each ``(quantities,)``; not a number where draws are not finite or too few."""

    r_hat: Array
    """1 where all chains agree."""
    bulk: Array
    """Effective sample size of rank-normalised draws: how well the centre is known."""
    tail: Array
    """The smaller effective sample size of the 5% and 95% quantiles."""
    explained: Array
    """The R-hat that chains which agree would exceed once in many runs, by the draws' own autocorrelation within
    chains, and at least `NEGLIGIBLE`; see `convergence_figures`."""


def convergence_figures(
    draws: Array, false_alarms: float = 1e-3, quantities: int | None = None, slowest: float = 10.0
) -> Figures:
    """R-hat, bulk and tail ESS of draws ``(chains, draws, columns)``.

    Short chains have an R-hat above 1 by chance. If all chains sample the same distribution with an autocorrelation
    time ``tau``, the variance of their means is ``tau / n`` of that of the draws, so that

        R-hat^2  ~  (n - 1) / n  +  tau / n  *  chi2(m - 1) / (m - 1)

    for ``m`` half chains of ``n`` draws. ``explained`` is the quantile of this that one of all ``quantities``, by
    default the columns, exceeds in a share ``false_alarms`` of runs, with ``tau`` measured inside the half chains,
    where chains that sit in different places do not enter. A ``tau`` above ``slowest`` explains no more than that does.
    """
    share = false_alarms / max(1, draws.shape[2] if quantities is None else quantities)
    parts = [_figures(np.moveaxis(part, -1, 0), share, slowest) for part in _chunks(draws)]
    if not parts:
        return Figures(*np.empty((4, 0)))
    return Figures(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def screened(draws: Array) -> Array:
    """Indices of the columns of ``(chains, draws, columns)`` that are worth figures: all, or of very many numbers those
    whose plain R-hat or whose correlation from draw to draw is largest."""
    chains, length, columns = draws.shape
    most = max(2, MOST // max(1, chains * length))
    if columns <= most or length < SHORTEST:
        return np.arange(columns)
    r_hat, correlation = [], []
    with np.errstate(invalid="ignore", divide="ignore"):
        for part in _chunks(draws):
            halves = _halves(np.moveaxis(part, -1, 0))
            centred = halves - halves.mean(2, keepdims=True)
            r_hat.append(_r_hat(halves))
            correlation.append((centred[:, :, 1:] * centred[:, :, :-1]).sum((1, 2)) / (centred**2).sum((1, 2)))
    # What is not a number comes last in a sort: first here, since it is the worst.
    by_each = [np.argsort(np.concatenate(values))[::-1] for values in (r_hat, correlation)]
    mixed = np.stack(by_each, 1).flatten()
    first = np.sort(np.unique(mixed, return_index=True)[1])[:most]
    return np.sort(mixed[first])


def convergence(samples: dict[str, Tensor]) -> dict[str, dict[str, Array]]:
    """Bulk ESS and split R-hat of draws ``(chains, draws, *shape)``: site -> ``{"n_eff": ..., "r_hat": ...}``."""
    report = {}
    for name, value in samples.items():
        shape = value.shape[2:]
        figures = convergence_figures(value.detach().cpu().numpy().reshape(*value.shape[:2], -1))
        report[name] = {"n_eff": figures.bulk.reshape(shape), "r_hat": figures.r_hat.reshape(shape)}
    return report


def bulk_ess(draws: Array) -> Array:
    """Bulk ESS of draws ``(chains, draws, *shape)``, of shape ``shape``."""
    flat = draws.reshape(*draws.shape[:2], -1)
    parts = [_effective(_normal_ranks(_halves(np.moveaxis(part, -1, 0)))) for part in _chunks(flat)]
    return np.concatenate([np.empty(0), *parts]).reshape(draws.shape[2:])


def pareto_k(log_weight: Tensor) -> float:
    """Shape ``k`` of the generalised Pareto tail of importance weights; above 0.7 they mislead (Vehtari, Simpson,
    Gelman, Yao & Gabry 2024). Not a number where there is no tail to fit.

    The tail is the largest fifth of the weights, of more than 225 the largest ``3 sqrt(S)``; ``k`` is the mean of Zhang
    & Stephens' (2009) profile posterior, drawn towards 1/2 as by ten more weights.
    """
    values = log_weight.detach().cpu().double().numpy()
    values = np.sort(values[np.isfinite(values)])
    if len(values) < 25 or values[-1] - values[0] < _EQUAL:
        return math.nan
    size = math.ceil(min(len(values) / 5, 3 * math.sqrt(len(values))))
    cut = values[-size - 1] - values[-1]
    excess = np.exp(values - values[-1]) - math.exp(cut)
    excess = excess[values - values[-1] > max(cut, math.log(np.finfo(float).tiny))]
    count = len(excess)
    if count < 5:
        return math.inf
    grid = np.arange(30 + int(math.sqrt(count))) + 0.5
    slope = 1 / excess[-1] + (1 - np.sqrt(len(grid) / grid)) / (3 * excess[int(count / 4 + 0.5) - 1])
    shape = np.log1p(-slope[:, None] * excess).mean(1)
    profile = count * (np.log(-slope / shape) - shape - 1)
    weight = np.exp(profile - profile.max())
    found = np.log1p(-(slope @ weight / weight.sum()) * excess).mean()
    return float((found * count + 5) / (count + 10))


def _chunks(draws: Array) -> Iterator[Array]:
    """Runs of quantities of ``(chains, draws, quantities)``, in double precision."""
    size = max(1, CHUNK // (draws.shape[0] * draws.shape[1]))
    for start in range(0, draws.shape[2], size):
        yield draws[:, :, start : start + size].astype(np.float64)


def _figures(draws: Array, false_alarms: float, slowest: float) -> Figures:
    """The figures of ``(quantities, chains, draws)``."""
    halves = _halves(draws)
    finite = np.isfinite(draws).all((1, 2))
    if halves.shape[2] < SHORTEST // 2:
        return Figures(*np.full((4, len(draws)), np.nan))
    with np.errstate(invalid="ignore", divide="ignore"):
        ranks = _normal_ranks(halves)
        folded = _normal_ranks(np.abs(halves - np.median(halves, (1, 2), keepdims=True)))
        both = np.stack([_r_hat(ranks), _r_hat(folded)])
        low, high = np.quantile(draws, (0.05, 0.95), axis=(1, 2))[..., None, None]
        tail = np.minimum(_effective((halves <= low).astype(float)), _effective((halves <= high).astype(float)))
        explained = np.full(len(draws), NEGLIGIBLE)
        for r_hat, scores in zip(both, (ranks, folded), strict=True):
            rows = (r_hat == both.max(0)) & (r_hat > NEGLIGIBLE)
            explained[rows] = _explained(scores[rows], false_alarms / 2, slowest)
        figures = Figures(np.fmax(*both), _effective(ranks), tail, explained)
    return Figures(*(np.where(finite, values, np.nan) for values in figures))


def _halves(draws: Array) -> Array:
    """``(quantities, 2 chains, draws // 2)``: both halves of every chain as chains of their own."""
    half = draws.shape[2] // 2
    return np.concatenate([draws[:, :, :half], draws[:, :, draws.shape[2] - half :]], 1)


def _normal_ranks(draws: Array) -> Array:
    """Every quantity's draws replaced by normal scores of their ranks; ties share the mean of theirs."""
    flat = draws.reshape(len(draws), -1)
    count = flat.shape[1]
    order = flat.argsort(1)
    ordered = np.take_along_axis(flat, order, 1)
    place = np.arange(count)
    new = np.ones(flat.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(new, place, 0), 1)
    ends = np.roll(new, -1, 1)
    ends[:, -1] = True
    last = np.minimum.accumulate(np.where(ends, place, count)[:, ::-1], 1)[:, ::-1]
    scores = np.empty_like(flat)
    np.put_along_axis(scores, order, ndtri((0.5 * (first + last) + 1 - 3 / 8) / (count + 1 / 4)), 1)
    return scores.reshape(draws.shape)


def _r_hat(draws: Array) -> Array:
    """``sqrt(var+ / W)`` of ``(quantities, chains, draws)`` as they stand."""
    length = draws.shape[2]
    between, within = draws.mean(2).var(1, ddof=1), draws.var(2, ddof=1).mean(1)
    return np.sqrt((length - 1) / length + between / within)


def _autocovariance(draws: Array) -> Array:
    """Of ``(quantities, chains, draws)``, around each chain's mean and averaged over chains: ``(quantities, lags)``."""
    length = draws.shape[2]
    padded = next_fast_len(2 * length, real=True)
    spectrum = rfft(draws - draws.mean(2, keepdims=True), padded, axis=2)
    power = (spectrum.real**2 + spectrum.imag**2).mean(1)
    return irfft(power, padded, axis=1)[:, :length] / length


def _effective(draws: Array) -> Array:
    """ESS of ``(quantities, chains, draws)`` as they stand: all draws where nothing varies."""
    _, chains, length = draws.shape
    covariance = _autocovariance(draws)
    within = covariance[:, :1] * length / (length - 1)
    total = covariance[:, :1] + (draws.mean(2).var(1, ddof=1)[:, None] if chains > 1 else 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = 1 - (within - covariance) / total
    correlation[:, 0] = 1.0
    count = chains * length
    tau = np.maximum(_autocorrelation_time(correlation), 1 / np.log10(count))
    return np.where(np.ptp(draws, (1, 2)) == 0, count, count / tau)


def _autocorrelation_time(correlation: Array) -> Array:
    """Geyer's initial monotone sequence, of autocorrelations ``(quantities, lags)``."""
    lags = correlation.shape[1]
    pairs = max(1, (lags - 1) // 2)
    even, odd = correlation[:, 0 : 2 * pairs : 2], correlation[:, 1 : 2 * pairs : 2]
    sums = even[:, : odd.shape[1]] + odd
    stop = np.where((sums > 0).all(1), sums.shape[1] - 1, (sums > 0).argmin(1))
    used = np.arange(sums.shape[1]) < stop[:, None]
    monotone = np.minimum.accumulate(sums, 1)
    after = np.take_along_axis(even, stop[:, None], 1)[:, 0]
    return -1 + 2 * np.where(used, monotone, 0.0).sum(1) + np.where(stop > 0, np.maximum(after, 0.0), 1.0)


def _explained(draws: Array, false_alarms: float, slowest: float) -> Array:
    """The R-hat that agreeing chains exceed with a probability of ``false_alarms``, ``(quantities,)``.

    Around its own mean a chain loses the variance of that mean from every autocovariance, which is what is looked for:
    found by iteration, from none.
    """
    _, chains, length = draws.shape
    covariance = _autocovariance(draws) * (length / (length - np.arange(length)))
    of_means = np.zeros((len(draws), 1))
    for _ in range(_ITERATIONS):
        total = covariance[:, :1] + of_means
        tau = _autocorrelation_time((covariance + of_means) / total)[:, None].clip(1.0, slowest)
        of_means = total * np.minimum(tau / length, 0.5)
    excess = chdtri(chains - 1, false_alarms) / (chains - 1)
    return np.sqrt((length - 1) / length + (of_means / covariance[:, :1])[:, 0] * excess)
