"""A flow in the paper's own coordinates: paths of data, and the dimension that inflation keeps or reduces.

The rescaling ``A(t) = cos theta_1(t)``, common to all axes, keeps the leading axis at its own scale: in a preserving
flow the whole covariance then stays constant; in a reducing flow the compressed axes shrink.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .solver.grid import Grid
from .solver.steps import take

if TYPE_CHECKING:
    from .flow import InflationaryFlow


def trajectory(flow: "InflationaryFlow", x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Times of the nodes ``(steps + 1,)`` and positions of data ``(n, *event)`` there, ``(steps + 1, n, D)``."""
    states = [flow.standardise(x)[0]]
    for step in flow.solver(states[0], grid).to_latent:
        states.append(take(flow.velocity, step, states[-1]))
    times = grid.times()
    return times, torch.stack(states) * rescaled_sd(flow, times).to(states[0]).unsqueeze(1)


def participation_ratio(flow: "InflationaryFlow", t: Tensor) -> Tensor:
    """``(sum s^2)^2 / sum s^4`` of the rescaled covariance at times ``t``."""
    variance = rescaled_sd(flow, t).square()
    return variance.sum(-1) ** 2 / variance.square().sum(-1)


def rescaled_sd(flow: "InflationaryFlow", t: Tensor) -> Tensor:
    """Standard deviations of the rescaled axes at times ``t`` of shape ``(m,)``: shape ``(m, D)``."""
    theta = flow.angles(t)
    return flow.basis.scale.double().cpu() * theta[..., :1].cos() / theta.cos()
