"""What is known of a model before it is run many times: its latent sites and where they live in ``q``."""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Size, Tensor
from torch.distributions import Transform, constraints


@dataclass(frozen=True)
class LatentSite:
    """Where a latent site lives in ``q`` and how its part of ``q`` becomes its value.

    ``transform`` maps unconstrained to constrained values; None means that the support is not known in
    advance (its bounds are tensors, which may depend on other latents) and is looked up in every run.
    """

    name: str
    batch_shape: Size
    event_shape: Size
    unconstrained_event_shape: Size
    start: int
    dtype: torch.dtype
    transform: Transform | None
    is_real: bool

    @property
    def stop(self) -> int:
        """One past the site's last entry in ``q``."""
        return self.start + prod(self.batch_shape + self.unconstrained_event_shape)


@dataclass
class Layout:
    """What one look at the model found: its latent sites in order, and what to mind when running it."""

    latents: dict[str, LatentSite] = field(default_factory=dict)
    shapes: dict[str, Size] = field(default_factory=dict)  # every reported site, for a single draw
    depth: int = 0  # dimensions of log-probabilities and plates: the batch dimension lies left of these
    dim: int = 0
    guarded: set[str] = field(default_factory=set)  # observed sites whose support may depend on latents
    unmasked: set[str] = field(default_factory=set)  # latent sites whose masked-out entries matter to nothing else
    params: dict[str, Tensor] = field(default_factory=dict)  # pyro.param values, held fixed

    @property
    def dtype(self) -> torch.dtype:
        """Of ``q``: the widest among the latent sites."""
        return max((site.dtype for site in self.latents.values()), key=lambda dtype: torch.finfo(dtype).bits)


def split_mask(fn: Any) -> tuple[Any, Any]:
    """A distribution without its ``.mask(...)``, and that mask (None without one)."""
    mask: Any = None
    while isinstance(fn, MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return fn, mask


def scale_and_mask(log_prob: Tensor, scale: Any, mask: Any) -> Tensor:
    """``where(mask, scale * log_prob, 0)``, skipping what does nothing."""
    if mask is False:
        return torch.zeros_like(log_prob)
    if isinstance(scale, Tensor) or scale != 1:
        log_prob = log_prob * scale
    if mask is None or mask is True:
        return log_prob
    return torch.where(mask, log_prob, log_prob.new_zeros(()))


def support_tensors(constraint: Any) -> list[Tensor]:
    """The tensors (bounds) inside a constraint, through any nesting."""
    found: list[Tensor] = []
    for value in vars(constraint).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, constraints.Constraint):
            found += support_tensors(value)
        elif isinstance(value, (list, tuple)):
            found += [t for v in value if isinstance(v, constraints.Constraint) for t in support_tensors(v)]
    return found
