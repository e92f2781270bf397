"""Is `ifpyro.linear_posterior` right? Missing entries of a real table, beside a Gaussian, the reverse process and SMC.

    python benchmarks/linear_posterior.py [--folds 5] [--masks 2] [--smc 8] [--quick]

The diabetes table (442 patients; ten columns: age, sex, body mass, blood pressure, six of the serum), standardised, the
two sexes blurred by a tenth. In each fold a flow is trained on four fifths of the patients; of every other, entries are
hidden with probability 8% and the rest is seen with noise of standard deviation 0.05. Reported are the coverage of the
central 90% intervals of the hidden entries (with the standard error of independent ones), the continuous ranked
probability score, and processor seconds a patient, for

* the exact conditional of the Gaussian with the training rows' mean and covariance;
* `linear_posterior` with its defaults, 256 draws; and with ``exact=False``, the reverse process.

On some patients tempered SMC (`ifpyro.SMC`, defaults, 512 particles) samples the same posterior through Pyro: distances
of means, in its standard deviations, ratios of standard deviations, and log-evidences.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

import ifpyro
from results import RESULTS, machine, show, write_section

SD, HIDDEN, DRAWS, SEX = 0.05, 0.08, 256, 1
METHODS = ("Gaussian, exact", "`linear_posterior`", "`linear_posterior`, `exact=False`")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--masks", type=int, default=2)
    parser.add_argument("--smc", type=int, default=8, help="patients also sampled by SMC")
    parser.add_argument("--quick", action="store_true", help="one fold, one mask, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folds, masks = (1, 1) if options.quick else (options.folds, options.masks)
    inside: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    score: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    seconds = dict.fromkeys(METHODS, 0.0)
    patients, compared = 0, []
    for train, held_out, fold in splits(folds):
        flow = ifpyro.fit(train, seed=fold, progress=False, max_seconds=60)
        for mask in range(masks):
            generator = torch.Generator().manual_seed(100 * fold + mask)
            hidden = torch.rand(held_out.shape, generator=generator) < HIDDEN
            noise = SD * torch.randn(held_out.shape, generator=generator)
            for row in hidden.any(1).nonzero().flatten().tolist():
                gaps, y, x = hidden[row], held_out[row] + noise[row], held_out[row]
                patients += 1
                for name in METHODS:
                    began = time.process_time()
                    draws = draw(name, flow, train, gaps, y, patients)[:, gaps]
                    seconds[name] += time.process_time() - began
                    low, high = draws.quantile(0.05, 0), draws.quantile(0.95, 0)
                    inside[name].append((x[gaps] >= low) & (x[gaps] <= high))
                    score[name].append(crps(draws, x[gaps]))
                if len(compared) < options.smc and row % 5 == 0:
                    compared.append(beside_smc(flow, gaps, y, patients))
            print(
                fold,
                mask,
                patients,
                *(f"{float(torch.cat(v).float().mean()):.3f}" for v in inside.values()),
                flush=True,
            )
    lines: list[str] = []
    entries = len(torch.cat(inside[METHODS[0]]))
    show(lines, "## Linear observations: missing entries of a table\n")
    show(lines, f"{entries} hidden entries of {patients} incomplete rows of the diabetes table.\n")
    show(lines, "| method | coverage of 90% | CRPS | seconds a row |\n" + "|---" * 4 + "|")
    for name in METHODS:
        share = float(torch.cat(inside[name]).float().mean())
        error = (share * (1 - share) / entries) ** 0.5
        mean = float(torch.cat(score[name]).mean())
        show(
            lines, f"| {name} | {100 * share:.1f} ± {100 * error:.1f}% | {mean:.3f} | {seconds[name] / patients:.2f} |"
        )
    away, ratio, evidence, error, took = (np.array(column) for column in zip(*compared, strict=True))
    expected = (1 / DRAWS + 1 / 512) ** 0.5
    show(
        lines,
        f"\nSMC on {len(compared)} of these rows: means of the hidden entries {away.mean():.3f} of its standard "
        f"deviations apart (root mean square; {DRAWS} and 512 independent draws: {expected:.3f}), standard "
        f"deviations in the ratio {ratio.mean():.3f}, log-evidences {evidence.mean():+.2f} nat apart on average "
        f"(SMC's standard error {error.mean():.2f}); SMC takes {took.mean():.0f} s a row.",
    )
    show(lines, f"\n`python benchmarks/linear_posterior.py`; {machine('scikit-learn')}")
    if not options.quick:
        write_section(RESULTS, "linear-posterior", lines)


def splits(folds: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Training rows, held-out rows, and the fold's number."""
    x = torch.tensor(load_diabetes(scaled=False).data)
    generator = torch.Generator().manual_seed(0)
    x = x[torch.randperm(len(x), generator=generator)]
    x = (x - x.mean(0)) / x.std(0)
    x[:, SEX] += 0.1 * torch.randn(len(x), generator=generator, dtype=x.dtype)
    part = torch.arange(len(x)) % 5
    for fold in range(folds):
        yield x[part != fold].float(), x[part == fold].float(), fold


