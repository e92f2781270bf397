r"""The inverse of the discrete map, not only of the equation that it approximates, step by step.

A step ``Psi`` of the same method the other way almost undoes a step ``Phi``. With ``y = Psi(r)``, the iteration

.. math:: r \leftarrow r + (x - \Phi(\Psi(r)))

towards ``Phi(y) = x`` contracts with ``|I - Phi' Psi'|``, the local error of the method, however strongly the flow
itself stretches or squeezes. Where the local error is large it does not contract: for some points in a thousand,
between separated parts of the data, where the flow tears open a gap. These are solved by Newton's method with the
exact Jacobian of ``Phi``, damped so that the residual falls in every step.

Which rows these are is decided row by row, and the number of iterations is fixed for the others, so that a row's result
cannot depend on its batch mates.
"""

import torch
from torch import Tensor

from ..networks.velocity import Velocity
from .steps import Step, take, take_with_jacobian

_MOST_STEPS = 20
_DAMPINGS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)


def invert(
    velocity: Velocity, step: Step, guess: Step, target: Tensor, iterations: int, newton: bool = False
) -> Tensor:
    """The ``y`` with ``Phi(y) = target``.

    Args:
        velocity: the flow's velocity.
        step: ``Phi``.
        guess: ``Psi``, the step of the same method over the same stretch the other way.
        target: ``(n, D)``.
        iterations: number of fixed-point iterations; none leaves the mere guess.
        newton: solve the rows that are not closed then, to about 1e-5 in single and 1e-11 in double precision, by
            Newton's method: ``D`` products of the Jacobian for each of them.
    """
    root = target
    y = take(velocity, guess, root)
    for _ in range(iterations):
        root = root + (target - take(velocity, step, y))
        y = take(velocity, guess, root)
    return _close(velocity, step, y, target) if newton and iterations else y


def _close(velocity: Velocity, step: Step, y: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        rows = _which(_size(target - take(velocity, step, y)) > _tolerance(y))
        if not len(rows):
            return y
        found, closed = _newton(velocity.of_rows(rows), step, y[rows], target[rows])
    rows, found = rows[closed], found[closed]
    if not len(rows):  # networks may refuse an empty batch
        return y
    # The last step is taken with gradients. Started from the solution, it has those of the inverse function.
    value, jacobian = take_with_jacobian(velocity.of_rows(rows), step, found)
    found = found + torch.linalg.solve(jacobian, target[rows] - value)
    return y.index_put((rows,), found)


def _newton(velocity: Velocity, step: Step, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rows after damped Newton steps, and which of them meet the tolerance."""
    value, jacobian = take_with_jacobian(velocity, step, y)
    size = _size(target - value)
    for _ in range(_MOST_STEPS):
        waiting = size > _tolerance(y)
        if not bool(waiting.any()):
            break
        direction = torch.linalg.solve_ex(jacobian, target - value)[0]
        before, origin = size, y
        for damping in _DAMPINGS:
            candidate = origin + damping * direction
            its_value, its_jacobian = take_with_jacobian(velocity, step, candidate)
            its_size = _size(target - its_value)
            better = waiting & (its_size < before)
            y = torch.where(better.unsqueeze(-1), candidate, y)
            value = torch.where(better.unsqueeze(-1), its_value, value)
            jacobian = torch.where(better[:, None, None], its_jacobian, jacobian)
            size = torch.where(better, its_size, size)
            waiting = waiting & ~better
            if not bool(waiting.any()):
                break
        if not bool((size < before).any()):
            break
    return y, size <= _tolerance(y)


def _size(residual: Tensor) -> Tensor:
    return residual.square().mean(-1).sqrt()


def _tolerance(y: Tensor) -> float:
    return float(torch.finfo(y.dtype).eps ** 0.7)


def _which(mask: Tensor) -> Tensor:
    """Indices of the rows in question; none inside ``torch.func.vmap``, where values cannot decide anything."""
    try:
        return mask.nonzero().squeeze(-1)
    except RuntimeError:
        return torch.empty(0, dtype=torch.long, device=mask.device)
