"""Checks of user arguments: every message says what was expected and what came."""

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path

import torch


def check_count(name: str, value: object, minimum: int) -> int:
    """``value`` as an integer of at least ``minimum``.

    Raises:
        ValueError: if it is not an integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def is_integer(value: object, least: int = -(2**63), most: int = 2**63 - 1) -> bool:
    """Whether ``value`` is an integer, of any library and no boolean, from ``least`` to ``most``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite real number, of any library, and no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))


def check_integer(name: str, value: object, least: int, most: int, of: str = "") -> int:
    """``value`` as an integer from ``least`` to ``most``, which counts what ``of`` says.

    Raises:
        ValueError: if it is not.
    """
    if not is_integer(value, least, most):
        raise ValueError(f"{name} expects an integer from {least} to {most}{' ' * bool(of)}{of}, got {value!r}")
    return int(value)  # type: ignore[call-overload]


def check_number(
    name: str, value: object, least: float, below: float = math.inf, *, open_at_least: bool = False
) -> float:
    """``value`` as a finite number of at least ``least``, or above it where that end is open, and below ``below``.

    Raises:
        ValueError: if it is not.
    """
    inside = is_number(value) and least <= float(value) < below  # type: ignore[arg-type]
    if not inside or (open_at_least and value == least):
        upper = "" if math.isinf(below) else f" and < {below:g}"
        raise ValueError(f"{name} expects a number {'>' if open_at_least else '>='} {least:g}{upper}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_seed(value: object, name: str = "seed") -> int:
    """``value`` as a seed of every generator, torch's and NumPy's.

    Raises:
        ValueError: if it is not an integer from 0 to ``2**63 - 1``.
    """
    if not is_integer(value, 0):
        raise ValueError(f"{name} expects an integer from 0 to 2**63 - 1, got {value!r}")
    return int(value)  # type: ignore[call-overload]


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """``shape``, an integer or several, as a tuple of integers of at least 0.

    Raises:
        ValueError: if it is not.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
    for size in sizes:
        if not is_integer(size, 0):
            raise ValueError(f"{name} expects a shape of integers of at least 0, got {shape!r}")
    return tuple(int(size) for size in sizes)


def check_batch_size(value: object) -> int | None:
    """``value`` as most rows at once, or None for all.

    Raises:
        ValueError: if it is neither None nor a positive integer.
    """
    if value is None:
        return None
    if not is_integer(value, 1):
        raise ValueError(f"batch_size expects a positive integer, or None for all rows at once, got {value!r}")
    return int(value)  # type: ignore[call-overload]


def check_device(device: object, name: str = "device", *, meta: bool = False) -> torch.device | None:
    """``device`` as a device that is here and can hold data (or, if allowed, shapes alone), or None as it is.

    Raises:
        ValueError: if torch knows no such device, or it is not here.
    """
    if device is None:
        return None
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
        if found is not None and (meta or found.type != "meta"):
            torch.empty(1, device=found)
            return found
        reason = "it holds no data" if found is not None else "it is neither a name nor a torch.device"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
    raise ValueError(f"{name} expects a device that is here, such as 'cpu', got {str(device)!r}: {reason}")


def check_path(name: str, path: object) -> Path:
    """``path`` as a path.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} expects a path, got {type(path).__name__}")
    return Path(path)


def check_type(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Raises ``TypeError`` unless ``value`` is of a kind, which ``what`` describes."""
    if not isinstance(value, kind):
        got = f"the class {value.__name__}, no instance of it" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} expects {what}, got {got}")


def check_fraction(name: str, value: object) -> float:
    """``value`` as a number strictly between 0 and 1.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) < 1.0:
        raise ValueError(f"{name} must be a number strictly between 0 and 1, got {value!r}")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """``value`` as a positive finite number.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_level(level: object) -> None:
    """Raises ``ValueError`` unless ``level`` is a fidelity, a positive number of solver steps, or ``None``."""
    named = level is None or level == "fine" or level == "coarse"
    if not named and (isinstance(level, bool) or not isinstance(level, int) or level < 1):
        raise ValueError(f"level must be 'fine', 'coarse', a positive number of solver steps, or None; got {level!r}")
