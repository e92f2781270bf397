"""The types of what :func:`ifpyro.fit` takes besides samples and conditions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from ..core.pool import Pool
from ..flow.axes.basis import Basis
from ..flow.axes.schedule import Schedule
from ..flow.networks.velocity import Velocity
from .recipe import Recipe


class FitOptions(TypedDict, total=False):
    """Keyword arguments of :func:`ifpyro.fit`, which describes them."""

    labels: bool | Sequence[int] | None
    sets: bool
    condition_network: nn.Module | None
    schedule: Schedule | None
    network: Velocity | dict[str, Any] | None
    validation: Any
    max_steps: int | None
    max_seconds: float | None
    support: Any
    seed: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    progress: bool
    own_units: bool | None
    recipe: Recipe | None
    tolerance: float
    checkpoint: str | Path | None
    pool: Pool | None
    basis: Basis | str
