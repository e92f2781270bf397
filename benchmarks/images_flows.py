"""The flows of image patches that ``benchmarks/images.py`` measures; each is trained once, and resumes where it was.

    python benchmarks/images_flows.py 16-unet [--seconds 1200]

writes ``benchmarks/.cache/images-16-unet.safetensors``; an interrupted run leaves a checkpoint beside it.
"""

import argparse

import ifpyro
from ifpyro.images import unet
from ifpyro.training.recipe import Recipe
from ifpyro.velocity import MLP, Velocity
from images_data import patches
from results import CACHE

SCHEDULE = ifpyro.Schedule.details_first(octaves=0.5)
ROWS = {16: 60_000, 32: 30_000}
SEEN = 2000  # held-out patches that decide when to stop; others are measured on


def network(name: str, size: int) -> Velocity:
    """The network of a name."""
    if name == "mlp":
        return MLP(3 * size**2, width=512, blocks=2)
    return unet((3, size, size), (32, 64) if size == 16 else (32, 64, 64), patch=2 if size == 16 else 4)


def train(name: str, seconds: float = 1200.0) -> ifpyro.InflationaryFlow:
    """The flow of a name such as ``16-unet``, from the cache or from training."""
    path = CACHE / f"images-{name}.safetensors"
    if path.exists():
        return ifpyro.load(path)
    size, kind = int(name.split("-")[0]), name.split("-")[1]
    CACHE.mkdir(exist_ok=True)
    # Validation is by place, not by photograph: held-out photographs stay unseen altogether.
    x = patches(size, ROWS[size], held_out=False)
    recipe = Recipe(max_steps=100_000, batch=64, shared=1, rate=1e-3, patience=100_000, check_every=500)
    flow = ifpyro.fit(
        x[SEEN:],
        validation=x[:SEEN],
        schedule=SCHEDULE,
        network=network(kind, size),
        recipe=recipe,
        max_seconds=seconds,
        seed=0,
        checkpoint=path.with_suffix(".checkpoint"),
    )
    flow.save(path)
    return flow


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--seconds", type=float, default=1200.0)
    arguments = parser.parse_args()
    flow = train(arguments.name, arguments.seconds)
    training = flow.report["training"]
    print({k: training[k] for k in ("steps", "seconds", "samples_seen", "validation_loss", "validation_loss_gaussian")})
    print(flow.report["numerics"])
