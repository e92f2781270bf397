"""Has a run converged? Every check of a finished run, one row each, and the one warning that sums them up."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import chdtri
from torch import Tensor

from ...flow.solver.fidelity import fidelity
from ..model.sites import to_numpy
from .diagnostics import SHORTEST, Array, Figures, convergence_figures, screened

R_HAT, R_HAT_ISLANDS = 1.01, 1.05
"""Largest R-hat of chains, and of islands of particles, beyond what the number of draws explains by chance."""

LEAST_ESS, LEAST_SHARE = 100.0, 0.1
"""Fewest effective draws of a quantity, and the least share of the draws that were asked for. Of fewer than 500 draws a
fifth is enough, since the estimate of so few is itself uncertain."""

SHARES = {"elliptical_slice": 0.01}
"""Least share where another one holds: a slice is cheap, and moves as far as the data let the prior move."""

FEWEST = 100
"""Draws in all below which nothing is judged."""

DIVERGENCES = 0.005
"""Largest share of divergent transitions."""

ACCEPTANCE = 0.2
"""Smallest mean acceptance."""

PARETO_K = 0.7
"""Largest shape of the tail of importance weights (Vehtari et al. 2024)."""

APART = 1.0
"""Largest standard deviation of the islands' log-evidences, in nats."""

GAP = 2.0
"""Largest spread of the difference between the guide's and the fine log-density over draws, in nats."""

ROUND_TRIP = 0.01
"""Largest error of a latent that is decoded and encoded, in standard deviations of the latent, at 19 of 20 draws."""

_NAMED = 3
_ENTANGLED = "write the model so that its latents are less entangled (non-centred scales, centred regressors)"
_MIX = {
    "chains": f"run longer (num_samples, warmup_steps), or {_ENTANGLED}",
    "islands": f"use more particles (num_particles) or moves (max_moves), or {_ENTANGLED}",
}
_EXACT = "let gradients be exact (level='fine')"


class Check(NamedTuple):
    """One thing that can be wrong with a run."""

    name: str
    """What was measured."""
    value: float
    """The worst value."""
    limit: float
    """Where it begins to be wrong."""
    passed: bool
    """Whether it is right."""
    quantity: str = ""
    """The quantity that is worst, such as ``theta[2]``; empty for what belongs to the whole run."""
    said: str = ""
    """What is wrong, in words, for the warning."""
    advice: str = ""
    """What to do about it."""


