"""Real data, nothing simulated: hidden columns of held-out patients, inferred from the other columns.

    python benchmarks/calibration_patients.py [--splits 0 1 2] [--patients 57] [--particles 256] [--quick]

Breast cancer (569 patients, 30 columns, logarithms, standardised). A flow is trained on 70% of the patients, at random.
For each of the others, ten random columns are hidden, and twenty are seen with noise of standard deviation 0.1:

    x ~ flow,        y_j ~ Normal(x_j, 0.1) for the twenty that are seen,

whose posterior is sampled by tempered SMC. The rival is the exact conditional of the Gaussian with the mean and
covariance of the same 70%.

* Coverage: of the true values of the hidden columns by central posterior intervals.
* Log score: ``log p(h | y)``, ``h`` being the hidden columns seen with the same noise, as the ratio of two evidences,
  ``log p(h, y) - log p(y)``: SMC's for the flow, exact for the Gaussian. No density of particles is estimated.
* CRPS: mean over hidden columns, in standard deviations, from draws for the flow and in closed form for the Gaussian.

Flows are kept in ``benchmarks/.cache``; the table goes to ``benchmarks/calibration.md``.
"""

import argparse
import math
import time
import warnings
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from tqdm.auto import tqdm

import ifpyro
from calibration_common import write_rows
from ifpyro.calibration import coverage
from results import CACHE

NOISE, HIDDEN = 0.1, 10
LEVELS = (0.5, 0.9, 0.95)
ABOVE = [
    "### Real data: ten hidden columns of held-out breast cancer patients",
    "",
    "Flow trained on 398 patients, 171 held out. Ten random columns of each are hidden, the others seen with noise "
    "of sd 0.1 (standardised logarithms); the Gaussian is the exact conditional. Coverage in percent of central "
    "intervals of the true values, ± standard error over patients; log score of the hidden columns with the same "
    "noise, nats a patient, as a ratio of evidences; CRPS in standard deviations. Processor seconds. Splits are "
    "named by their seeds, which are also those of training and noise.",
    "",
    "| split | model | patients | 50% covers | 90% covers | 95% covers | log score | CRPS | s |",
    "|---|---|---|---|---|---|---|---|---|",
]
Array = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, nargs="*", default=[0, 1, 2], help="seeds of split, flow and noise")
    parser.add_argument("--patients", type=int, default=57, help="held-out patients of a split, at most 171")
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="barely trained flows, two patients, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("\n".join(ABOVE), flush=True)
    for seed in options.splits:
        train, test = split(seed)
        flow = trained(train, seed, options.quick)
        start = time.process_time()
        cases = hide(test[: 2 if options.quick else options.patients], seed)
        ours, theirs = by_flow(flow, cases, options.particles), by_gaussian(train, cases)
        rows = table(str(seed), ours, theirs, f"{time.process_time() - start:.0f}")
        print("\n".join(rows), flush=True)
        if not options.quick:
            keep(seed, ours, theirs)
            write_rows("patients", ABOVE, [*rows, *table("all", *kept(), "")], [*map(str, range(100)), "all"])


def table(name: str, ours: "Scores", theirs: "Scores", seconds: str) -> list[str]:
    """The rows of a split."""
    score, crps = ours.log_score - theirs.log_score, ours.crps - theirs.crps
    count = len(ours.truth)
    return [
        f"| {name} | flow | {count} | {cells(ours)} | {seconds} |",
        f"| {name} | Gaussian | {count} | {cells(theirs)} | |",
        f"| {name} | less Gaussian | {count} | | | | {mean(score, 2)} | {mean(crps, 4)} | |",
    ]


def cells(found: "Scores") -> str:
    """Coverage, log score and CRPS."""
    covered = coverage(found.truth, found.draws, levels=LEVELS)
    shares = " | ".join(
        f"{100 * share:.1f} ± {100 * error:.1f}"
        for share, error in zip(covered.pooled, covered.pooled_error, strict=True)
    )
    return f"{shares} | {mean(found.log_score, 2)} | {mean(found.crps, 4)}"


