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
from functools import cache, partial

import torch
from torch import Tensor

import ifpyro
import images_numerics
import images_posterior
from images_flows import KINDS, data, train
from images_posterior import save_picture, show_patches
from paper_common import energy_distance, log_prob, mean_and_error, ratio_and_error
from results import CACHE, machine, show, write_section

RESULTS = CACHE.parent / "images.md"
HEADER = """# Flows of natural image patches

Written by `python benchmarks/images.py`. Patches come from photographs of scikit-learn and scikit-image at half
resolution, with noise of sd 0.01 on a scale from 0 (black) to 1 (white); no pixel is in two parts. *Places*: the lower
right of photographs that are trained on, no pixel of which was. *Photographs*: `chelsea` and `flower`, which are not
trained on, and are smoother than the others: a prior learnt elsewhere.
"""
HELD_OUT = ("places", "photographs")
LATENTS = (8, 32, 128)
BEHIND = (
    "The basis here is 256 principal axes and one scale for the other 2,816: the flow starts without what the full "
    "covariance knows of those, and fifteen minutes did not teach it. It stays behind the Gaussian, and its draws show "
    "it."
)
FAR = (
    "With the other latents at zero the flow loses many times more than PCA, unlike flows of the digits. Zero is far "
    "from the latents of any patch, whose length is about the square root of D; whether that is the cause was not "
    "tested."
)


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


def fit(name: str, quick: bool) -> Iterator[str]:
    """Held-out likelihood and energy distance beside a Gaussian with the same covariance."""
    name, flow = ("8-colour", train("8-colour", 2.0)) if quick else (name, train(name))
    kind = KINDS[name]
    training, numerics = flow.report["training"], flow.report["numerics"]
    yield f"### Fit, {kind.size} x {kind.size}"
    yield ""
    yield (
        f"Trained {training['seconds']:.0f} s ({training['samples_seen']:,} patches seen). A decode takes "
        f"{flow.grid.evaluations} evaluations, its error is {numerics['doubling_rmse']:.0e}, that of a round trip "
        f"{numerics['round_trip_rmse']:.0e} standard deviations."
    )
    yield ""
    yield (
        "Bits per dimension that the flow gains over the Gaussian with the mean and full covariance of the same "
        "patches (mean over held-out patches ± standard error), and mean square of the latents (1 if the held-out "
        "patches are as the flow expects). Energy distance of draws to held-out patches, times 1,000; *train*: that "
        "of training patches, the least that can be asked."
    )
    yield ""
    yield "| held out | gain, bits per dimension | latents' mean square | energy distance: flow | Gaussian | train |"
    yield "|---|---|---|---|---|---|"
    gaussian, trained_on = gaussian_of(name), data(name, 1000, "train")
    drawn, normal = _sample(flow, 32 if quick else 400), gaussian.sample(1000)
    shown = {}
    for part in HELD_OUT:
        rows = data(name, 1000, part, seed=1)
        few = rows[: 8 if quick else 32]
        gain = (log_prob(flow, few) - gaussian.log_prob(few)) / (flow.latent_dim * math.log(2))
        with torch.no_grad():
            power = flow.encode(few).square().mean(1)
        distances = [f"{1000 * energy_distance(x, rows):.0f}" for x in (drawn, normal, trained_on)]
        yield f"| {part} | {mean_and_error(gain, 3)} | {mean_and_error(power, 2, '')} | {' | '.join(distances)} |"
        shown[part] = rows
    if name == "32":
        yield ""
        yield BEHIND
    if not quick:
        show_patches({**shown, "flow": drawn, "Gaussian": normal}, kind.size)
        save_picture(f"samples-{kind.size}.png")
        yield ""
        yield f"![Held-out patches, and draws from the flow and from the Gaussian](pictures/samples-{kind.size}.png)"


def reduced(name: str, quick: bool) -> Iterator[str]:
    """Reconstruction from the first K latents beside PCA."""
    name, flow = ("8-colour", train("8-colour", 2.0)) if quick else (name, train(name))
    yield f"### The first K latents beside principal components, {KINDS[name].size} x {KINDS[name].size}"
    yield ""
    yield (
        "Share of the variance of held-out places that the first K latents (the others at zero) do not reconstruct, "
        "over the same share for the first K principal components ± standard error."
    )
    yield ""
    yield "| K | lost, over PCA's | PCA loses, % |"
    yield "|---|---|---|"
    gaussian = gaussian_of(name)
    x = data(name, 8 if quick else 48, "places", seed=2)
    total = (x.flatten(1) - gaussian.mean).square().sum()
    with torch.no_grad():
        z = flow.encode(x)
        for k in LATENTS[: 3 if quick else None]:
            ours, theirs = flow.decoder(k)(z[:, :k]), gaussian.first(x, k)
            lost, by_pca = ((y - x).flatten(1).square().sum(1).double() for y in (ours, theirs))
            yield f"| {k} | {ratio_and_error(lost, by_pca)} | {100 * by_pca.sum() / total:.2g} |"
    yield ""
    yield FAR


def _sample(flow: ifpyro.InflationaryFlow, count: int) -> Tensor:
    return torch.cat([flow.sample(64, seed=seed) for seed in range(-(-count // 64))])[:count]


SECTIONS: dict[str, Callable[[bool], Iterator[str]]] = {
    "fit_16": partial(fit, "16"),
    "fit_32": partial(fit, "32"),
    "reduced_16": partial(reduced, "16"),
    "reduced_32": partial(reduced, "32"),
    "evaluations": images_numerics.evaluations,
    "cost": images_numerics.cost,
    "posterior": images_posterior.posterior,
}

if __name__ == "__main__":
    main()
