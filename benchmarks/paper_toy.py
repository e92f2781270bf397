"""Section ``toys``: the paper's toy experiments, each with its numerical errors and its distance to the truth."""

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from scipy import stats
from torch import Tensor

import ifpyro
from ifpyro import Schedule, datasets
from ifpyro.numerics import measure
from paper_common import cached, energy_distance, log_prob, show

ROWS, HELD_OUT, COMPARED = 200_000, 20_000, 2_000
TRAIN_SEED, TEST_SEED = 1, 2
STEPS = {"circles": 8_000, "sine": 20_000, "moons": 8_000}  # of training; 5,000 for sets in space
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "preserving": lambda dim: Schedule.preserving(),
    "reducing": lambda dim: Schedule.reducing(dim - 1),
    "details first": lambda dim: Schedule.details_first(),
}
"""Name -> schedule for data of ``dim`` axes; the paper keeps a line of the plane, or a plane of space."""


def toys(quick: bool) -> list[str]:
    lines: list[str] = []
    show(lines, "### The five toy sets, and two at another scale\n")
    show(
        lines,
        f"{ROWS:,} training rows, {HELD_OUT:,} held out. Evaluations and round trip (root mean square, in standard "
        "deviations of the data) are of one decode and of encode-decode. Energy distance: 2,000 samples against 2,000 "
        "held-out rows, times 1000, ± the standard deviation of that figure between two exact samples. Gap: mean "
        "held-out log-likelihood below the exact value, nats, ± its Monte Carlo error. Latent KS: largest "
        "Kolmogorov-Smirnov distance to a normal over the axes and 20 random directions, 10,000 held-out rows (1% of "
        "exact samples exceed 0.016 in a given direction). PR: participation ratio at the data and at the end in the "
        "paper's rescaled coordinates, and its largest relative difference to the closed form over 33 times (5,000 "
        "rows). Thin: sd of the last axis over the first at the end.\n",
    )
    show(
        lines,
        "| set | flow | evaluations | round trip | energy distance | gap | latent KS | PR | off closed form | thin |\n"
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    seen, seconds = 0, 0.0
    for name in list(datasets.paper())[:: 3 if quick else 1]:
        toy = datasets.paper()[name]
        test, null = toy.sample(2_000 if quick else HELD_OUT, seed=TEST_SEED), energy_noise(toy)
        for kind in SCHEDULES:
            flow = flow_of(name, kind, quick)
            show(lines, f"| {name} | {kind} | {row(flow, toy, test, null)} |")
            seen = max(seen, flow.report["training"]["samples_seen"])
            seconds += flow.report["training"]["seconds"]
    show(lines, "")
    show(
        lines,
        f"Most training samples seen by a flow: {seen:,}; {seconds:.0f} s of training in all. The paper's reference "
        "code integrates these sets with 701 to 1501 Euler steps and trains, by its default, on 200 million samples.",
    )
    return lines


def energy_noise(toy: datasets.ToySet, repeats: int = 4) -> float:
    """Standard deviation of the energy distance, times 1000, between two exact samples."""
    found = [
        energy_distance(toy.sample(COMPARED, seed=10 + k), toy.sample(COMPARED, seed=50 + k)) for k in range(repeats)
    ]
    return 1000 * math.sqrt(sum(e**2 for e in found) / repeats)


def row(flow: ifpyro.InflationaryFlow, toy: datasets.ToySet, test: Tensor, null: float) -> str:
    """The cells of one flow."""
    found = measure(flow, test[:2000])
    gap = toy.log_prob(test) - log_prob(flow, test)
    distance = 1000 * energy_distance(flow.sample(COMPARED, seed=3), test[:COMPARED])
    with torch.no_grad():
        z = flow.encode(test[:10_000])
        times, path = flow.trajectory(test[:5000])
    ratio, closed = participation_ratio(path), flow.participation_ratio(times)
    off = float((ratio / closed - 1).abs().max())
    last = path[-1].std(0)
    return (
        f"{found['evaluations']} | {found['round_trip_rmse']:.0e} | {distance:.2f} ± {null:.2f} "
        f"| {float(gap.mean()):.4f} ± {float(gap.std()) / math.sqrt(len(gap)):.4f} | {normality(z):.3f} "
        f"| {float(ratio[0]):.2f} → {float(ratio[-1]):.2f} | {100 * off:.1f}% | {float(last[-1] / last[0]):.0e}"
    )


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


def flow_of(name: str, kind: str, quick: bool) -> ifpyro.InflationaryFlow:
    """The flow of a set and a schedule, trained if it is not in the cache."""
    toy = datasets.paper()[name]

    def train() -> ifpyro.InflationaryFlow:
        return ifpyro.fit(
            toy.sample(2_000 if quick else ROWS, seed=TRAIN_SEED),
            schedule=SCHEDULES[kind](toy.dim),
            max_steps=100 if quick else STEPS.get(name, 5_000),
            seed=0,
            progress=False,
        )

    return cached(f"{name}-{kind}".replace(", ", "-").replace(" ", "-"), train, quick)


def train_all(quick: bool, jobs: int) -> None:
    """Train what is missing, several flows at once."""
    if quick or jobs == 1:
        return
    pairs = [(name, kind) for name in datasets.paper() for kind in SCHEDULES]
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        list(pool.map(_train, *zip(*pairs, strict=True)))


def _train(name: str, kind: str) -> None:
    flow_of(name, kind, False)
    print(f"trained: {name}, {kind}", flush=True)


SECTIONS = {"toys": toys}