def mean(values: "Array", digits: int) -> str:
    """With its standard error over patients."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}"


class Case(NamedTuple):
    """One patient."""

    x: Tensor
    """True values, ``(30,)``."""
    seen: Tensor
    """Which columns are seen, ``(30,)``, booleans."""
    noisy: Tensor
    """All columns with noise, ``(30,)``."""


class Scores(NamedTuple):
    """Of all patients."""

    truth: Array
    """Hidden columns, ``(S, 10)``."""
    draws: Array
    """``(S, L, 10)``"""
    log_score: Array
    """``(S,)``"""
    crps: Array
    """``(S,)``"""


def keep(seed: int, ours: Scores, theirs: Scores) -> None:
    """Put the results of a split where `kept` finds them."""
    named = {
        f"{k}{field}": value for k, scores in enumerate((ours, theirs)) for field, value in scores._asdict().items()
    }
    np.savez(CACHE / f"calibration-patients-{seed}.npz", **named)


def kept() -> tuple[Scores, Scores]:
    """The results of all splits together."""
    files = [np.load(path) for path in sorted(CACHE.glob("calibration-patients-*.npz"))]
    pooled = [
        Scores(*(np.concatenate([file[f"{k}{field}"] for file in files]) for field in Scores._fields)) for k in (0, 1)
    ]
    return pooled[0], pooled[1]


def split(seed: int) -> tuple[Tensor, Tensor]:
    """Standardised logarithms of 398 and 171 patients; standardised by the first."""
    x = torch.as_tensor(load_breast_cancer().data, dtype=torch.float32).clamp(min=1e-3).log()
    x = x[torch.as_tensor(np.random.default_rng(seed).permutation(len(x)))]
    most = int(0.7 * len(x))
    return tuple((part - x[:most].mean(0)) / x[:most].std(0) for part in (x[:most], x[most:]))


def trained(train: Tensor, seed: int, quick: bool) -> ifpyro.InflationaryFlow:
    """The flow of a split, from the cache if it is there."""
    if quick:
        return ifpyro.fit(train, seed=seed, max_steps=50, progress=False)
    path = CACHE / f"calibration-patients-{seed}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        ifpyro.fit(train, seed=seed, progress=False).save(path)
    return ifpyro.load(path)


def hide(test: Tensor, seed: int) -> list[Case]:
    """Ten hidden columns for every patient, and noise."""
    rng = np.random.default_rng(1000 + seed)
    cases = []
    for x in test:
        seen = torch.ones(len(x), dtype=torch.bool)
        seen[torch.as_tensor(rng.permutation(len(x))[:HIDDEN])] = False
        cases.append(Case(x, seen, x + NOISE * torch.as_tensor(rng.normal(size=len(x)), dtype=x.dtype)))
    return cases


# -- the flow --------------------------------------------------------------------------------------------------------


def by_flow(flow: ifpyro.InflationaryFlow, cases: list[Case], particles: int) -> Scores:
    """Posteriors and evidences by tempered SMC."""

    def model(y: Tensor, columns: Tensor) -> None:
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., columns], NOISE).to_event(1), obs=y)

    draws, log_score = [], []
    for k, case in enumerate(tqdm(cases)):
        columns = case.seen.nonzero().flatten()
        everything = torch.arange(len(case.x))
        seen = ifpyro.SMC(model, particles, seed=k, progress=False).run(case.noisy[columns], columns)
        whole = ifpyro.SMC(model, particles, seed=k, progress=False).run(case.noisy, everything)
        draws.append(seen.get_samples()["x"][:, ~case.seen])
        log_score.append(whole.log_evidence - seen.log_evidence)
    truth = np.stack([case.x[~case.seen].double().numpy() for case in cases])
    stacked = torch.stack(draws).double().numpy()
    return Scores(truth, stacked, np.array(log_score), sample_crps(truth, stacked))


def sample_crps(truth: Array, draws: Array) -> Array:
    """``E|X - x| - E|X - X'| / 2`` over draws ``(S, L, d)``, without bias, averaged over columns: ``(S,)``."""
    count = draws.shape[1]
    ordered = np.sort(draws, axis=1)
    rank = (2 * np.arange(1, count + 1) - count - 1)[:, None]
    between = 2 * (rank * ordered).sum(1) / (count * (count - 1))  # mean |X - X'| over pairs
    return (np.abs(draws - truth[:, None]).mean(1) - between / 2).mean(1)


# -- the Gaussian ----------------------------------------------------------------------------------------------------


def by_gaussian(train: Tensor, cases: list[Case], count: int = 2000) -> Scores:
    """The same from the mean and covariance of the training rows, in closed form; draws serve for coverage alone."""
    mean, covariance = train.double().mean(0).numpy(), np.cov(train.double().numpy().T)
    rng = np.random.default_rng(0)
    truth, draws, log_score, crps = [], [], [], []
    for case in cases:
        seen, hidden = case.seen.numpy(), ~case.seen.numpy()
        noisy, x = case.noisy.double().numpy(), case.x.double().numpy()
        observed = covariance[np.ix_(seen, seen)] + NOISE**2 * np.eye(seen.sum())
        gain = np.linalg.solve(observed, covariance[np.ix_(seen, hidden)]).T
        centre = mean[hidden] + gain @ (noisy[seen] - mean[seen])
        spread = covariance[np.ix_(hidden, hidden)] - gain @ covariance[np.ix_(seen, hidden)]
        truth.append(x[hidden])
        draws.append(rng.multivariate_normal(centre, spread, count))
        with_noise = stats.multivariate_normal(centre, spread + NOISE**2 * np.eye(HIDDEN))
        log_score.append(float(with_noise.logpdf(noisy[hidden])))
        sd = np.sqrt(np.diag(spread))
        z = (x[hidden] - centre) / sd
        exact = sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
        crps.append(float(exact.mean()))
    return Scores(np.stack(truth), np.stack(draws), np.array(log_score), np.array(crps))


if __name__ == "__main__":
    main()
