"""The exact conditional velocity of a Gaussian mixture of which some columns are given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...data.arrays import as_real
from ..axes.basis import Basis
from ..axes.schedule import Angles, Schedule
from .mixture import checked_mixture, mixture_moments
from .shifts import MixtureShift
from .velocity import Velocity


class ConditionalMixtureVelocity(Velocity):
    r"""The exact velocity of a Gaussian mixture whose weights and means depend on a condition.

    With the symbols of :class:`~ifpyro.flow.networks.mixture.GaussianMixtureVelocity`; covariances are shared by all
    conditions, and so is what depends on time alone, which is the embedding's first part: ``U_k`` that whitens,
    ``(n Sigma_k c - c n) U_k^T``, ``n``, ``c``. Its second part, log-weights with the whitening's determinants and
    means, is what a condition shifts.

    Args:
        covariances: ``(K, D, D)``, in the coordinates ``x_0/s``.
        angles: Of the flow's schedule on its axes.
    """

    broadcasts = True
    covariances: Tensor

    def __init__(self, covariances: Tensor, angles: Angles) -> None:
        super().__init__()
        self.angles = angles
        self.register_buffer("covariances", covariances)

    def embed(self, t: Tensor) -> Tensor:
        """``(m, 2 K D^2 + 2 D + K + K D)``."""
        theta = self.angles(t).to(self.covariances.device)
        cos, sin = torch.cos(theta).unsqueeze(-2), torch.sin(theta).unsqueeze(-2)  # (m, 1, D)
        cov = self.covariances.double()
        num, dim = cov.shape[:2]
        seen = cov * cos.unsqueeze(-2)
        factor = torch.linalg.cholesky(cos.unsqueeze(-1) * seen + torch.diag_embed(sin**2))
        eye = torch.eye(dim, dtype=cov.dtype, device=cov.device)
        whiten = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        slope = (sin.unsqueeze(-1) * seen - torch.diag_embed(cos * sin)) @ whiten.mT
        log_det = whiten.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        parts = [whiten, slope, sin, cos, log_det, log_det.new_zeros(len(log_det), num * dim)]
        return torch.cat([part.flatten(1) for part in parts], -1).to(self.covariances.dtype)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Exact velocity of ``y`` of shape ``(..., D)``."""
        num, dim = self.covariances.shape[:2]
        square = num * dim * dim
        sizes = [square, square, dim, dim, num, num * dim]
        whiten, slope, sin, cos, log_weights, means = embedding.split(sizes, -1)
        means = means.unflatten(-1, (num, dim))
        whiten, slope = (part.unflatten(-1, (num, dim, dim)) for part in (whiten, slope))
        residual = y.unsqueeze(-2) - cos.unsqueeze(-2) * means
        white = (whiten @ residual.unsqueeze(-1)).squeeze(-1)  # (..., K, D)
        share = torch.softmax(log_weights - 0.5 * white.square().sum(-1), -1)
        parts = sin.unsqueeze(-2) * means + (slope @ white.unsqueeze(-1)).squeeze(-1)
        return (share.unsqueeze(-1) * parts).sum(-2)


def conditional_mixture_parts(
    weights: Tensor, means: Tensor, covariances: Tensor, given: Sequence[int], schedule: Schedule
) -> tuple[Basis, Tensor, ConditionalMixtureVelocity, MixtureShift]:
    """Axes, regression, exact velocity and its shift of a mixture of which some columns are given; see
    :meth:`ifpyro.ConditionalFlow.from_gaussian_mixture`."""
    w, m, cov = checked_mixture(weights, means, covariances)
    means = as_real(means, "means")
    columns, given = m.shape[1], list(given)
    if not given or len(set(given)) != len(given) or not all(0 <= j < columns for j in given) or len(given) == columns:
        raise ValueError(f"given expects some, and not all, of the columns 0 to {columns - 1}, got {given}")
    free = [j for j in range(columns) if j not in given]
    mean, total = mixture_moments(w, m, cov)
    regression = _gain(total, free, given)  # (D, p)
    intercept = mean[free] - regression @ mean[given]
    residual = total[free][:, free] - regression @ total[given][:, free]
    exact = Basis.from_moments(intercept, residual, m)
    unit = exact.rotate(torch.eye(len(free)).to(m)) / exact.scale
    gains = torch.stack([_gain(part, free, given) for part in cov])  # (K, D, p)
    inner = torch.stack(
        [part[free][:, free] - gain @ part[given][:, free] for part, gain in zip(cov, gains, strict=True)]
    )
    at_zero = m[:, free] - torch.einsum("kij,kj->ki", gains, m[:, given]) - intercept
    factor = torch.linalg.cholesky(cov[:, given][:, :, given])
    eye = torch.eye(len(given)).to(m).expand_as(factor)
    whiten = torch.linalg.solve_triangular(factor, eye, upper=False)
    angles = schedule.angles(exact.scale)
    velocity = ConditionalMixtureVelocity((unit.T @ inner @ unit).to(means), angles)
    log_weights, centres, whiten, offsets, slopes = (
        part.to(means) for part in (w.log(), m[:, given], whiten, at_zero @ unit, unit.T @ (gains - regression))
    )
    before = 2 * inner.numel() + 2 * len(free)
    shift = MixtureShift(log_weights, centres, whiten, offsets, slopes, before)
    return exact.to(means.dtype), regression.T.to(means), velocity, shift


def _gain(covariance: Tensor, free: list[int], given: list[int]) -> Tensor:
    """``S_xc S_cc^{-1}``."""
    return torch.linalg.solve(covariance[given][:, given], covariance[given][:, free]).T
