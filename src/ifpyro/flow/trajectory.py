"""A flow in the paper's own coordinates: paths of data, and the dimension that inflation keeps or reduces.

The rescaling ``A(t) = cos theta_1(t)``, common to all axes, keeps the leading axis at its own scale: in a preserving
flow the whole covariance then stays constant; in a reducing flow the compressed axes shrink.
"""

import torch
from torch import Tensor

from .axes.schedule import Angles
from .solver.discrete_map import DiscreteMap
from .solver.grid import Grid
from .solver.steps import take


def rescaled_path(discrete: DiscreteMap, scale: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Times of the nodes ``(steps + 1,)`` and rescaled positions there, ``(steps + 1, n, D)``.

    Args:
        discrete: the discrete map.
        scale: standard deviations of its axes, ``(D,)``.
        v: standardised coordinates to start from, ``(n, D)``.
        grid: the nodes.
    """
    states = [v]
    for step in discrete.steps(v, grid).to_latent:
        states.append(take(discrete.velocity, step, states[-1]))
    times = grid.times()
    return times, torch.stack(states) * rescaled_sd(discrete.angles, scale, times).to(v).unsqueeze(1)


def participation_ratio(angles: Angles, scale: Tensor, t: Tensor) -> Tensor:
    """``(sum s^2)^2 / sum s^4`` of the rescaled covariance at times ``t``."""
    variance = rescaled_sd(angles, scale, t).square()
    return variance.sum(-1) ** 2 / variance.square().sum(-1)


def rescaled_sd(angles: Angles, scale: Tensor, t: Tensor) -> Tensor:
    """Standard deviations of the rescaled axes at times ``t`` of shape ``(m,)``: shape ``(m, D)``."""
    theta = angles(t)
    return scale.double().cpu() * theta[..., :1].cos() / theta.cos()
