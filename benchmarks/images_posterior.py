"""In-painting and deblurring of held-out patches: are the intervals of the posterior right?

    python benchmarks/images_posterior.py 16 in-painting places

    x ~ flow,        y ~ Normal(A x, 0.05),

``A`` being the pixels around a hidden square, or a blur. Draws come from ``ifpyro.linear_posterior``; the rival is the
exact posterior of the Gaussian with the mean and covariance of the patches that the flow was trained on. Draws are kept
in ``benchmarks/.cache``; the command makes those of one task alone.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ifpyro
from ifpyro.calibration import coverage
from images_data import PARTS
from images_flows import KINDS, data, train
from images_gaussian import GaussianPosterior, gaussian_of
from results import CACHE

NOISE = 0.05
BLUR = 1.5  # pixels
DRAWS = 20
PATCHES = {"16": 64, "32": 32}  # for each task and part
LEVELS = (0.5, 0.9, 0.95)
NOTES = {
    "16": (
        "The flow's intervals of 90% cover what they say within about two standard errors; the Gaussian's are too "
        "wide, those of 50% by far."
    ),
    "32": (
        "The flow's intervals of 90% cover what they say, in photographs of another kind too; those of 50% are a "
        "little wide, the Gaussian's far too wide. In places the flow's CRPS is a fifth lower. The photographs are cat "
        "and flower, smoother than the six that the prior is learnt from, and there the Gaussian predicts no worse: "
        "holes of the flower's smooth green ground, a colour that training has not shown, are filled with checks in "
        "some draws. Where little is known, this network is not to be trusted."
    ),
}
PICTURES = Path(__file__).parent / "pictures"


class Task(NamedTuple):
    """What is observed, ``A`` of shape ``(m, D)``, and the pixels that are scored, ``(D,)``."""

    name: str
    operator: Tensor
    scored: Tensor


class Scores(NamedTuple):
    """Of one model on one task: true values ``(S, d)`` and draws ``(S, L, d)`` of the scored pixels, and their mean."""

    truth: Tensor
    draws: Tensor
    mean: Tensor


def tasks(size: int) -> list[Task]:
    """In-painting of the central square of half the edge, and deblurring."""
    seen = torch.ones(3, size, size, dtype=torch.bool)
    seen[:, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = False
    seen = seen.flatten()
    offset = torch.arange(size)
    line = torch.exp(-0.5 * ((offset[:, None] - offset) / BLUR).square())
    line = line / line.sum(1, keepdim=True)  # beyond the edge there is nothing: what is inside counts more
    blur = torch.block_diag(*[torch.kron(line, line)] * 3)
    return [
        Task("in-painting", torch.eye(len(seen))[seen], ~seen),
        Task("deblurring", blur, torch.ones_like(seen)),
    ]


def posterior(name: str, quick: bool) -> Iterator[str]:
    """Coverage, error and CRPS beside the exact Gaussian."""
    name, count = ("8-colour", 2) if quick else (name, PATCHES[name])
    flow, size = train(name, 2.0 if quick else None), KINDS[name].size
    yield f"### Posteriors of held-out {size} x {size} patches"
    yield ""
    yield (
        f"Seen with noise of sd {NOISE}. In-painting: the central {size // 2} x {size // 2} pixels are hidden, and "
        f"scored. Deblurring: a Gaussian blur of sd {BLUR} pixels; all pixels are scored. {count} patches, {DRAWS} "
        "draws for each. *Gaussian*: the exact posterior under a Gaussian prior with the mean and covariance of the "
        "training patches. Coverage of central intervals in percent, root-mean-square error of the posterior mean, "
        "CRPS; ± standard error over patches. Processor seconds a patch."
    )
    yield ""
    yield "| task | held out | prior | 50% covers | 90% covers | 95% covers | RMSE | CRPS | s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for task in tasks(size):
        gaussian = GaussianPosterior(gaussian_of(name), task.operator, NOISE)
        for part in PARTS[2:]:
            x, y = observed(name, task, part, count)
            draws, seconds = sampled(flow, task, y) if quick else kept(name, task, part)
            mean, exact = gaussian.mean(y), gaussian.sample(y)
            pairs = [("flow", draws, draws.mean(1), f"{seconds / count:.1f}"), ("Gaussian", exact, mean, "")]
            for prior, found, centre, took in pairs:
                scores = Scores(x[:, task.scored], found[..., task.scored], centre[:, task.scored])
                yield f"| {task.name} | {part} | {prior} | {cells(scores)} | {took} |"
            if not quick:
                picture(f"{task.name}-{part}-{size}.png", size, task, x, y, draws, mean)
    if not quick:
        yield ""
        for task in tasks(size):
            yield f"![{task.name}](pictures/{task.name}-places-{size}.png)"
            yield ""
        yield NOTES[name]


def observed(name: str, task: Task, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Flattened patches, and what is seen of them."""
    x = data(name, count, part, seed=3).flatten(1)
    noise = torch.randn(count, len(task.operator), generator=torch.Generator().manual_seed(0))
    return x, x @ task.operator.T + NOISE * noise


