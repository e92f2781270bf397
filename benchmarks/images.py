"""Flows of natural image patches: fit, few latents, evaluations, time and memory, posteriors.

    python benchmarks/images.py [SECTION ...] [--quick]

Flows are trained once, 15 minutes of one core for 16 x 16 and 30 for 32 x 32 colour patches, and kept in
``benchmarks/.cache`` (``images_flows.py`` trains them alone). Tables are printed, and replace those of the same
sections in ``benchmarks/images.md``. ``--quick`` takes the same way with barely trained small flows and writes nothing.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import ifpyro
import images_numerics
import images_posterior
import images_smc
from images_flows import KINDS, data, train
from images_gaussian import gaussian_of
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
RESTS = 16  # draws of the latents beyond the first K
SEPARABLE_AXES = (
    "The axes are separable, as `fit` takes them by itself at this size: principal components along channels, rows and "
    "columns. The U-Net sees squares of 2 x 2 pixels as 12 channels and takes 32 patches a step. A U-Net on squares of "
    "4 x 4, whose 48 channels its first layer cut to 32, gained 0.07 to 0.10 bits in as long on all principal axes."
)
KEPT = {
    8: (
        "With power 2 details inflate well before the coarse axes and are decoded after them. The first 8 latents "
        "then lose what PCA loses, and the first 32 a third more instead of 2.6 times as much, at a price of 0.06 bits."
    ),
    16: (
        "At power 1 zero is not where the other latents of a patch are; to average decodes with drawn ones loses less, "
        "for many times the price, but still more than PCA. With power 2 the first 8 and 32 latents lose a twentieth "
        "more than as many principal components and 128 two thirds more, averaged a tenth at most, at a price of 0.17 "
        "bits."
    ),
}


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
        yield SEPARABLE_AXES
    if not quick:
        show_patches({**shown, "flow": drawn, "Gaussian": normal}, kind.size)
        save_picture(f"samples-{kind.size}.png")
        yield ""
        yield f"![Held-out patches, and draws from the flow and from the Gaussian](pictures/samples-{kind.size}.png)"


def reduced(names: tuple[str, ...], quick: bool) -> Iterator[str]:
    """Reconstruction from the first K latents beside PCA, by what becomes of the others."""
    names, rests = (("8-colour",), 2) if quick else (names, RESTS)
    size = KINDS[names[0]].size
    yield f"### The first K latents beside principal components, {size} x {size}"
    yield ""
    yield (
        "Share of the variance of held-out places that the first K latents do not reconstruct, over the same share for "
        "the first K principal components ± standard error. The other latents are zero; or drawn at random, once; or "
        f"drawn {rests} times and the decodes averaged, which estimates the conditional mean. Beside them the power of "
        "`details_first`, and the bits per dimension that the flow gains over the Gaussian."
    )
    yield ""
    yield f"| power | gain, bits | K | PCA loses, % | the others at zero | drawn once | mean of {rests} |"
    yield "|---|---|---|---|---|---|---|"
    gaussian = gaussian_of(names[0])
    x = data(names[0], 8 if quick else 48, "places", seed=2)
    total = (x.flatten(1) - gaussian.mean).square().sum()
    for name in names:
        flow, generator = train(name, 2.0 if quick else None), torch.Generator().manual_seed(0)
        few = x[: 8 if quick else 32]
        gain = mean_and_error((log_prob(flow, few) - gaussian.log_prob(few)) / (flow.latent_dim * math.log(2)))
        with torch.no_grad():
            z = flow.encode(x)
            for k in (k for k in LATENTS if 4 * k <= flow.latent_dim):
                by_pca = _lost(gaussian.first(x, k), x)
                drawn = []
                for _ in range(rests):
                    rest = torch.randn(len(z), flow.latent_dim - k, generator=generator)
                    drawn.append(flow.decode(torch.cat([z[:, :k], rest], 1)))
                found = (flow.decoder(k)(z[:, :k]), drawn[0], torch.stack(drawn).mean(0))
                cells = [f"{KINDS[name].power:g}", gain, f"{k}", f"{100 * by_pca.sum() / total:.2g}"]
                yield f"| {' | '.join(cells + [ratio_and_error(_lost(y, x), by_pca) for y in found])} |"
    yield ""
    yield KEPT[size]


def _lost(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).flatten(1).square().sum(1).double()


def _sample(flow: ifpyro.InflationaryFlow, count: int) -> Tensor:
    return torch.cat([flow.sample(64, seed=seed) for seed in range(-(-count // 64))])[:count]


SECTIONS: dict[str, Callable[[bool], Iterator[str]]] = {
    "fit_16": partial(fit, "16"),
    "fit_32": partial(fit, "32"),
    "reduced_8": partial(reduced, ("8-colour", "8-colour-2")),
    "reduced_16": partial(reduced, ("16", "16-2")),
    "evaluations": images_numerics.evaluations,
    "cost": images_numerics.cost,
    "posterior_16": partial(images_posterior.posterior, "16"),
    "posterior_32": partial(images_posterior.posterior, "32"),
    "smc": partial(images_smc.smc, "8-colour"),
    "smc_16": partial(images_smc.smc, "16"),
}

if __name__ == "__main__":
    main()
