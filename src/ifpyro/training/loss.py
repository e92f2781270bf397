"""The loss of a training, and the noised rows on which it is validated."""

import torch
from torch import Tensor

from ..flow.axes.schedule import Angles
from ..flow.networks.velocity import Velocity

# Noised rows in one evaluation of the validation loss: as many for each held-out row, within limits, and fewer where
# each has many entries. A table's loss is then cheap; a large sample's differs by the networks, not by the noise.
_NOISES = 16
_VALIDATION_ROWS = (4_096, 16_384)
_VALIDATION_ENTRIES = 2**21


def velocity_loss(network: Velocity, rows: Tensor, noise: Tensor, theta: Tensor, embedding: Tensor) -> Tensor:
    """Mean squared error of the velocity at noised rows; see :mod:`ifpyro.training`."""
    cos, sin = theta.cos(), theta.sin()
    return (network(cos * rows + sin * noise, embedding) - (sin * rows - cos * noise)).square().mean()


def noised_rows(rows: Tensor, angles: Angles, time_power: float, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Held-out rows with noise and times that stay the same, so that two losses differ by their networks alone.

    Noise has the ``dim`` leading columns of the rows.
    """
    generator = torch.Generator().manual_seed(0)
    fewest, most = _VALIDATION_ROWS
    count = max(1024, min(most, max(fewest, _NOISES * len(rows)), _VALIDATION_ENTRIES // dim))
    repeats = max(1, count // len(rows))
    index = torch.arange(len(rows)).repeat(repeats)[:count]
    strata = torch.randperm(len(index), generator=generator)
    t = ((strata + torch.rand(len(index), generator=generator, dtype=torch.double)) / len(index)) ** time_power
    noise = torch.randn(len(index), dim, generator=generator, dtype=torch.float32).to(rows.dtype)
    t = t.to(rows.device)
    return rows[index.to(rows.device)], noise.to(rows.device), t, angles(t).to(rows)
