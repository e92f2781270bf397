"""The data sets and flows of the paper's benchmark: each flow is trained once, and kept in ``benchmarks/.cache``."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor
from torch.distributions import constraints

import ifpyro
from ifpyro import Schedule
from ifpyro.cli import demo
from ifpyro.data import datasets
from results import CACHE

TRAIN_SEED, TEST_SEED = 1, 2
ROWS, HELD_OUT = 200_000, 20_000
TOY_STEPS = 6_000  # of training
TOY_OPTIONS: dict[str, dict[str, Any]] = {
    "sine": {"max_steps": 20_000, "network": {"waves": 2}},  # four periods and two edges, mixed by the rotation
    **{name: {"max_steps": 3_000} for name in ("S-curve", "swirl", "S-curve, flat", "swirl, flat")},
}
QUICK_STEPS = 20
DIGITS = ("digits, pixels", "digits, logits")
TABLES: dict[str, Callable[[], np.ndarray]] = {
    # 13 patients have concavities of exactly zero; the logarithm is taken of at least 1e-3, below the smallest others
    "breast cancer": lambda: np.log(np.maximum(load_breast_cancer().data, 1e-3)),
    "wine": lambda: load_wine().data,
}


class Data(NamedTuple):
    """Rows to train on, those for early stopping (or a fraction), held-out rows, and further options of ``fit``."""

    train: Tensor
    validation: Tensor | float
    held_out: Tensor
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return self.train[0].numel()


class Key(NamedTuple):
    """Which flow: the data set, the schedule, and the seed of the split and of training."""

    data: str
    schedule: str
    seed: int = 0


@cache
def data(name: str, seed: int = 0) -> Data:
    """A toy set of the paper, digits, or a table.

    Digits are dequantised as in ``ifpyro.cli.demo``, four fifths to train on: the 53 pixels whose standard deviation
    exceeds 0.03 as they are, or all 64 as images whose flow works on logits. Tables are split 60/20/20.
    """
    if name in datasets.paper():
        toy = datasets.paper()[name]
        x, held_out = toy.sample(ROWS, seed=TRAIN_SEED), toy.sample(HELD_OUT, seed=TEST_SEED)
        return Data(x, 0.1, held_out, TOY_OPTIONS.get(name, {"max_steps": TOY_STEPS}))
    if name in TABLES:
        x = torch.as_tensor(TABLES[name](), dtype=torch.float32)
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
        return Data(*x.tensor_split([int(0.6 * len(x)), int(0.8 * len(x))]))
    train, held_out = demo.digits(seed)
    if name == "digits, logits":
        return Data(train, 0.1, held_out, {"support": constraints.unit_interval})
    train, held_out = train.flatten(1), held_out.flatten(1)
    live = train.std(0) > 0.03
    return Data(train[:, live], 0.1, held_out[:, live])


def schedule(name: str, dim: int) -> Schedule:
    """``preserving``, ``reducing`` (with ``gap = ...`` or ``keep = ...``) or ``details first, p = ...`` on ``dim``."""
    kind, _, number = name.partition(" = ")
    if kind == "preserving":
        return Schedule.preserving()
    if kind == "details first, p":
        return Schedule.details_first(float(number))
    if kind == "reducing, keep":
        return Schedule.reducing(int(number))
    return Schedule.reducing(kept(dim), float(number or 1))


def kept(dim: int) -> int:
    """Axes that ``reducing`` keeps: a line of the plane, a plane of space, 16 of the digits, a third of a table."""
    return dim - 1 if dim <= 3 else min(16, dim // 3)


def flow_of(key: Key, quick: bool) -> ifpyro.InflationaryFlow:
    """The flow, from the cache if it is there; in a quick run barely trained, and kept in memory only."""
    if quick:
        return _barely_trained(key)
    path = _path(key)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        start = time.process_time()
        flow = _fit(key, data(key.data, key.seed))
        flow.report["processor_seconds"] = round(time.process_time() - start, 1)
        flow.save(path)
    return ifpyro.load(path)


def is_cached(key: Key) -> bool:
    """Whether the flow has been trained."""
    return _path(key).exists()


def _path(key: Key) -> Path:
    return CACHE / f"paper-{'-'.join(str(part) for part in key)}.safetensors".replace(", ", "-").replace(" ", "")


@cache
def _barely_trained(key: Key) -> ifpyro.InflationaryFlow:
    rows = data(key.data, key.seed)
    return _fit(key, rows._replace(train=rows.train[:1_000], options={**rows.options, "max_steps": QUICK_STEPS}))


def _fit(key: Key, rows: Data) -> ifpyro.InflationaryFlow:
    options = {"schedule": schedule(key.schedule, rows.dim), "validation": rows.validation, "seed": key.seed}
    return ifpyro.fit(rows.train, **options, **rows.options, progress=False)
