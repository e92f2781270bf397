"""The flows of image patches that ``benchmarks/images.py`` measures; each is trained once, and resumes where it was.

    python benchmarks/images_flows.py 16

writes ``benchmarks/.cache/images-16.safetensors``; an interrupted run leaves a checkpoint beside it.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import ifpyro
from ifpyro.flow.networks.images import unet
from ifpyro.training.recipe import Recipe
from images_data import patches
from results import CACHE

OCTAVES = 0.5
RECIPE = Recipe(max_steps=100_000, shared=1, rate=1e-3, patience=100_000, check_every=500)
SEEN = 2000  # patches that decide which network is kept


class Kind(NamedTuple):
    """One flow: patches of ``size`` pixels, in colour or grey, how long it is trained, the channels and patch size of
    its U-Net (none: the library's default network), the power of its schedule, and the rows of a step."""

    size: int
    colour: bool
    rows: int
    seconds: float
    channels: tuple[int, ...] = ()
    patch: int = 2
    power: float = 1.0
    batch: int = 64


KINDS = {
    "pair": Kind(2, False, 60_000, 20),
    "4-grey": Kind(4, False, 60_000, 30),
    "8-grey": Kind(8, False, 60_000, 40),
    "8-colour": Kind(8, True, 60_000, 60),
    "8-colour-2": Kind(8, True, 60_000, 60, power=2.0),
    "16": Kind(16, True, 60_000, 900, (32,)),
    "16-2": Kind(16, True, 60_000, 900, (32,), power=2.0),
    "32": Kind(32, True, 30_000, 1800, (32, 32, 32), batch=32),
}


def data(name: str, rows: int, part: str, seed: int = 0) -> Tensor:
    """Patches as the flow of a name sees them, ``(rows, channels, size, size)``; of ``pair`` two neighbours alone."""
    kind = KINDS[name]
    x = patches(kind.size, rows, part, seed=seed)
    x = x if kind.colour else x.mean(1, keepdim=True)
    return x[:, :, :1] if name == "pair" else x


def train(name: str, seconds: float | None = None) -> ifpyro.InflationaryFlow:
    """The flow of a name in ``KINDS``, from the cache or from training (``seconds`` other than its own: not kept)."""
    path = CACHE / f"images-{name}.safetensors"
    if path.exists() and seconds is None:
        return ifpyro.load(path)
    kind = KINDS[name]
    CACHE.mkdir(exist_ok=True)
    x = data(name, kind.rows, "train")
    flow = ifpyro.fit(
        x,
        validation=data(name, SEEN, "validation"),
        schedule=ifpyro.Schedule.details_first(power=kind.power, octaves=OCTAVES),
        network=unet(x.shape[1:], kind.channels, patch=kind.patch) if kind.channels else None,
        recipe=replace(RECIPE, batch=kind.batch) if kind.channels else None,
        max_seconds=kind.seconds if seconds is None else seconds,
        seed=0,
        checkpoint=path.with_suffix(".checkpoint") if seconds is None else None,
    )
    if seconds is None:
        flow.save(path)
    return flow


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=KINDS)
    torch.set_num_threads(1)
    for name in parser.parse_args().names:
        flow = train(name)
        training = flow.report["training"]
        shown = ("steps", "seconds", "samples_seen", "validation_loss", "validation_loss_gaussian")
        print(name, {key: training[key] for key in shown}, flow.report["numerics"])
