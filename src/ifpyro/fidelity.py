"""How finely every flow is solved, chosen from outside the model.

A flow carries two step counts for its decoder: *fine*, the map that defines the model, and *coarse*, a cheap
approximation of it for proposals. Samplers switch between the two without touching the model::

    with ifpyro.fidelity("coarse"):
        proposal = density(q)          # every flow inside runs its coarse map
    value = density(q)                 # the fine map again

The choice lives in a context variable: it nests, it is restored on errors, and other threads do not see it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Level = Literal["fine", "coarse"] | int

_current: ContextVar[Level] = ContextVar("ifpyro_fidelity", default="fine")


@contextmanager
def fidelity(level: Literal["fine", "coarse"] | None = None, *, steps: int | None = None) -> Iterator[None]:
    """Solve every flow inside the ``with`` block at this fidelity.

    Args:
        level: ``"fine"`` (the map that defines the model) or ``"coarse"`` (the cheap map for proposals).
        steps: instead of a level, an explicit number of solver steps for every flow.

    Raises:
        ValueError: if not exactly one of ``level`` and ``steps`` is given, or either is out of range.
    """
    if (level is None) == (steps is None):
        raise ValueError("fidelity expects either a level ('fine' or 'coarse') or steps=n, not both or neither")
    if level is not None and level not in ("fine", "coarse"):
        raise ValueError(f"fidelity expects 'fine' or 'coarse' (or steps=n), got {level!r}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"fidelity expects steps to be a positive integer, got {steps!r}")
    token = _current.set(steps if steps is not None else level)  # type: ignore[arg-type]
    try:
        yield
    finally:
        _current.reset(token)


def current_fidelity() -> Level:
    """The fidelity in force: ``"fine"``, ``"coarse"`` or a number of solver steps."""
    return _current.get()
