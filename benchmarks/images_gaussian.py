"""The rival of the flows of image patches: the Gaussian with the mean and full covariance of the same patches."""

import math
from functools import cache

import torch
from torch import Tensor

from images_flows import KINDS, data


class Gaussian:
    """The Gaussian with the mean and covariance of patches ``(N, channels, size, size)``."""

    def __init__(self, x: Tensor) -> None:
        rows = x.flatten(1).double()
        self.shape, self.mean = x.shape[1:], rows.mean(0)
        self.variance, self.axes = torch.linalg.eigh(torch.cov(rows.T))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of patches."""
        white = (x.flatten(1).double() - self.mean) @ self.axes / self.variance.sqrt()
        normaliser = self.variance.log().sum() + len(self.mean) * math.log(2 * math.pi)
        return -0.5 * (white.square().sum(1) + normaliser)

    def sample(self, count: int) -> Tensor:
        """Patches drawn from it."""
        noise = torch.randn(count, len(self.mean), generator=torch.Generator().manual_seed(1), dtype=torch.double)
        return (self.mean + (noise * self.variance.sqrt()) @ self.axes.T).reshape(count, *self.shape).float()

    def first(self, x: Tensor, count: int) -> Tensor:
        """Patches projected on the leading principal axes."""
        axes = self.axes[:, -count:]
        rows = (x.flatten(1).double() - self.mean) @ axes @ axes.T + self.mean
        return rows.reshape(x.shape).float()


class GaussianPosterior:
    """Exact posterior of a Gaussian given ``y ~ Normal(A x, sd)``."""

    def __init__(self, prior: Gaussian, operator: Tensor, sd: float) -> None:
        self.axes, self.centre = prior.axes * prior.variance.sqrt(), prior.mean
        self.operator, self.sd = operator.double(), sd
        self.design = self.operator @ self.axes
        precision = torch.eye(len(self.centre), dtype=torch.double) + self.design.T @ self.design / sd**2
        self.root = torch.linalg.cholesky(precision)

    def mean(self, y: Tensor) -> Tensor:
        """Posterior means ``(S, D)``."""
        pull = (y.double() - self.operator @ self.centre) @ self.design / self.sd**2
        return (self.centre + torch.cholesky_solve(pull.T, self.root).T @ self.axes.T).float()

    def sample(self, y: Tensor, count: int = 200) -> Tensor:
        """Posterior draws ``(S, count, D)``."""
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(len(self.centre), len(y) * count, generator=generator, dtype=torch.double)
        latent = torch.linalg.solve_triangular(self.root.T, noise, upper=True)
        return self.mean(y)[:, None] + (self.axes @ latent).T.reshape(len(y), count, -1).float()


@cache
def gaussian_of(name: str) -> Gaussian:
    """The Gaussian beside the flow of a name."""
    return Gaussian(data(name, KINDS[name].rows, "train"))
