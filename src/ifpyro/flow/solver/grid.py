"""Runge-Kutta methods as tableaux, and the fixed grids on which they run.

Tableaux: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I (1993), section II.1 and table 5.2.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: coefficients and the order it declares."""

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    @property
    def stages(self) -> int:
        """Velocity evaluations a step."""
        return len(self.b)


TABLEAUX = {
    "euler": Tableau(1, ((),), (1.0,), (0.0,)),
    "midpoint": Tableau(2, ((), (1 / 2,)), (0.0, 1.0), (0.0, 1 / 2)),
    "heun3": Tableau(3, ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), (0.0, 1 / 3, 2 / 3)),
    "rk4": Tableau(
        4, ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 1 / 2, 1 / 2, 1.0)
    ),
    "dopri5": Tableau(
        5,
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    ),
}


@dataclass(frozen=True)
class Grid:
    """A fixed grid: ``t_k = (k / steps)^power``, denser near the data end for ``power > 1``, or as ``knots`` say.

    Attributes:
        steps: number of steps.
        power: of the nodes, if there are no knots.
        method: name of a Runge-Kutta method.
        knots: times ``0 < ... < 1``, both included, with as many steps between any two neighbours; a number of
            steps that does not divide evenly falls between them linearly. So one set of knots, where steps are short
            because solving is hard, serves any number of steps (`ifpyro.flow.tuning.choose_grid` measures it).

    Raises:
        ValueError: on an unknown method, or numbers out of range.

    Example:
        >>> grid = ifpyro.Grid(steps=4, power=2.0)
        >>> grid.times(), grid.evaluations
        (tensor([0.000, 0.062, 0.250, 0.562, 1.000], dtype=torch.float64), 16)
    """

    steps: int = 16
    power: float = 1.5
    method: str = "rk4"
    knots: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.method not in TABLEAUX:
            raise ValueError(f"expected a method among {sorted(TABLEAUX)}, got {self.method!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"a grid expects steps to be a positive integer, got {self.steps!r}")
        if not 0 < self.power < 100:
            raise ValueError(f"a grid expects 100 > power > 0, got {self.power!r}")
        if self.knots and (self.knots[0], self.knots[-1]) != (0.0, 1.0):
            raise ValueError(f"a grid expects knots from 0 to 1, got {self.knots[0]!r} to {self.knots[-1]!r}")
        if not all(a < b for a, b in pairwise(self.knots)):
            raise ValueError("a grid expects knots that increase from each to the next")

    @property
    def evaluations(self) -> int:
        """Velocity evaluations in one solve."""
        return self.steps * TABLEAUX[self.method].stages

    def times(self) -> Tensor:
        """The ``steps + 1`` nodes, double precision."""
        share = torch.linspace(0, 1, self.steps + 1, dtype=torch.double)
        if not self.knots:
            return share**self.power
        knots = torch.tensor(self.knots, dtype=torch.double)
        place = share * (len(knots) - 1)
        left = place.long().clamp(max=len(knots) - 2)
        return torch.lerp(knots[left], knots[left + 1], place - left)


def cheap_grid(evaluations: int, grid: Grid) -> Grid:
    """What so few evaluations are best spent on: Euler steps, beyond 6 midpoint steps, beyond 18 those of rk4.

    Trained flows are nearly straight in angles, so that many low steps beat few high ones: how far a density seen
    through such a map agrees with the exact one is measured in ``benchmarks/guides.py``.

    Args:
        evaluations: of the velocity in one solve; a remainder that makes no step is not used.
        grid: whose nodes to take, in their density.

    Example:
        >>> from ifpyro.flow.solver.grid import cheap_grid
        >>> cheap_grid(4, ifpyro.Grid())
        Grid(steps=4, power=1.5, method='euler')
    """
    method = "euler" if evaluations <= 6 else "midpoint" if evaluations <= 18 else "rk4"
    return replace(grid, steps=evaluations // TABLEAUX[method].stages, method=method)
