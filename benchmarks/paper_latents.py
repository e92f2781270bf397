"""Sections on what a latent means: inflation gaps, kept axes, and reconstruction from the first K latents."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ifpyro.flow.axes.basis import Basis
from ifpyro.flow.reconstruction import lost
from ifpyro.flow.tuning import measure
from paper_common import NUMBERS_OF_LATENTS, energy_distance, log_prob, mean_and_error, ratio_and_error
from paper_flows import Key, data, flow_of, kept

GAPS = (0.5, 1.0, 1.25)  # a gap of 1.5 ends closer to pi/2 than double precision can tell
KEPT = (2, 8, 16, 32)  # dimensions
SCHEDULES = ("preserving", "reducing", *(f"details first, p = {p:g}" for p in (0.5, 1, 1.5, 2, 3)))
FEW = ("preserving", "reducing", "details first, p = 1", "details first, p = 2")
SEEDS = {"digits, pixels": (0, 1, 2), "breast cancer": (0, 1), "wine": (0, 1)}

# -- the inflation gap, and the number of kept axes ------------------------------------------------------------------


def gap_keys(quick: bool) -> list[Key]:
    """All flows of the section."""
    reducing = [f"reducing, gap = {gap:g}" if gap != 1 else "reducing" for gap in GAPS]
    names = ["preserving", *reducing, "details first, p = 1"]
    return [Key("digits, pixels", name) for name in (names[::3] if quick else names)]


def gaps(quick: bool) -> Iterator[str]:
    """The paper's table 3: what a wider gap costs."""
    dim = data("digits, pixels").dim
    yield f"## Inflation gap: digits, {dim} pixels, {kept(dim)} kept axes\n"
    yield from _compressed([(key, kept(dim)) for key in gap_keys(quick)], quick)


def dimension_keys(quick: bool) -> list[Key]:
    """All flows of the section; that of the usual number of axes is shared with the other sections."""
    return [Key("digits, pixels", "preserving"), *(key for key, _ in _by_dimension(quick))]


def dimensions(quick: bool) -> Iterator[str]:
    """The paper's tables of quality against the number of kept dimensions."""
    yield f"## Kept dimensions: digits, {data('digits, pixels').dim} pixels, inflation gap 1\n"
    yield from _compressed(_by_dimension(quick), quick)


def _by_dimension(quick: bool) -> list[tuple[Key, int]]:
    usual = kept(data("digits, pixels").dim)
    names = {keep: "reducing" if keep == usual else f"reducing, keep = {keep}" for keep in KEPT[: 1 if quick else None]}
    return [(Key("digits, pixels", name), keep) for keep, name in names.items()]


