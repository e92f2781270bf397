"""What a latent means: inflation gaps, reconstruction from the first K latents, and posteriors over them.

    python benchmarks/paper_latents.py [--only gaps reconstruction unit_interval tables posterior] [--quick]

Digits are dequantised as in ``ifpyro.demo`` and split by seed 0: 1,437 to train on (a tenth of them for early
stopping), 360 held out. Sections ``gaps`` and ``reconstruction`` train on the 53 pixels whose standard deviation
exceeds 0.03, as they are, ``unit_interval`` on all 64 through the logit; errors are squared distances of *pixels* in
both. Flows are trained once, with the seed of their split, and kept in ``benchmarks/.cache``. Tables are printed, and
appended to ``benchmarks/paper_latents.md``.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ifpyro import Schedule
from ifpyro.basis import Basis
from ifpyro.numerics import measure
from ifpyro.reconstruction import lost
from paper_common import CACHE, energy_distance, log_prob, show
from paper_latents_flows import KEEP, SCHEDULES, data, flow_of
from paper_latents_posterior import posterior

KS = (1, 2, 4, 8, 16, 32)
GAPS = (0.25, 0.5, 1.0, 1.25)  # a gap of 1.5 ends closer to pi/2 than double precision can tell

# -- the inflation gap -----------------------------------------------------------------------------------------------


def gaps(quick: bool) -> list[str]:
    """The paper's table 3: what a wider gap costs."""
    lines: list[str] = []
    rows = data("pixels", 0)
    held_out = rows.held_out[:60] if quick else rows.held_out
    kept = Basis.from_samples(rows.train).to_standard(held_out)
    show(lines, f"### Inflation gap: digits, 53 pixels, {KEEP} kept axes\n")
    show(
        lines,
        "Energy distance of 4 x 1,437 samples to held-out digits, times 1000, with all latents and with the "
        f"compressed ones at their mean; ± the standard deviation over the four; that of the training digits is "
        f"{1000 * energy_distance(rows.train, held_out):.2f}. Lost: share of the variance of held-out pixels that "
        f"{KEEP} latents do not reconstruct ({KEEP} principal components: "
        f"{_share(held_out, kept, rows.train):.3f}). PR: participation ratio at the end, {_pr(rows.train):.1f} at the "
        "data. Log-likelihood in nats, less that of the preserving flow, ± paired standard error over rows.\n",
    )
    show(
        lines,
        "| schedule | PR at the end | evaluations | round trip | energy distance | compressed at mean | lost "
        "| log-likelihood |\n|---|---|---|---|---|---|---|---|",
    )
    base = log_prob(flow_of("pixels", SCHEDULES["preserving"], quick), held_out)
    schedules = {"preserving": SCHEDULES["preserving"]}
    schedules |= {f"reducing, gap {gap:g}": Schedule.reducing(KEEP, gap) for gap in GAPS}
    schedules |= {"details first, p = 1": Schedule.details_first(1.0)}
    for name, schedule in schedules.items():
        flow = flow_of("pixels", schedule, quick)
        numerics = measure(flow, held_out)
        z = torch.randn(4, len(rows.train), flow.latent_dim, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            whole = [energy_distance(flow.decode(part), held_out) for part in z]
            leading = [energy_distance(flow.decoder(KEEP)(part[:, :KEEP]), held_out) for part in z]
        ours, _, total = lost(flow, rows.train, held_out, [KEEP])
        show(
            lines,
            f"| {name} | {float(flow.participation_ratio()):.1f} | {numerics['evaluations']} "
            f"| {numerics['round_trip_rmse']:.0e} | {_thousandths(whole)} | {_thousandths(leading)} "
            f"| {float(ours.sum() / total.sum()):.3f} | {_paired(log_prob(flow, held_out) - base)} |",
        )
    return lines


def _share(x: Tensor, standard: Tensor, train: Tensor) -> float:
    scores = (standard * Basis.from_samples(train).scale).square()
    return float(scores[:, KEEP:].sum() / scores.sum())


def _pr(x: Tensor) -> float:
    variance = Basis.from_samples(x).scale.double().square()
    return float(variance.sum() ** 2 / variance.square().sum())


def _thousandths(values: list[float]) -> str:
    figures = 1000 * torch.tensor(values)
    return f"{float(figures.mean()):.2f} ± {float(figures.std()):.2f}"


def _paired(difference: Tensor) -> str:
    return f"{float(difference.mean()):+.2f} ± {float(difference.std() / math.sqrt(len(difference))):.2f}"


# -- reconstruction from the first K latents -------------------------------------------------------------------------


def reconstruction(quick: bool) -> list[str]:
    """All schedules on digits, pixels as they are."""
    lines: list[str] = []
    show(lines, "### The first K latents: digits, 53 pixels as they are\n")
    return lines + _table("pixels", SCHEDULES, (0,), quick)


def unit_interval(quick: bool) -> list[str]:
    """The demo's digits: the flow works on logits, errors are in pixels."""
    lines: list[str] = []
    show(lines, "### The first K latents: digits, 64 pixels through the logit\n")
    names = ("preserving", "details first, p = 1", "details first, p = 2")
    return lines + _table("images", {name: SCHEDULES[name] for name in names}, (0,), quick)


def tables(quick: bool) -> list[str]:
    """Breast cancer (logarithms) and wine, in columns' own standard deviations."""
    lines: list[str] = []
    show(lines, "### The first K latents: breast cancer, logarithms of 30 columns\n")
    lines += _table("breast_cancer", SCHEDULES, (0,) if quick else (0, 1), quick)
    show(lines, "\n### The first K latents: wine, 13 columns\n")
    return lines + _table("wine", SCHEDULES, (0,) if quick else (0, 1), quick)


def _table(name: str, schedules: dict[str, Schedule], seeds: tuple[int, ...], quick: bool) -> list[str]:
    lines: list[str] = []
    dim = data(name, 0).train[0].numel()
    ks = [k for k in KS if k < dim]
    cells = " | ".join(f"K = {k}" for k in ks)
    show(
        lines,
        f"Squared error of held-out rows over that of K principal components ± its standard error over rows, splits by "
        f"seeds {seeds}; log-likelihood, nats, less that of preserving, ± paired standard error.\n\n"
        f"| schedule | {cells} | log-likelihood |\n|---|" + "---|" * (len(ks) + 1),
    )
    parts = [data(name, seed) for seed in seeds]
    base = [
        log_prob(flow_of(name, Schedule.preserving(), quick, s), p.held_out) for s, p in zip(seeds, parts, strict=True)
    ]
    share = None
    for label, schedule in schedules.items():
        flows = [flow_of(name, _fitting(schedule, dim), quick, seed) for seed in seeds]
        found = [lost(flow, p.train, p.held_out, ks) for flow, p in zip(flows, parts, strict=True)]
        ours, theirs, total = (torch.cat([f[i] for f in found], -1) for i in range(3))
        share = theirs.sum(-1) / total.sum()
        gain = torch.cat([log_prob(f, p.held_out) - b for f, p, b in zip(flows, parts, base, strict=True)])
        show(
            lines,
            f"| {label} | {' | '.join(_ratio(o, t) for o, t in zip(ours, theirs, strict=True))} | {_paired(gain)} |",
        )
    assert share is not None
    show(lines, f"| (PCA's share of lost variance) | {' | '.join(f'{float(v):.3f}' for v in share)} | – |")
    return lines


def _fitting(schedule: Schedule, dim: int) -> Schedule:
    """The reducing order keeps at most a third of the axes."""
    return Schedule.reducing(min(KEEP, dim // 3), 1.0) if schedule == SCHEDULES["reducing"] else schedule


def _ratio(ours: Tensor, theirs: Tensor) -> str:
    ratio = ours.sum() / theirs.sum()
    error = (ours - ratio * theirs).std() / (theirs.mean() * math.sqrt(len(ours)))
    return f"{float(ratio):.2f} ± {float(error):.2f}"


# -- command line ----------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[bool], list[str]]] = {
    "gaps": gaps,
    "reconstruction": reconstruction,
    "unit_interval": unit_interval,
    "tables": tables,
    "posterior": posterior,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="barely trained flows, few rows, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = CACHE.parent / "paper_latents.md"
    for name in options.only:
        start = time.process_time()
        lines = SECTIONS[name](options.quick)
        print(f"({name}: {time.process_time() - start:.0f} processor seconds)\n", flush=True)
        if not options.quick:
            with results.open("a") as file:
                file.write("\n".join([*lines, "", ""]))


if __name__ == "__main__":
    main()