def sampled(flow: ifpyro.InflationaryFlow, task: Task, y: Tensor) -> tuple[Tensor, float]:
    """Draws ``(S, L, D)`` and the processor seconds that they took."""
    start = time.process_time()
    draws = ifpyro.linear_posterior(flow, task.operator, y, NOISE, draws=DRAWS, seed=1, progress=False)
    return draws.flatten(2), time.process_time() - start


def kept(name: str, task: Task, part: str) -> tuple[Tensor, float]:
    """The same of a trained flow, from the cache or made now."""
    path = CACHE / f"images-{name}-{task.name}-{part}.npz"
    if not path.exists():
        draws, seconds = sampled(train(name), task, observed(name, task, part, PATCHES[name])[1])
        np.savez(path, draws=draws.numpy(), seconds=seconds)
    with np.load(path) as found:
        return torch.as_tensor(found["draws"]), float(found["seconds"])


def cells(scores: Scores) -> str:
    """Coverage, RMSE and CRPS with their errors."""
    covered = coverage(scores.truth.numpy(), scores.draws.numpy(), LEVELS)
    parts = [f"{100 * p:.1f} ± {100 * e:.1f}" for p, e in zip(covered.pooled, covered.pooled_error, strict=True)]
    square = (scores.mean - scores.truth).square().mean(1)
    root = float(square.mean().sqrt())
    parts.append(f"{root:.4f} ± {float(square.std()) / math.sqrt(len(square)) / (2 * root):.4f}")
    crps = sample_crps(scores.truth, scores.draws).mean(1)
    parts.append(f"{float(crps.mean()):.4f} ± {float(crps.std()) / math.sqrt(len(crps)):.4f}")
    return " | ".join(parts)


def sample_crps(truth: Tensor, draws: Tensor) -> Tensor:
    """``E|X - x| - E|X - X'|/2`` from draws ``(S, L, d)``, without bias."""
    ordered, count = draws.sort(1).values, draws.shape[1]
    weight = 2 * torch.arange(1, count + 1) - count - 1
    spread = (weight[:, None] * ordered).sum(1) / (count * (count - 1))
    return (draws - truth[:, None]).abs().mean(1) - spread


def picture(name: str, size: int, task: Task, x: Tensor, y: Tensor, draws: Tensor, gaussian: Tensor) -> None:
    """Twelve patches: truth, what is seen, the two posterior means, and two draws."""
    rows = {
        "truth": x,
        "seen": as_seen(task, y),
        "Gaussian, mean": gaussian,
        "flow, mean": draws.mean(1),
        "flow, a draw": draws[:, 0],
        "another": draws[:, 1],
    }
    show_patches(rows, size)
    save_picture(name)


def as_seen(task: Task, y: Tensor) -> Tensor:
    """Observations as images, ``(S, D)``; hidden pixels are NaN."""
    rows, dim = task.operator.shape
    seen = torch.full((len(y), dim), torch.nan)
    seen[:, task.operator.abs().argmax(1) if rows < dim else slice(None)] = y
    return seen


def save_picture(name: str) -> None:
    """Keep the picture that was drawn last, in few colours: noise does not compress."""
    import matplotlib.pyplot as plt
    from PIL import Image

    PICTURES.mkdir(exist_ok=True)
    plt.savefig(PICTURES / name, dpi=110, bbox_inches="tight")
    plt.close()
    with Image.open(PICTURES / name) as image:
        few = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(PICTURES / name, optimize=True)


def show_patches(rows: dict[str, Tensor], size: int, columns: int = 12) -> None:
    """Rows of patches under captions; hidden pixels in pink."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(len(rows), columns, figsize=(0.8 * columns + 1.6, 0.82 * len(rows)), squeeze=False)
    for line, (caption, patches) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, patch in zip(line, patches[:columns], strict=False):
            image = patch.reshape(3, size, size).movedim(0, -1).numpy()
            axis.imshow(np.where(np.isnan(image), [0.91, 0.63, 0.63], image).clip(0, 1))
        line[0].text(-0.15, 0.5, caption, transform=line[0].transAxes, ha="right", va="center")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PATCHES)
    parser.add_argument("task", choices=[task.name for task in tasks(8)])
    parser.add_argument("part", choices=PARTS[2:])
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {task.name: task for task in tasks(KINDS[options.name].size)}
    print(f"{kept(options.name, known[options.task], options.part)[1]:.0f} s")
