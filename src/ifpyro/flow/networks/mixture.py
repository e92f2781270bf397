"""What makes the exact flow of a Gaussian mixture."""

import torch
from torch import Tensor

from ..axes.basis import Basis
from ..axes.schedule import Schedule
from .velocity import GaussianMixtureVelocity


def mixture_parts(
    weights: Tensor, means: Tensor, covariances: Tensor, schedule: Schedule
) -> tuple[Basis, GaussianMixtureVelocity]:
    """Axes and exact velocity of a mixture; see :meth:`ifpyro.InflationaryFlow.from_gaussian_mixture`."""
    w, m, cov = weights.double(), means.double(), covariances.double()
    if m.ndim != 2 or cov.shape != (*m.shape, m.shape[-1]) or w.shape != m.shape[:1]:
        raise ValueError(
            "a mixture expects weights (K,), means (K, D) and covariances (K, D, D), got "
            f"{tuple(w.shape)}, {tuple(m.shape)}, {tuple(cov.shape)}"
        )
    w = w / w.sum()
    mean = w @ m
    centred = m - mean
    covariance = torch.einsum("k,kij->ij", w, cov + centred.unsqueeze(-1) * centred.unsqueeze(-2))
    exact = Basis.from_moments(mean, covariance, m)
    unit = exact.rotate(torch.eye(len(mean)).to(m)) / exact.scale
    velocity = GaussianMixtureVelocity(
        w.to(means), exact.to_standard(m).to(means), (unit.T @ cov @ unit).to(means), schedule.angles(exact.scale)
    )
    return exact.to(means.dtype), velocity
