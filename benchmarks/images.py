"""Flows of natural image patches: fit, few latents, evaluations, time and memory, posteriors.

    python benchmarks/images.py [SECTION ...] [--quick]

Flows are trained once, 15 minutes of one core for 16 x 16 and for 32 x 32 colour patches, and kept in
``benchmarks/.cache`` (``images_flows.py`` trains them alone). Tables are printed, and replace those of the same
sections in ``benchmarks/images.md``. ``--quick`` takes the same way with barely trained small flows and writes nothing.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

import ifpyro
import images_numerics
import images_posterior
from images_flows import KINDS, data, train
from paper_common import energy_distance, log_prob, mean_and_error
from results import CACHE, machine, show, write_section

RESULTS = CACHE.parent / "images.md"
HEADER = """# Flows of natural image patches

Written by `python benchmarks/images.py`. Patches come from photographs of scikit-learn and scikit-image at half
resolution, with noise of sd 0.01 on a scale from 0 (black) to 1 (white); no pixel is in two parts. *Places*: the lower
right of photographs that are trained on, no pixel of which was. *Photographs*: `chelsea` and `flower`, which are not
trained on, and are smoother than the others: a prior learnt elsewhere.
"""
HELD_OUT = ("places", "photographs")
LATENTS = (4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"all by default: {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="barely trained small flows, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.quick:
        write_section(RESULTS, "header", [HEADER, machine("diffusers")])
    for name in options.sections or SECTIONS:
        lines: list[str] = []
        start = time.process_time()
        for line in SECTIONS[name](options.quick):
            show(lines, line)
        lines += ["", f"Processor seconds, without training: {time.process_time() - start:.0f}."]
        if not options.quick:
            write_section(RESULTS, name, lines)


class Gaussian:
    """The Gaussian with the mean and covariance of the patches that a flow was trained on."""

    def __init__(self, x: Tensor) -> None:
        rows = x.flatten(1).double()
        self.shape, self.mean = x.shape[1:], rows.mean(0)
        self.variance, self.axes = torch.linalg.eigh(torch.cov(rows.T))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of patches."""
        white = (x.flatten(1).double() - self.mean) @ self.axes / self.variance.sqrt()
        normaliser = self.variance.log().sum() + len(self.mean) * math.log(2 * math.pi)
        return -0.5 * (white.square().sum(1) + normaliser)

    def sample(self, count: int) -> Tensor:
        """Patches drawn from it."""
        noise = torch.randn(count, len(self.mean), generator=torch.Generator().manual_seed(1), dtype=torch.double)
        return (self.mean + (noise * self.variance.sqrt()) @ self.axes.T).reshape(count, *self.shape).float()

    def first(self, x: Tensor, count: int) -> Tensor:
        """Patches projected on the leading principal axes."""
        axes = self.axes[:, -count:]
        rows = (x.flatten(1).double() - self.mean) @ axes @ axes.T + self.mean
        return rows.reshape(x.shape).float()


@cache
def gaussian_of(name: str) -> Gaussian:
    """The Gaussian beside the flow of a name."""
    return Gaussian(data(name, KINDS[name].rows, "train"))


def flows(quick: bool) -> Iterator[tuple[str, ifpyro.InflationaryFlow]]:
    """The two flows that matter, or a small one barely trained."""
    for name in ("8-colour",) if quick else ("16", "32"):
        yield name, train(name, 2.0 if quick else None)


def fit(quick: bool) -> Iterator[str]:
    """Held-out likelihood and energy distance beside a Gaussian with the same covariance."""
    yield "### Fit"
    yield ""
    yield (
        "Bits per dimension that the flow gains over the Gaussian with the mean and full covariance of the same "
        "patches (mean over held-out patches ± standard error), and mean square of the latents (1 if the held-out "
        "patches are as the flow expects). Energy distance of draws to held-out patches, times 1,000; *train*: that "
        "of training patches, the least that can be asked."
    )
    yield ""
    yield (
        "| patches | trained, s | evaluations | round trip | held out | gain, bits per dimension | "
        "latents' mean square | energy distance: flow | Gaussian | train |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, flow in flows(quick):
        kind = KINDS[name]
        gaussian, trained_on = gaussian_of(name), data(name, 1000, "train")
        training, numerics = flow.report["training"], flow.report["numerics"]
        draws = _sample(flow, 32 if quick else 1000)
        for part in HELD_OUT:
            rows = data(name, 1000, part, seed=1)
            few = rows[: 8 if quick else 48]
            gain = (log_prob(flow, few) - gaussian.log_prob(few)) / (flow.latent_dim * math.log(2))
            with torch.no_grad():
                power = flow.encode(few).square().mean(1)
            distances = [energy_distance(x, rows) for x in (draws, gaussian.sample(1000), trained_on)]
            cells = [
                f"{kind.size} x {kind.size}",
                f"{training['seconds']:.0f}",
                f"{flow.grid.evaluations}",
                f"{numerics['round_trip_rmse']:.0e}",
                part,
                mean_and_error(gain, 3),
                mean_and_error(power, 2, ""),
                *(f"{1000 * distance:.0f}" for distance in distances),
            ]
            yield f"| {' | '.join(cells)} |"


def reduced(quick: bool) -> Iterator[str]:
    """Reconstruction from the first K latents beside PCA."""
    yield "### The first K latents beside principal components"
    yield ""
    yield (
        "Share of the variance of held-out places that the first K latents (the others at zero) do not reconstruct, "
        "over the same share for the first K principal components ± standard error; in brackets the latter, in percent."
    )
    yield ""
    yield "| patches | " + " | ".join(f"K = {k}" for k in LATENTS) + " |"
    yield "|---|" + "---|" * len(LATENTS)
    for name, flow in flows(quick):
        gaussian = gaussian_of(name)
        x = data(name, 8 if quick else 64, "places", seed=2)
        total = (x.flatten(1) - gaussian.mean).square().sum()
        cells = []
        with torch.no_grad():
            z = flow.encode(x)
            for k in LATENTS[: 3 if quick else None]:
                ours, theirs = flow.decoder(k)(z[:, :k]), gaussian.first(x, k)
                lost, by_pca = ((y - x).flatten(1).square().sum(1).double() for y in (ours, theirs))
                ratio = lost.sum() / by_pca.sum()
                error = (lost - ratio * by_pca).std() / (by_pca.mean() * math.sqrt(len(x)))
                cells.append(f"{ratio:.2f} ± {error:.2f} ({100 * by_pca.sum() / total:.2g})")
        yield f"| {KINDS[name].size} x {KINDS[name].size} | {' | '.join(cells)} |"


def _sample(flow: ifpyro.InflationaryFlow, count: int) -> Tensor:
    return torch.cat([flow.sample(64, seed=seed) for seed in range(-(-count // 64))])[:count]


SECTIONS: dict[str, Callable[[bool], Iterator[str]]] = {
    "fit": fit,
    "reduced": reduced,
    "evaluations": images_numerics.evaluations,
    "cost": images_numerics.cost,
    "posterior": images_posterior.posterior,
}

if __name__ == "__main__":
    main()
