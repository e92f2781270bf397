"""Posteriors of image patches on an accelerator: tempered SMC for many patches in one batch, beside noising and
denoising."""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ifpyro
from ifpyro.infer.model.many import ManyDataSets
from images_flows import KINDS, train
from images_posterior import NOISE, Task, observed, save_picture, show_patches, tasks
from images_smc import DRAWS, PART, PATCHES, agreement, between_islands, first_patch, map_error, model, score

CASES = {"16:in-painting": 8, "16:deblurring": 8, "32:in-painting": 2}
"""Size and task, and the first so many patches."""
PARTICLES, ISLANDS = 64, 4  # of every patch
GRID = {"steps": 6, "method": "midpoint"}
KEEP = 0.3  # of the particles, at every temperature
RATIO = 0.9  # of neighbouring noise levels


class Found(NamedTuple):
    """Draws of all patches by SMC and by `linear_posterior`, and what they cost."""

    draws: Tensor  # (patches, islands, draws, D)
    log_evidence: Tensor  # (patches, islands)
    temperatures: int
    seconds: float
    reverse: Tensor  # (patches, DRAWS, D)
    reverse_seconds: float
    error: float  # of the map, in standard deviations


def smc(options: argparse.Namespace) -> Iterator[str]:
    """SMC beside `linear_posterior`: coverage, agreement, seconds."""
    yield "### Posteriors of held-out patches by tempered SMC"
    yield ""
    yield (
        f"Observations, tasks and columns as in images.md, held-out places, noise of sd {NOISE}. SMC: {PARTICLES} "
        f"particles in {ISLANDS} islands for every patch, all patches of a task in one batch, tempered from the prior "
        f"in the latent through a map of {2 * GRID['steps']} evaluations, recorded (`flow.cuda_graphs`). "
        f"`linear_posterior`: {DRAWS} draws a patch, ratio {RATIO}. Seconds for a patch, the three tasks beside one "
        "another on the device."
    )
    yield ""
    yield (
        "| size | task | patches | map's error | draws by | 90% covers | CRPS | means differ by | chance alone "
        "| sd over SMC's | R-hat | log evidence's sd | temperatures | s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    shown: dict[str, Tensor] = {}
    for case in options.cases:
        size, name = case.split(":")
        task = next(task for task in tasks(KINDS[size].size) if task.name == name)
        x, y = (rows[: CASES[case]] for rows in observed(size, task, PART, PATCHES))
        found = kept(case, task, y, options)
        ours, theirs = found.draws[..., task.scored], found.reverse[..., task.scored]
        rhat, spread = between_islands(ours, found.log_evidence)
        what = f"| {KINDS[size].size} | {name} | {len(y)} | {found.error:.2f}"
        truth = x[:, task.scored]
        yield (
            f"{what} | SMC | {score(truth, ours.flatten(1, 2))} | | | | {rhat:.2f} | {spread:.1f} "
            f"| {found.temperatures} | {found.seconds / len(y):.0f} |"
        )
        yield (
            f"{what} | `linear_posterior` | {score(truth, theirs)} | {' | '.join(agreement(ours, theirs))} | | | "
            f"| {found.reverse_seconds / len(y):.0f} |"
        )
        if size == "32":
            shown |= first_patch(task, x[0], y[0], found.draws[0].flatten(0, 1), found.reverse[0])
    if shown:
        show_patches(shown, 32)
        save_picture("smc-32.png")
        yield ""
        yield "![Draws of the first patch of 32 x 32 pixels](pictures/smc-32.png)"


def kept(case: str, task: Task, y: Tensor, options: argparse.Namespace) -> Found:
    """What was found, from the folder or made now."""
    path: Path = options.out / f"accelerator-{case.replace(':', '-')}.npz"
    if not path.exists():
        found = sample(case, task, y, options.device)
        columns = {name: value.cpu().numpy() for name, value in found._asdict().items() if isinstance(value, Tensor)}
        columns |= {name: columns[name].astype(np.float16) for name in ("draws", "reverse")}
        numbers = {name: value for name, value in found._asdict().items() if name not in columns}
        np.savez_compressed(path, **columns, **numbers)
    with np.load(path) as stored:
        values = {name: torch.as_tensor(stored[name]) for name in stored.files}
    tensors = {name: value.float() for name, value in values.items() if value.ndim}
    return Found(**tensors, **{name: value.item() for name, value in values.items() if not value.ndim})


def sample(case: str, task: Task, y: Tensor, device: str) -> Found:
    """All patches at once."""
    flow = train(case.split(":")[0]).to(device)
    flow.grid, flow.cuda_graphs = replace(flow.grid, **GRID), True
    count, operator, y = len(y), task.operator.to(device), y.to(device)
    start = time.perf_counter()
    density = ManyDataSets(model, (flow, operator, y[0]), {}, {"y": y})
    run = ifpyro.SMC(density, PARTICLES * count, num_islands=ISLANDS * count, ess_threshold=KEEP, seed=0)
    run.run_density(density)
    draws = run.get_samples(group_by_chain=True)["patch"].flatten(2)
    seconds, start = time.perf_counter() - start, time.perf_counter()
    reverse = ifpyro.linear_posterior(
        flow, operator, y, NOISE, draws=DRAWS, ratio=RATIO, seed=1, batch_size=count * DRAWS, progress=False
    ).flatten(2)
    reverse_seconds = time.perf_counter() - start
    return Found(
        draws.unflatten(0, (count, ISLANDS)),
        run.island_log_evidence.reshape(count, ISLANDS),
        len(run.stages),
        seconds,
        reverse,
        reverse_seconds,
        map_error(flow),
    )
