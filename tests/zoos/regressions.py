"""Regressions with uncentred columns and unknown scale, whose evidence and posterior are known by quadrature, and any
density in other units."""

import math

import numpy as np
import torch
from torch import Tensor


class Regression:
    """``y ~ N(X b, s)``, ``b ~ N(mean, diag(scale^2))``, ``s ~ U(0, top)``; ``q`` is ``b`` and the log-odds of ``s /
    top``. Given ``s`` everything is Gaussian; ``s`` itself is summed over a grid.

    Args:
        columns: ``X``, ``(rows, p)``.
        y: the observation, ``(rows,)``.
        mean: prior means, ``(p,)``.
        scale: prior standard deviations, ``(p,)``.
        top: upper end of the prior of the noise's standard deviation.
        dtype: precision in which draws are made and the density is computed.
    """

    gaussian_prior = False

    def __init__(self, columns, y, mean, scale, top, dtype=torch.float32):
        self.x, self.y, self.mean, self.scale = (torch.as_tensor(v, dtype=dtype) for v in (columns, y, mean, scale))
        self.top, self.dim, self.gradients = top, self.x.shape[1] + 1, 0
        x, y, mean, scale = (np.asarray(v, dtype=float) for v in (columns, y, mean, scale))
        residual = y - x @ mean
        root = x * scale
        values, vectors = np.linalg.eigh(root @ root.T)
        values, residual = values.clip(0.0), vectors.T @ residual
        grid = np.linspace(math.log(top) - 16, math.log(top), 4001)
        variance = values + np.exp(2 * grid)[:, None]
        log_joint = -0.5 * (np.log(2 * np.pi * variance) + residual**2 / variance).sum(1) + grid - math.log(top)
        weight = np.exp(log_joint - log_joint.max())
        self.log_evidence = float(log_joint.max() + np.log(np.trapezoid(weight, grid)))
        weight = weight / weight.sum()
        means, seconds = [], []
        for u in np.exp(grid[weight > 1e-12]):
            covariance = np.linalg.inv(x.T @ x / u**2 + np.diag(scale**-2.0))
            centre = covariance @ (x.T @ y / u**2 + mean / scale**2)
            means.append(centre)
            seconds.append(covariance.diagonal() + centre**2)
        weight = weight[weight > 1e-12]
        self.posterior_mean = weight @ np.array(means)
        self.posterior_sd = np.sqrt(weight @ np.array(seconds) - self.posterior_mean**2)

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        self.gradients += len(q) * torch.is_grad_enabled()
        b, odds = q[:, :-1], q[:, -1]
        log_prior = (-0.5 * ((b - self.mean) / self.scale) ** 2 - self.scale.log()).sum(1)
        log_prior = log_prior - 0.5 * (self.dim - 1) * math.log(2 * math.pi)
        log_prior = log_prior + torch.nn.functional.logsigmoid(odds) + torch.nn.functional.logsigmoid(-odds)
        log_s = math.log(self.top) + torch.nn.functional.logsigmoid(odds)
        z = (self.y - b @ self.x.T) * (-log_s).exp()[:, None]
        log_likelihood = -0.5 * z.square().sum(1) - len(self.y) * (log_s + 0.5 * math.log(2 * math.pi))
        return log_prior, log_likelihood

    def sample_prior(self, num, generator):
        b = self.mean + self.scale * torch.randn(num, self.dim - 1, generator=generator, dtype=self.x.dtype)
        u = torch.rand(num, 1, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        return torch.cat([b, (u.log() - (-u).log1p()).to(b)], 1)

    def sites(self, q):
        return {"b": q[:, :-1], "s": self.top * q[:, -1].sigmoid()}


def calendar(dtype=torch.float32) -> Regression:
    """A trend over calendar years that nobody centred: slope and intercept correlate to one part in 30,000."""
    generator = torch.Generator().manual_seed(0)
    years = torch.arange(1985.0, 2025.0, dtype=torch.float64)
    y = 14 + 0.03 * (years - 2000) + 0.2 * torch.randn(40, generator=generator)
    columns = torch.stack([torch.ones_like(years), years], 1)
    return Regression(columns, y, [0.0, 0.0], [150.0, 0.1], 50.0, dtype)


def summers(dtype=torch.float32) -> Regression:
    """Mean temperatures of summers over years again, under priors thousands of posteriors wide."""
    generator = torch.Generator().manual_seed(1)
    years = torch.arange(3952.0, 4014.0, dtype=torch.float64)
    y = 9.3 + 0.02 * (years - 3982) + 1.1 * torch.randn(62, generator=generator)
    columns = torch.stack([torch.ones_like(years), years], 1)
    return Regression(columns, y, [9.3, 0.0], [100.0, 1 / 30], 100.0, dtype)


class InUnits:
    """A density whose axes are measured in other units: ``q = units * q_of_the_density``."""

    def __init__(self, density, units):
        self.density, self.units = density, torch.as_tensor(units)
        self.dim, self.gaussian_prior = density.dim, False

    def __call__(self, q):
        log_prior, log_likelihood = self.density(q / self.units.to(q))
        return log_prior - float(self.units.double().log().sum()), log_likelihood

    def sample_prior(self, num, generator):
        q = self.density.sample_prior(num, generator)
        return q * self.units.to(q)

    def sites(self, q):
        return self.density.sites(q / self.units.to(q))