def draw(name: str, flow: ifpyro.InflationaryFlow, train: Tensor, gaps: Tensor, y: Tensor, seed: int) -> Tensor:
    """Draws of a whole row, ``(DRAWS, D)``."""
    if name == METHODS[0]:
        mean, covariance = train.double().mean(0), torch.cov(train.double().T)
        seen = ~gaps
        gain = covariance[:, seen] @ torch.linalg.inv(covariance[seen][:, seen] + SD**2 * torch.eye(int(seen.sum())))
        centre = mean + gain @ (y.double() - mean)[seen]
        root = torch.linalg.cholesky(covariance - gain @ covariance[seen] + 1e-9 * torch.eye(len(mean)))
        noise = torch.randn(DRAWS, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        return (centre + noise @ root.T).float()
    exact = name == METHODS[1]
    return ifpyro.linear_posterior(flow, ~gaps, y, SD, draws=DRAWS, exact=exact, seed=seed, progress=False)


def crps(draws: Tensor, x: Tensor) -> Tensor:
    """Continuous ranked probability score of every entry."""
    spread = (draws[:, None] - draws[None]).abs().mean((0, 1)) * DRAWS / (DRAWS - 1)
    return (draws - x).abs().mean(0) - 0.5 * spread


def beside_smc(flow: ifpyro.InflationaryFlow, gaps: Tensor, y: Tensor, seed: int) -> tuple[float, ...]:
    """Distance of means, ratio of standard deviations, difference of log-evidences, SMC's error of it, its seconds."""
    ours = ifpyro.linear_posterior(flow, ~gaps, y, SD, draws=DRAWS, seed=seed, progress=False)

    def model(seen: Tensor) -> None:
        x = pyro.sample("x", flow.prior())
        pyro.sample("y", dist.Normal(x[..., ~gaps], SD).to_event(1), obs=seen)

    began = time.process_time()
    sampler = ifpyro.SMC(model, seed=seed, progress=False)
    theirs = sampler.run(y[~gaps]).get_samples()["x"][:, gaps]
    took = time.process_time() - began
    away = float(((ours[:, gaps].mean(0) - theirs.mean(0)) / theirs.std(0)).square().mean().sqrt())
    ratio = float((ours[:, gaps].std(0) / theirs.std(0)).mean())
    assert ours.log_evidence is not None
    difference = float(ours.log_evidence) - sampler.log_evidence
    print(
        "  SMC", f"{away:.3f} {ratio:.3f} {difference:.3f} +- {sampler.log_evidence_se:.3f}, {took:.1f} s", flush=True
    )
    return away, ratio, difference, sampler.log_evidence_se, took


if __name__ == "__main__":
    main()
