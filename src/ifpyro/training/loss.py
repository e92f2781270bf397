"""The loss of a training, and the noised rows on which it is validated."""

import torch
from torch import Tensor

from ..schedule import Angles
from ..velocity import Velocity

_VALIDATION_ROWS = 4_096  # noised rows in one evaluation of the validation loss,
_VALIDATION_ENTRIES = 2**21  # fewer where each has many entries


def velocity_loss(network: Velocity, rows: Tensor, noise: Tensor, theta: Tensor, embedding: Tensor) -> Tensor:
    """Mean squared error of the velocity at noised rows; see :mod:`ifpyro.training`."""
    cos, sin = theta.cos(), theta.sin()
    return (network(cos * rows + sin * noise, embedding) - (sin * rows - cos * noise)).square().mean()


def noised_rows(rows: Tensor, angles: Angles, time_power: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Held-out rows with noise and times that stay the same, so that two losses differ by their networks alone."""
    generator = torch.Generator().manual_seed(0)
    count = max(1024, min(_VALIDATION_ROWS, _VALIDATION_ENTRIES // rows.shape[1]))
    repeats = max(1, count // len(rows))
    index = torch.arange(len(rows)).repeat(repeats)[:count]
    strata = torch.randperm(len(index), generator=generator)
    t = ((strata + torch.rand(len(index), generator=generator, dtype=torch.double)) / len(index)) ** time_power
    noise = torch.randn(len(index), rows.shape[1], generator=generator, dtype=rows.dtype)
    t = t.to(rows.device)
    return rows[index.to(rows.device)], noise.to(rows.device), t, angles(t).to(rows)
