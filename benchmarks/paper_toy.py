"""Section ``toys``: the paper's toy experiments, each with its numerical errors and its distance to the truth."""

import math
from collections.abc import Iterator

import torch
from scipy import stats
from torch import Tensor

import ifpyro
from ifpyro.data import datasets
from ifpyro.flow.tuning import measure
from paper_common import energy_distance, log_prob, mean_and_error
from paper_flows import HELD_OUT, ROWS, Key, data, flow_of

COMPARED = 2_000
SCHEDULES = ("preserving", "reducing", "details first, p = 1")


def keys(quick: bool) -> list[Key]:
    """All flows of the section."""
    names = ["moons", "S-curve, flat"] if quick else list(datasets.paper())
    return [Key(name, schedule) for name in names for schedule in SCHEDULES]


def toys(quick: bool) -> Iterator[str]:
    yield "## The five toy sets, and the two in space at another scale\n"
    yield (
        f"{ROWS:,} training rows, {HELD_OUT:,} held out. Reducing keeps a line of the plane, a plane of space. "
        "Evaluations and round trip (root mean square, in standard deviations of the data) are of one decode and of "
        "encode-decode. Energy distance: 2,000 samples against 2,000 held-out rows, times 1000, ± the standard "
        "deviation of that figure between two exact samples. Below exact: exact mean held-out log-likelihood less the "
        "flow's, nats, ± its Monte Carlo error; over preserving: the flow's less that of the preserving flow, ± paired "
        "standard error over rows. Latent KS: largest Kolmogorov-Smirnov distance to a normal over the axes and 20 "
        "random directions, 10,000 held-out rows (1% of exact samples exceed 0.016 in a given direction). PR: "
        "participation ratio at the data and at the end in the paper's rescaled coordinates, and its largest relative "
        "difference to the closed form over 33 times (5,000 rows). Thin: sd of the last axis over the first at the "
        "end.\n"
    )
    yield (
        "| set | flow | evaluations | round trip | energy distance | below exact | over preserving | latent KS | PR "
        "| off closed form | thin |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    seen, base = 0, torch.zeros(1)
    for key in keys(quick):
        flow, test = flow_of(key, quick), data(key.data).held_out[: 300 if quick else None]
        ours = log_prob(flow, test)
        base = ours if key.schedule == "preserving" else base
        gain = "–" if key.schedule == "preserving" else mean_and_error(ours - base, 4)
        yield f"| {key.data} | {key.schedule} | {row(flow, datasets.paper()[key.data], test, ours, gain, quick)} |"
        seen = max(seen, flow.report["training"]["samples_seen"])
    yield ""
    yield (
        f"Most training samples seen by a flow: {seen:,}. The paper's reference code integrates these sets with 701 to "
        "1501 Euler steps."
    )


def row(flow: ifpyro.InflationaryFlow, toy: datasets.ToySet, test: Tensor, ours: Tensor, gain: str, quick: bool) -> str:
    """The cells of one flow, whose log-densities of the rows ``test`` are ``ours``."""
    found = measure(flow, test[:2000])
    distance = 1000 * energy_distance(flow.sample(len(test[:COMPARED]), seed=3), test[:COMPARED])
    with torch.no_grad():
        z = flow.encode(test[:10_000])
        times, path = flow.trajectory(test[:5000])
    ratio, closed = participation_ratio(path), flow.participation_ratio(times)
    off = float((ratio / closed - 1).abs().max())
    last = path[-1].std(0)
    return (
        f"{found['evaluations']} | {found['round_trip_rmse']:.0e} | {distance:.2f} ± {energy_noise(toy, quick):.2f} "
        f"| {mean_and_error(toy.log_prob(test) - ours, 4, '')} "
        f"| {gain} "
        f"| {normality(z):.3f} | {float(ratio[0]):.2f} → {float(ratio[-1]):.2f} | {100 * off:.1f}% "
        f"| {float(last[-1] / last[0]):.0e}"
    )


def energy_noise(toy: datasets.ToySet, quick: bool) -> float:
    """Standard deviation of the energy distance, times 1000, between two exact samples."""
    rows, repeats = (300, 1) if quick else (COMPARED, 4)
    found = [energy_distance(toy.sample(rows, seed=10 + k), toy.sample(rows, seed=50 + k)) for k in range(repeats)]
    return 1000 * math.sqrt(sum(e**2 for e in found) / repeats)


def participation_ratio(path: Tensor) -> Tensor:
    """``(tr C)^2 / tr C^2`` of the covariance of each row of ``(m, n, D)``."""
    centred = (path - path.mean(1, keepdim=True)).double()
    covariance = centred.mT @ centred / (path.shape[1] - 1)
    return covariance.diagonal(dim1=1, dim2=2).sum(1) ** 2 / covariance.square().sum((1, 2))


def normality(z: Tensor) -> float:
    """Largest Kolmogorov-Smirnov distance to a normal over the axes and 20 random directions."""
    directions = torch.randn(20, z.shape[1], generator=torch.Generator().manual_seed(0))
    directions = torch.cat([torch.eye(z.shape[1]), directions / directions.norm(dim=1, keepdim=True)])
    return max(stats.kstest((z @ d).numpy(), "norm").statistic for d in directions)
