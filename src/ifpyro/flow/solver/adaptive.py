"""The differential equation itself, solved to a tolerance: the oracle for fixed grids.

The step size is shared by the batch, so rows influence each other below the tolerance: for checking, or for carrying
points to a stated tolerance, not for samplers.
"""

import torch
from torch import Tensor

from ..axes.schedule import Angles
from ..networks.velocity import Velocity
from .steps import velocity_and_jacobian


def solve_adaptive(
    velocity: Velocity,
    angles: Angles,
    y: Tensor,
    *,
    to_data: bool,
    tolerance: float,
    log_det: bool = False,
) -> tuple[Tensor, Tensor]:
    """Solve with torchdiffeq's adaptive steps (Dormand & Prince).

    Args:
        velocity: The network.
        angles: The angles of its axes.
        y: States to start from, ``(n, D)``.
        to_data: Whether to go from latents to data, or the other way.
        tolerance: Relative and absolute error of a step.
        log_det: Whether the divergence is integrated too, in ``D`` products of the Jacobian an evaluation.

    Returns:
        The end state ``(n, D)`` and the integrated log-determinant ``(n,)`` (zeros unless ``log_det``).
    """
    from torchdiffeq import odeint  # only for those who ask for a tolerance

    def embed(t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.reshape(1)
        return velocity.embed(t)[0], -angles.speed(t)[0].to(y)

    def plain(t: Tensor, state: Tensor) -> Tensor:
        embedding, rate = embed(t)
        return rate * velocity(state, embedding)

    def augmented(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        embedding, rate = embed(t)
        value, jacobian = velocity_and_jacobian(velocity, state[0], embedding)
        return rate * value, (rate * jacobian.diagonal(dim1=-2, dim2=-1)).sum(-1)

    ends = (1.0, 0.0) if to_data else (0.0, 1.0)
    span = torch.tensor(ends, dtype=torch.double, device=y.device)
    options = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
    zeros = y.new_zeros(y.shape[:-1])
    if log_det:
        states, logs = odeint(augmented, (y, zeros), span, **options)
        return states[-1], logs[-1]
    return odeint(plain, y, span, **options)[-1], zeros
