r"""The leapfrog integrator of Hamilton's equations for a batch of chains.

One step of size ``eps`` in whitened coordinates (Neal 2011, section 5.2.3.3; see `ifpyro.infer.engines.metric` for
``S``):

    p <- p + eps/2 S^T g(q),        q <- q + eps S p,        p <- p + eps/2 S^T g(q).

Each line is a shear, so the map preserves volume and reverses exactly under ``p -> -p`` *whatever* the field
``g`` is. That is why a coarse gradient leaves the fine posterior invariant once the fine density decides on
acceptance.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .guided_density import Guide
from .metric import Metric


class Trajectory(NamedTuple):
    """The end of a leapfrog trajectory."""

    position: Tensor
    """``(n, dim)``"""
    momentum: Tensor
    """``(n, dim)``, in whitened coordinates."""
    guide: Guide
    """The guide at the end point: its gradient starts the next trajectory."""
    failed: Tensor
    """``(n,)``: the trajectory met a point where the guide's gradient is not finite; to be rejected."""


def leapfrog(
    evaluate: Callable[[Tensor], Guide],
    position: Tensor,
    momentum: Tensor,
    guide: Guide,
    step_size: float | Tensor,
    num_steps: int,
    metric: Metric,
) -> Trajectory:
    """Integrate ``num_steps`` leapfrog steps, one gradient each.

    Args:
        evaluate: the guide as a function of ``q``.
        position: start ``q``, ``(n, dim)``.
        momentum: start ``p`` in whitened coordinates, ``(n, dim)``.
        guide: the guide at ``position``.
        step_size: ``eps``, shared by all chains, or one for each, ``(n, 1)``.
        num_steps: number of steps, shared by all chains.
        metric: the map from whitened coordinates to ``q``.
    """
    start, first = position, guide
    failed = ~guide.gradient.isfinite().all(-1)
    for _ in range(num_steps):
        momentum = momentum + 0.5 * step_size * metric.pull(guide.gradient)
        # A chain that failed waits at its start: models may refuse to be evaluated at a point that is not
        # finite. Meeting a non-finite point is symmetric under reversal, so rejecting for it keeps detailed
        # balance.
        position = position + step_size * metric.push(momentum)
        failed = failed | ~position.isfinite().all(-1)
        position = torch.where(failed[:, None], start, position)
        guide = evaluate(position)
        failed = failed | ~guide.gradient.isfinite().all(-1)
        gradient = torch.where(failed[:, None], torch.zeros_like(guide.gradient), guide.gradient)
        guide = Guide(guide.value, gradient)
        momentum = momentum + 0.5 * step_size * metric.pull(guide.gradient)
    if num_steps == 0:
        guide = first
    return Trajectory(position, momentum, guide, failed)