def _compressed(flows: list[tuple[Key, int]], quick: bool) -> Iterator[str]:
    """One row for each flow, of whose latents the leading ones are kept."""
    rows = data("digits, pixels")
    held_out, train = (part[:60] if quick else part for part in (rows.held_out, rows.train))
    yield (
        f"Energy distance of 4 x {len(train):,} samples to {len(held_out)} held-out digits, times 1000, with all "
        "latents and with those beyond the kept ones at their mean; ± the standard deviation over the four; that of "
        f"the training digits is {1000 * energy_distance(train, held_out):.2f}. Lost: share of the variance of "
        "held-out pixels that the kept latents do not reconstruct, and that as many principal components do not. PR: "
        f"participation ratio at the end, {_pr(rows.train):.1f} at the data. Log-likelihood of held-out digits in "
        "nats, less that of the preserving flow, ± paired standard error over rows.\n"
    )
    yield (
        "| schedule | kept | PR at the end | evaluations | round trip | energy distance | rest at mean | lost "
        "| PCA loses | log-likelihood |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    z = torch.randn(4, len(train), rows.dim, generator=torch.Generator().manual_seed(1))
    base = log_prob(flow_of(Key("digits, pixels", "preserving"), quick), held_out)
    for key, keep in flows:
        flow = flow_of(key, quick)
        numerics = measure(flow, held_out)
        with torch.no_grad():
            whole = [energy_distance(flow.decode(part), held_out) for part in z]
            leading = [energy_distance(flow.decoder(keep)(part[:, :keep]), held_out) for part in z]
        ours, theirs, total = lost(flow, rows.train, held_out, [keep])
        yield (
            f"| {key.schedule} | {keep} | {float(flow.participation_ratio()):.1f} | {numerics['evaluations']} "
            f"| {numerics['round_trip_rmse']:.0e} | {_thousandths(whole)} | {_thousandths(leading)} "
            f"| {float(ours.sum() / total.sum()):.3f} | {float(theirs.sum() / total.sum()):.3f} "
            f"| {_gain(log_prob(flow, held_out), base, key.schedule)} |"
        )


def _pr(x: Tensor) -> float:
    variance = Basis.from_samples(x).scale.double().square()
    return float(variance.sum() ** 2 / variance.square().sum())


def _thousandths(values: list[float]) -> str:
    figures = 1000 * torch.tensor(values)
    return f"{float(figures.mean()):.2f} ± {float(figures.std()):.2f}"


def _gain(ours: Tensor, base: Tensor, schedule: str) -> str:
    return "–" if schedule == "preserving" else mean_and_error(ours - base)


# -- reconstruction from the first K latents -------------------------------------------------------------------------


def keys(name: str, quick: bool) -> list[Key]:
    """All flows of the section on one data set."""
    schedules = (
        FEW[::3]
        if quick
        else {"digits, logits": FEW, "digits, pixels": (*FEW, "details first, p = 3")}.get(name, SCHEDULES)
    )
    return [Key(name, s, seed) for s in schedules for seed in SEEDS.get(name, (0,))[: 1 if quick else None]]


def pixels(quick: bool) -> Iterator[str]:
    yield f"## The first K latents: digits, {data('digits, pixels').dim} pixels as they are\n"
    yield from _table("digits, pixels", quick)


def logits(quick: bool) -> Iterator[str]:
    yield "## The first K latents: digits, 64 pixels through the logit\n"
    yield "The flow works on logits; errors are those of pixels. Principal components are those of pixels.\n"
    yield from _table("digits, logits", quick)


def breast_cancer(quick: bool) -> Iterator[str]:
    yield "## The first K latents: breast cancer, logarithms of 30 columns\n"
    yield from _table("breast cancer", quick)


def wine(quick: bool) -> Iterator[str]:
    yield "## The first K latents: wine, 13 columns in their own standard deviations\n"
    yield from _table("wine", quick)


def _table(name: str, quick: bool) -> Iterator[str]:
    dim, seeds = data(name).dim, sorted({key.seed for key in keys(name, quick)})
    ks = [k for k in NUMBERS_OF_LATENTS if k < dim]
    parts = [data(name, seed) for seed in seeds]
    held_out = [part.held_out[: 60 if quick else None] for part in parts]
    yield (
        f"Squared error of {sum(map(len, held_out))} held-out rows over that of K principal components ± its standard "
        f"error over rows; splits by seeds {', '.join(map(str, seeds))}. Log-likelihood: nats, less that of "
        "preserving, ± paired standard error over rows.\n\n"
        f"| schedule | {' | '.join(f'K = {k}' for k in ks)} | log-likelihood |\n|---|" + "---|" * (len(ks) + 1)
    )
    base: Tensor | None = None
    for schedule in dict.fromkeys(key.schedule for key in keys(name, quick)):
        flows = [flow_of(Key(name, schedule, seed), quick) for seed in seeds]
        found = [lost(f, p.train, x, ks) for f, p, x in zip(flows, parts, held_out, strict=True)]
        ours, theirs, total = (torch.cat([f[i] for f in found], -1) for i in range(3))
        likelihood = torch.cat([log_prob(f, x) for f, x in zip(flows, held_out, strict=True)])
        base = likelihood if base is None else base  # preserving is the first
        ratios = " | ".join(ratio_and_error(o, t) for o, t in zip(ours, theirs, strict=True))
        yield f"| {schedule} | {ratios} | {_gain(likelihood, base, schedule)} |"
    lost_by_pca = " | ".join(f"{float(v / total.sum()):.3f}" for v in theirs.sum(-1))
    yield f"| (PCA's share of lost variance) | {lost_by_pca} | – |"
