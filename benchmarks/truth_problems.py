"""Inverse problems under a Gaussian mixture prior, whose posterior is a Gaussian mixture again."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

DIM, COMPONENTS, NOISE = 16, 6, 0.1


class Mixture(NamedTuple):
    """A Gaussian mixture: weights ``(K,)``, means ``(K, D)``, covariances ``(K, D, D)``."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def shares(self, x: Tensor) -> Tensor:
        """Mean posterior probability of every component over draws ``x``."""
        parts = MultivariateNormal(self.means, self.covariances).log_prob(x[:, None]) + self.weights.log()
        return torch.softmax(parts, -1).mean(0)

    def observe(self, matrix: Tensor, y: Tensor) -> tuple["Mixture", Tensor]:
        """The posterior given ``y = matrix x + NOISE n``, and every component's log-evidence."""
        cross = self.covariances @ matrix.T
        seen = matrix @ cross + NOISE**2 * torch.eye(len(y)).to(y)
        gain = torch.linalg.solve(seen, cross.mT).mT
        residual = y - self.means @ matrix.T
        evidence = MultivariateNormal(torch.zeros_like(residual), seen).log_prob(residual)
        weights = torch.softmax(self.weights.log() + evidence, 0)
        covariances = self.covariances - gain @ cross.mT
        covariances = 0.5 * (covariances + covariances.mT)
        return Mixture(weights, self.means + (gain @ residual[..., None])[..., 0], covariances), evidence


class Problem(NamedTuple):
    """An observation and what is known about it."""

    y: Tensor
    forward: Callable[[Tensor], Tensor]
    matrix: Tensor
    signs_lost: bool
    posterior: Mixture


def sample(mixture: Mixture, generator: torch.Generator, num: int) -> Tensor:
    """``num`` draws, ``(num, DIM)``."""
    k = torch.multinomial(mixture.weights, num, True, generator=generator)
    noise = torch.randn(num, DIM, 1, generator=generator, dtype=torch.double).to(mixture.means)
    return mixture.means[k] + (torch.linalg.cholesky(mixture.covariances)[k] @ noise)[..., 0]


def make_prior() -> Mixture:
    """Separated components of unlike shapes, at about unit variance."""
    generator = torch.Generator().manual_seed(0)
    means = 0.9 * torch.randn(COMPONENTS, DIM, generator=generator, dtype=torch.double)
    factors = 0.15 * torch.randn(COMPONENTS, DIM, 6, generator=generator, dtype=torch.double)
    covariances = factors @ factors.mT + 0.02 * torch.eye(DIM).double()
    weights = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1], dtype=torch.double)
    return Mixture(weights, means, covariances)


def _tomography() -> Tensor:
    pixels = torch.arange(DIM).reshape(4, 4)
    rays = [*pixels, *pixels.T, pixels.diagonal(), pixels.flip(1).diagonal()]
    matrix = torch.zeros(len(rays), DIM, dtype=torch.double)
    for k, ray in enumerate(rays):
        matrix[k, ray] = 0.5
    return matrix


def _directions() -> Tensor:
    m = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return m / m.norm(dim=1, keepdim=True)


MATRICES: dict[str, Callable[[], Tensor]] = {
    "in-painting": lambda: torch.eye(DIM, dtype=torch.double)[::2],
    "tomography": _tomography,
    "phase": _directions,
}


def make_problem(prior: Mixture, name: str, seed: int) -> Problem:
    """A draw of the prior, observed."""
    matrix, signs_lost = MATRICES[name](), name == "phase"
    generator = torch.Generator().manual_seed(10 + seed)
    k = int(torch.multinomial(prior.weights, 1, generator=generator))
    x = prior.means[k] + torch.linalg.cholesky(prior.covariances[k]) @ torch.randn(DIM, generator=generator).double()
    y = matrix @ x + NOISE * torch.randn(len(matrix), generator=generator).double()
    if not signs_lost:
        return Problem(y, lambda v: v @ matrix.to(v).T, matrix, False, prior.observe(matrix, y)[0])
    y = y.abs()
    found = [prior.observe(matrix, y * torch.tensor(s).double()) for s in itertools.product((-1.0, 1.0), repeat=len(y))]
    weights = torch.softmax(torch.stack([e + prior.weights.log() for _, e in found]).flatten(), 0)
    keep = weights > 1e-6
    mixture = Mixture(
        weights[keep] / weights[keep].sum(),
        torch.cat([m.means for m, _ in found])[keep],
        torch.cat([m.covariances for m, _ in found])[keep],
    )
    return Problem(y, lambda v: (v @ matrix.to(v).T).abs(), matrix, True, mixture)
