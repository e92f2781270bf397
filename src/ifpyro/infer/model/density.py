"""The one interface between a Pyro model and the engines: a batched log-density.

A model with latent sites is seen by every engine as a function of one unconstrained vector ``q`` per draw,

    log p(q, data) = log_prior(q) + log_likelihood(q),        q in R^dim,

evaluated for a whole batch of draws at once. Both terms are differentiable in ``q`` by autograd and each row depends
on its own ``q`` alone. The prior term contains the log-Jacobian of the unconstraining transforms, so that it is a
density in ``q``; tempering at inverse temperature ``beta`` is ``log_prior + beta * log_likelihood``.
"""

from typing import Protocol

import torch
from torch import Tensor

from ...core.precision import full_precision


class BatchedDensity(Protocol):
    """What an engine needs of a model, and all it knows of it."""

    dim: int
    """Length of the unconstrained vector ``q``."""

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``(log_prior, log_likelihood)``, each of shape ``(n,)``, for ``q`` of shape ``(n, dim)``."""
        ...

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws from the prior of ``q``, shape ``(num, dim)``."""
        ...

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """Every named site in the user's space for ``q`` of shape ``(n, dim)``: name -> ``(n, *shape)``."""
        ...

    gaussian_prior: bool
    """Whether the prior of ``q`` is exactly ``N(0, I)`` (what elliptical slice sampling needs)."""


@full_precision()
def log_density_and_grad(density: BatchedDensity, q: Tensor, beta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prior, log-likelihood and the gradient of ``log_prior + beta * log_likelihood``.

    Args:
        density: the batched model.
        q: unconstrained draws, ``(n, dim)``.
        beta: inverse temperature.

    Returns:
        ``(log_prior, log_likelihood, gradient)`` of shapes ``(n,)``, ``(n,)``, ``(n, dim)``, all detached.
    """
    with torch.enable_grad():
        q = q.detach().requires_grad_(True)
        log_prior, log_likelihood = density(q)
        (gradient,) = torch.autograd.grad((log_prior + beta * log_likelihood).sum(), q)
    return log_prior.detach(), log_likelihood.detach(), gradient


def new_generator(density: BatchedDensity, seed: int) -> torch.Generator:
    """A generator on the device on which the density draws."""
    return torch.Generator(device=getattr(density, "device", "cpu")).manual_seed(seed)