class Verdict(NamedTuple):
    """All checks of a run."""

    checks: list[Check]

    @property
    def converged(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def message(self, what: str) -> str:
        """One sentence for each failed check, and what to do."""
        failed = [check for check in self.checks if not check.passed]
        advice = dict.fromkeys(check.advice for check in failed)
        return f"{what} may not be trusted: {'; '.join(check.said for check in failed)}. To do: {'; '.join(advice)}"

    def table(self) -> Any:
        """A pandas ``DataFrame`` with one row for each check."""
        import xarray  # brings pandas, which takes half a second to import

        columns = {
            "quantity": [c.quantity for c in self.checks],
            "value": [c.value for c in self.checks],
            "limit": [c.limit for c in self.checks],
            "passed": [c.passed for c in self.checks],
            "advice": ["" if c.passed else c.advice for c in self.checks],
        }
        names = [c.name for c in self.checks]
        return xarray.Dataset({k: ("check", v) for k, v in columns.items()}, {"check": names}).to_dataframe()


def judge(
    samples: Mapping[str, Tensor],
    stats: Mapping[str, Tensor],
    *,
    method: str = "",
    pareto_k: float | None = None,
    transforms: Mapping[str, Any] | None = None,
) -> Verdict:
    """Every check that the draws and statistics of a run allow.

    Args:
        samples: site -> draws, ``(chains, draws, *shape)``.
        stats: ``(chains, draws)`` each, under the names of :meth:`ifpyro.infer.results.draws.Draws.sample_stats`; with
            ``log_weight``, chains are islands of particles.
        method: the attribute ``inference_method`` of the run.
        pareto_k: shape of the tail of importance weights that the draws came from.
        transforms: flow site -> the transform from its latent ``<site>_base``.
    """
    islands = "log_weight" in stats
    quantities = {name: value for name, value in samples.items() if value.numel() and not value.is_complex()}
    if "lp" in stats:
        quantities["lp"] = stats["lp"]
    checks = [*_draws(quantities, islands, SHARES.get(method, LEAST_SHARE)), *_transitions(stats)]
    if pareto_k is not None and not math.isnan(pareto_k):
        said = f"Pareto k {pareto_k:.2f} (at most {PARETO_K}): few importance weights rule the evidence"
        checks.append(Check("Pareto k", pareto_k, PARETO_K, pareto_k <= PARETO_K, "", said, "use more particles"))
    if islands and len(stats["log_weight"]) > 1:
        checks.append(_evidences(stats["log_weight"][:, 0]))
    checks += [_round_trip(name, samples[f"{name}_base"], transform) for name, transform in (transforms or {}).items()]
    return Verdict(checks)


def observation_check(residual: Tensor) -> Check:
    """Do draws of a posterior explain the observations that they were given?

    A draw from the posterior stands to its observation as the truth does, so that the mean square of the residual, in
    standard deviations of the noise, has the law of ``chi2(m) / m``.

    Args:
        residual: ``(observations, draws, m)``, in standard deviations of the noise.
    """
    observations, _, size = residual.shape
    if not residual.numel():
        return Check("misfit", 0.0, 0.0, True)
    limit = math.sqrt(chdtri(size, 1e-4 / observations) / size)
    rms = residual.double().square().mean((1, 2)).sqrt().nan_to_num(math.inf)
    worst = int(rms.argmax())
    value = float(rms[worst])
    said = f"draws miss observation {worst} by {value:.2f} standard deviations of the noise (at most {limit:.2f})"
    advice = "ask whether the flow's prior can make such data and the noise is so small; more sweeps; or ifpyro.SMC"
    return Check("misfit", value, limit, value <= limit, f"y[{worst}]", said, advice)


def _draws(quantities: Mapping[str, Tensor], islands: bool, share: float) -> Iterator[Check]:
    """R-hat and effective sample sizes, or that there are too few draws for these."""
    chains, length = next(iter(quantities.values())).shape[:2]
    total = chains * length
    what = "islands" if islands else "chains"
    enough = total >= FEWEST and length >= SHORTEST
    said = f"{total} draws, {length} in each of {chains} {what}, are too few to judge by"
    yield Check("draws", total, FEWEST, enough, "", said, f"draw at least {SHORTEST} in each and 400 in all")
    if not enough:
        return
    names, figures = _figures(quantities, 1 / share)
    infinite = np.isnan(figures.bulk)
    if infinite.any():
        name = names[int(infinite.argmax())]
        said = f"draws of {name} are not all finite"
        yield Check("not finite", float(infinite.sum()), 0.0, False, name, said, "keep the model's values finite")
    most = np.fmax(R_HAT_ISLANDS if islands else R_HAT, figures.explained)
    said, advice = "R-hat {value:.3f} for {names}: " + what + " disagree (at most {limit:.2f})", _MIX[what]
    yield _worst("R-hat", names, figures.r_hat, most, 1, said, advice)
    least = np.full(len(names), max(share * total, min(LEAST_ESS, total / 5)))
    for name, values in (("bulk ESS", figures.bulk), ("tail ESS", figures.tail)):
        said = name + " {value:.0f} of " + str(total) + " draws for {names} (at least {limit:.0f})"
        yield _worst(name, names, values, least, -1, said, advice)


def _figures(quantities: Mapping[str, Tensor], slowest: float) -> tuple[list[str], Figures]:
    """Names of all quantities, such as ``theta[2]``, and their figures; of very many, those that look worst."""
    names: list[str] = []
    columns: list[Figures] = []
    for name, value in quantities.items():
        shape = value.shape[2:]
        draws = to_numpy(value).reshape(*value.shape[:2], -1)
        kept = screened(draws)
        columns.append(convergence_figures(draws[:, :, kept], quantities=draws.shape[2], slowest=slowest))
        indices = np.stack(np.unravel_index(kept, shape), 1).tolist() if shape else [[]]
        names += [f"{name}[{', '.join(map(str, index))}]" if index else name for index in indices]
    return names, Figures(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _worst(name: str, names: Sequence[str], values: Array, limits: Array, sign: int, said: str, advice: str) -> Check:
    """The check of a figure that every quantity has: ``sign`` is 1 where large values are wrong, and -1 where small."""
    excess = np.where(np.isnan(values), -np.inf, sign * (values - limits))
    failed = int((excess > 0).sum())
    # Where nothing is wrong the most extreme value is of more interest than the one nearest to its limit.
    badness = excess if failed else np.where(np.isnan(values), -np.inf, sign * values)
    # The log-density is named only where nothing else fails: it is no quantity that anybody asked for.
    density = np.array([other == "lp" for other in names]) & (failed > 0)
    order = np.lexsort((-badness, density | (badness <= 0) & (failed > 0)))
    worst = order[0]
    listed = ", ".join(names[k] for k in order[: max(1, min(failed, _NAMED))])
    listed += f" and {failed - _NAMED} more" if failed > _NAMED else ""
    words = said.format(value=values[worst], limit=limits[worst], names=listed)
    return Check(name, float(values[worst]), float(limits[worst]), not failed, names[worst], words, advice)


def _transitions(stats: Mapping[str, Tensor]) -> Iterator[Check]:
    """Divergences, acceptance, chains that stand still, and the guide."""
    if "diverging" in stats:
        count, total = int(stats["diverging"].sum()), stats["diverging"].numel()
        said = f"{count} of {total} transitions diverged"
        advice = "write scales non-centred, or take smaller steps (target_accept=0.9)"
        yield Check("divergences", count / total, DIVERGENCES, count <= max(1.0, DIVERGENCES * total), "", said, advice)
    if "acceptance_rate" in stats:
        acceptance = float(stats["acceptance_rate"].double().nan_to_num(0.0).mean())
        said = f"mean acceptance {acceptance:.2f} (at least {ACCEPTANCE})"
        passed = acceptance >= ACCEPTANCE
        yield Check("acceptance", acceptance, ACCEPTANCE, passed, "", said, f"warm up longer, or {_EXACT}")
    lp = stats.get("lp")
    if lp is not None and lp.shape[1] >= SHORTEST and "log_weight" not in stats:
        still = int((lp == lp[:, :1]).all(1).sum())
        yield Check("chains that never moved", still, 0.0, not still, "", f"{still} chains never moved", _MIX["chains"])
    if "fidelity_gap" in stats:
        gap = np.nan_to_num(to_numpy(stats["fidelity_gap"].double()), nan=1e30, posinf=1e30, neginf=-1e30)
        low, high = np.quantile(gap, (0.16, 0.84))
        spread = (high - low) / 2
        said = f"the guide that gives gradients is off by {spread:.1f} nats (at most {GAP:.0f})"
        yield Check("guide gap", spread, GAP, bool(spread <= GAP), "", said, _EXACT)


def _evidences(log_weight: Tensor) -> Check:
    """Do the islands agree on the evidence?"""
    spread = float(log_weight.double().std())
    said = f"the islands' log-evidences are {spread:.1f} apart (standard deviation, at most {APART:.0f})"
    return Check("island evidences", spread, APART, spread <= APART, "", said, _MIX["islands"])


def _round_trip(name: str, latents: Tensor, transform: Any) -> Check:
    """Does the flow's map come back to the draws' latents, or does it tear or fold where they lie?"""
    rows = latents.reshape(-1, *latents.shape[2:])
    few = max(4, 32 * 128**2 // max(128, rows[0].numel()) ** 2)
    rows = rows[:: -(-len(rows) // few)]
    with torch.no_grad(), fidelity("fine"):
        error = (transform.inv(transform(rows)) - rows).square().mean(-1).sqrt().flatten().double()
    value = float(error.nan_to_num(torch.inf).quantile(0.95))
    said = f"the flow of {name} does not come back to its latents (off by {value:.2g} sd, at most {ROUND_TRIP})"
    advice = f"train the flow of {name} longer or on more samples, and look at ifpyro.check(flow, held_out)"
    return Check(f"round trip of {name}", value, ROUND_TRIP, value <= ROUND_TRIP, name, said, advice)
