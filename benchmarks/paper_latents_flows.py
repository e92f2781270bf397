"""The data and flows of ``paper_latents.py``: digits and two tables, under every schedule."""

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributions import constraints

import density
import ifpyro
from ifpyro import Schedule, demo
from paper_common import cached

KEEP = 16
SCHEDULES: dict[str, Schedule] = {
    "preserving": Schedule.preserving(),
    "reducing": Schedule.reducing(KEEP, 1.0),
    **{f"details first, p = {p:g}": Schedule.details_first(p) for p in (0.5, 1.0, 1.5, 2.0, 3.0)},
}


class Data(NamedTuple):
    """Rows to train on, those for early stopping (or a fraction), held-out rows, and the support."""

    train: Tensor
    validation: Tensor | float
    held_out: Tensor
    support: Any = None


@cache
def data(name: str, seed: int) -> Data:
    """Digits in pixels, in units of each pixel, as images in the unit interval, or a table of ``density.py``."""
    if name not in ("pixels", "standardised", "images"):
        return Data(*density.split(name, seed))
    train, held_out = demo.digits(seed)
    if name == "images":
        return Data(train, 0.1, held_out, constraints.unit_interval)
    train, held_out = train.flatten(1), held_out.flatten(1)
    live = train.std(0) > 0.03
    unit = train.std(0)[live] if name == "standardised" else 1.0
    return Data(train[:, live] / unit, 0.1, held_out[:, live] / unit)


def flow_of(name: str, schedule: Schedule, quick: bool, seed: int = 0) -> ifpyro.InflationaryFlow:
    """The trained flow, from the cache if it is there."""

    def train() -> ifpyro.InflationaryFlow:
        rows = data(name, seed)
        steps = 40 if quick else None
        options: dict[str, Any] = {"support": rows.support, "max_steps": steps, "seed": seed, "progress": False}
        return ifpyro.fit(rows.train, validation=rows.validation, schedule=schedule, **options)

    label = "-".join(f"{v:g}" if isinstance(v, float) else str(v) for v in schedule.to_dict().values())
    return cached(f"latents-{name}-{seed}-{label}", train, quick)
