"""Arrays in: numpy, torch, or anything numpy understands, with shapes said in words when they are wrong."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def to_array(value: Any, name: str) -> Array:
    """``value`` as a numpy array of floats.

    Raises:
        ValueError: if it holds anything that is not a number.
    """
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    array = array.astype(np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{name} contains {int(np.isnan(array).sum())} NaN among {array.size} numbers")
    return array


def truth_and_draws(truth: Any, draws: Any) -> tuple[Array, Array]:
    """True values ``(S, d)`` and posterior draws ``(S, L, d)``; ``(S,)`` and ``(S, L)`` count as ``d = 1``.

    Raises:
        ValueError: for other shapes, or NaN.
    """
    truth, draws = to_array(truth, "truth"), to_array(draws, "draws")
    if truth.ndim == 1 and draws.ndim == 2:
        truth, draws = truth[:, None], draws[:, :, None]
    if truth.ndim != 2 or draws.ndim != 3 or truth.shape != (len(draws), draws.shape[-1]) or 0 in draws.shape:
        raise ValueError(
            "expected truth of shape (data sets, coordinates) and draws of shape (data sets, draws, coordinates), "
            f"got {truth.shape} and {draws.shape}"
        )
    return truth, draws


def check_probability(name: str, value: Any) -> float:
    """``value`` as a number strictly between 0 and 1.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be strictly between 0 and 1, got {value!r}")
    return float(value)


def check_levels(levels: Any) -> Array:
    """Increasing probabilities, ``(K,)``.

    Raises:
        ValueError: if they are not.
    """
    array = np.atleast_1d(np.asarray(levels, dtype=np.float64))
    if array.ndim != 1 or not ((array > 0) & (array < 1)).all() or (np.diff(array) <= 0).any():
        raise ValueError(f"levels must be increasing and strictly between 0 and 1, got {levels!r}")
    return array
