"""The exact velocity of a Gaussian mixture, and the axes of its flow."""

import torch
from torch import Tensor

from ...data.arrays import as_real
from ..axes.basis import Basis
from ..axes.schedule import Angles, Schedule
from .velocity import Velocity


class GaussianMixtureVelocity(Velocity):
    r"""The exact velocity when the data are a mixture of Gaussians, in the coordinates ``x_0/s`` of the flow.

    With ``c = diag(cos theta)``, ``n = diag(sin theta)``, component ``k`` of ``y`` has covariance
    ``S_k = c Sigma_k c + n^2``, and with the posterior weights ``r_k(y)``

    .. math:: F = \sum_k r_k(y) \left[ n m_k + (n \Sigma_k c - c n) S_k^{-1} (y - c m_k) \right].

    Args:
        weights: ``(K,)``, positive, summing to one.
        means: ``(K, D)``.
        covariances: ``(K, D, D)``.
        angles: the angles of the flow's schedule on its axes.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, angles: Angles) -> None:
        super().__init__()
        self.angles = angles
        self.register_buffer("weights", weights)
        self.register_buffer("means", means)
        self.register_buffer("covariances", covariances)

    def embed(self, t: Tensor) -> Tensor:
        """All that depends on time alone, one after the other: ``U_k`` that whitens, ``U_k S_k U_k^T = I``;
        ``(n Sigma_k c - c n) U_k^T``, transposed; ``n m_k``; ``c m_k``; and log-weights: ``(m, K (2 D^2 + 2 D + 1))``.
        """
        theta = self.angles(t).to(self.means.device)
        cos, sin = torch.cos(theta).unsqueeze(-2), torch.sin(theta).unsqueeze(-2)  # (m, 1, D)
        means, cov = self.means.double(), self.covariances.double()
        seen = cov * cos.unsqueeze(-2)
        factor = torch.linalg.cholesky(cos.unsqueeze(-1) * seen + torch.diag_embed(sin**2))
        eye = torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
        whiten = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)  # U, (m, K, D, D)
        slope = (sin.unsqueeze(-1) * seen - torch.diag_embed(cos * sin)) @ whiten.mT
        log_weights = self.weights.double().log() + whiten.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        parts = [whiten, slope.mT, sin * means, cos * means, log_weights]
        return torch.cat([part.flatten(1) for part in parts], -1).to(self.means.dtype)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Exact velocity ``F`` of shape ``(n, D)``."""
        num, dim = self.means.shape
        square = num * dim * dim
        whiten, back, centre, log_weights = embedding.split([square, square + num * dim, num * dim, num], -1)
        residual = y.unsqueeze(-2) - centre.unflatten(-1, (num, dim))  # (n, K, D)
        rule = "kij,nkj->nki" if embedding.ndim == 1 else "nkij,nkj->nki"
        white = torch.einsum(rule, whiten.unflatten(-1, (num, dim, dim)), residual)
        share = torch.softmax(log_weights - 0.5 * white.square().sum(-1), -1)
        weighed = torch.cat([(share.unsqueeze(-1) * white).flatten(-2), share], -1)  # (n, K D + K)
        back = back.unflatten(-1, (num * dim + num, dim))
        return weighed @ back if embedding.ndim == 1 else (weighed.unsqueeze(-2) @ back).squeeze(-2)


def mixture_parts(
    weights: Tensor, means: Tensor, covariances: Tensor, schedule: Schedule
) -> tuple[Basis, GaussianMixtureVelocity]:
    """Axes and exact velocity of a mixture; see :meth:`ifpyro.InflationaryFlow.from_gaussian_mixture`."""
    w, m, cov = checked_mixture(weights, means, covariances)
    means = as_real(means, "means")
    mean, covariance = mixture_moments(w, m, cov)
    exact = Basis.from_moments(mean, covariance, m)
    unit = exact.rotate(torch.eye(len(mean)).to(m)) / exact.scale
    velocity = GaussianMixtureVelocity(
        w.to(means), exact.to_standard(m).to(means), (unit.T @ cov @ unit).to(means), schedule.angles(exact.scale)
    )
    return exact.to(means.dtype), velocity


def checked_mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised weights, means and covariances in double precision.

    Raises:
        ValueError: if they are none of a mixture.
    """
    means = as_real(means, "means")
    weights, covariances = (
        as_real(x, name, means.dtype) for x, name in ((weights, "weights"), (covariances, "covariances"))
    )
    w, m, cov = weights.double(), means.double(), covariances.double()
    if m.ndim != 2 or cov.shape != (*m.shape, m.shape[-1]) or w.shape != m.shape[:1]:
        raise ValueError(
            "a mixture expects weights (K,), means (K, D) and covariances (K, D, D), got "
            f"{tuple(w.shape)}, {tuple(m.shape)}, {tuple(cov.shape)}"
        )
    _check_mixture(w, m, cov)
    return w / w.sum(), m, cov


def mixture_moments(w: Tensor, m: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a mixture."""
    mean = w @ m
    centred = m - mean
    return mean, torch.einsum("k,kij->ij", w, cov + centred.unsqueeze(-1) * centred.unsqueeze(-2))


def _check_mixture(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    if not bool(((weights > 0) & weights.isfinite()).all()):
        raise ValueError(f"a mixture expects positive weights, got {weights.tolist()}; leave empty components out")
    if not bool(means.isfinite().all()):
        raise ValueError("a mixture expects finite means, got NaN or infinity")
    size = covariances.diagonal(dim1=1, dim2=2).abs().amax(1)[:, None, None]
    symmetric = ((covariances - covariances.mT).abs() <= 1e-5 * size).flatten(1).all(1)
    # A pivot that is lost in the rounding of its row is none.
    factors, failed = torch.linalg.cholesky_ex(covariances)
    pivots = factors.diagonal(dim1=1, dim2=2).square() / covariances.diagonal(dim1=1, dim2=2)
    positive = (failed == 0) & (pivots > 1e-12).all(1)
    bad = torch.nonzero(~(symmetric & positive)).flatten().tolist()
    if bad:
        raise ValueError(
            f"a mixture expects covariances that are symmetric and positive definite, but those of components {bad} "
            "are not; add a little variance to their diagonals"
        )
