"""What the sections of the paper's benchmark share: estimates with their errors, and a two-sample distance."""

import math

import torch
from torch import Tensor

import ifpyro

NUMBERS_OF_LATENTS = (1, 2, 4, 8, 16, 32)


def log_prob(flow: ifpyro.InflationaryFlow, x: Tensor) -> Tensor:
    """Log-density in chunks, without gradients."""
    with torch.no_grad():
        return torch.cat([flow.log_prob(rows) for rows in x.split(4000)])


def mean_and_error(values: Tensor, digits: int = 2, sign: str = "+") -> str:
    """Mean ± standard error over rows."""
    error = float(values.std()) / math.sqrt(len(values))
    return f"{float(values.mean()):{sign}.{digits}f} ± {error:.{digits}f}"


def ratio_and_error(numerator: Tensor, denominator: Tensor) -> str:
    """Ratio of two sums over the same rows ± its standard error."""
    ratio = numerator.sum() / denominator.sum()
    error = (numerator - ratio * denominator).std() / (denominator.mean() * math.sqrt(len(numerator)))
    return f"{float(ratio):.2f} ± {float(error):.2f}"


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""Unbiased estimate of ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (Szekely & Rizzo 2013); zero for equal laws only."""
    n, m = len(x), len(y)
    within = _total(x, x) / (n * (n - 1)) + _total(y, y) / (m * (m - 1))
    return 2 * _total(x, y) / (n * m) - within


def _total(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return float(sum(torch.cdist(rows, b).sum() for rows in a.split(500)))
