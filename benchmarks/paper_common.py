"""What the sections of the paper's benchmark share: trained flows kept on disk, and a two-sample distance."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ifpyro

CACHE = Path(__file__).parent / ".cache"


def show(lines: list[str], line: str) -> None:
    """Print a line and keep it for the results file."""
    print(line, flush=True)
    lines.append(line)


def cached(name: str, train: Callable[[], ifpyro.InflationaryFlow], quick: bool) -> ifpyro.InflationaryFlow:
    """The flow of that name in ``benchmarks/.cache``, trained if it is not there."""
    path = CACHE / f"paper-{name}{'-quick' if quick else ''}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        train().save(path)
    return ifpyro.load(path)


def log_prob(flow: ifpyro.InflationaryFlow, x: Tensor) -> Tensor:
    """Log-density in chunks, without gradients."""
    with torch.no_grad():
        return torch.cat([flow.log_prob(rows) for rows in x.split(4000)])


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""Unbiased estimate of ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (Szekely & Rizzo 2013); zero for equal laws only."""
    n, m = len(x), len(y)
    within = _total(x, x) / (n * (n - 1)) + _total(y, y) / (m * (m - 1))
    return 2 * _total(x, y) / (n * m) - within


def _total(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return float(sum(torch.cdist(rows, b).sum() for rows in a.split(500)))
