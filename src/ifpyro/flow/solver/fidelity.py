"""How finely every flow is solved, chosen from outside the model.

A flow carries two step counts for its decoder: *fine*, the map that defines the model, and *coarse*, a cheap
approximation of it for proposals. Samplers switch between the two without touching the model::

    with ifpyro.fidelity("coarse"):
        proposal = density(q)          # every flow inside runs its coarse map
    value = density(q)                 # the fine map again

Samplers that look for the cheapest guide themselves ask for a number of *evaluations* of the velocity; a flow spends
them by the Runge-Kutta method that makes most of so few (:func:`ifpyro.flow.solver.grid.cheap_grid`).

The choice lives in a context variable: it nests, it is restored on errors, and other threads do not see it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Evaluations:
    """A fidelity: so many evaluations of every flow's velocity."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} evaluation{'s' if self.count > 1 else ''}"


Level = Literal["fine", "coarse"] | int | Evaluations

_current: ContextVar[Level] = ContextVar("ifpyro_fidelity", default="fine")


@contextmanager
def fidelity(
    level: Literal["fine", "coarse"] | None = None, *, steps: int | None = None, evaluations: int | None = None
) -> Iterator[None]:
    """Solve every flow inside the ``with`` block at this fidelity.

    Args:
        level: ``"fine"`` (the map that defines the model) or ``"coarse"`` (the cheap map for proposals).
        steps: instead of a level, an explicit number of solver steps for every flow.
        evaluations: instead of either, a number of evaluations of every flow's velocity, spent as
            :func:`ifpyro.flow.solver.grid.cheap_grid` says.

    Raises:
        ValueError: if not exactly one of the three is given, or it is out of range.

    Example:
        >>> z = torch.randn(100, 2)
        >>> with ifpyro.fidelity("coarse"):
        ...     rough = flow.decode(z)
        ...
        >>> with ifpyro.fidelity(steps=64):
        ...     fine = flow.decode(z)
        ...
        >>> bool((rough - fine).abs().mean() > (flow.decode(z) - fine).abs().mean())
        True
    """
    if [level, steps, evaluations].count(None) != 2:
        raise ValueError("fidelity expects a level ('fine' or 'coarse'), steps=n or evaluations=n: exactly one of them")
    if level is not None and level not in ("fine", "coarse"):
        raise ValueError(f"fidelity expects 'fine' or 'coarse' (or steps=n, or evaluations=n), got {level!r}")
    for name, number in (("steps", steps), ("evaluations", evaluations)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"fidelity expects {name} to be a positive integer, got {number!r}")
    chosen = level or steps or Evaluations(evaluations)  # type: ignore[arg-type]
    token = _current.set(chosen)
    try:
        yield
    finally:
        _current.reset(token)


def at(level: Level) -> AbstractContextManager[None]:
    """:func:`fidelity` of what :func:`current_fidelity` returns."""
    if isinstance(level, Evaluations):
        return fidelity(evaluations=level.count)
    return fidelity(steps=level) if isinstance(level, int) else fidelity(level)


def current_fidelity() -> Level:
    """The fidelity in force: ``"fine"``, ``"coarse"``, a number of solver steps, or one of `Evaluations`."""
    return _current.get()
