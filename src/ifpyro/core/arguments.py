"""Checks of user arguments: every message says what was expected and what came."""

from collections.abc import Sequence
from numbers import Integral, Real


def check_count(name: str, value: object, minimum: int) -> int:
    """``value`` as an integer of at least ``minimum``.

    Raises:
        ValueError: if it is not an integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


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
