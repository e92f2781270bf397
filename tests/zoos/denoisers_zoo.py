"""Exact denoisers of a Gaussian mixture, under every parametrisation."""

import torch
from torch import nn

from flows_zoo import mixture

TIMES = 1000


def linear_table(steps=TIMES, first=1e-4, last=0.02):
    """``alphas_cumprod`` of Ho et al. (2020)."""
    return torch.cumprod(1 - torch.linspace(first, last, steps, dtype=torch.double), 0)


class ExactMixture(nn.Module):
    """``E[x_0 | x_0 + sigma n]`` for a mixture in the coordinates of the network, on events of any shape."""

    def __init__(self, weights, means, covariances):
        super().__init__()
        variances, axes = torch.linalg.eigh(covariances)
        self.weights, self.means = nn.Parameter(weights), nn.Parameter(means)
        self.variances, self.axes = nn.Parameter(variances), nn.Parameter(axes)

    def x0(self, noised, sigma):
        u = noised.flatten(1).unsqueeze(1) - self.means  # (n, K, D)
        along = torch.einsum("kij,nki->nkj", self.axes, u)
        total = self.variances + sigma.view(-1, 1, 1) ** 2
        log = self.weights.log() - 0.5 * (along.square() / total + total.log()).sum(-1)
        mean = self.means + torch.einsum("kij,nkj->nki", self.axes, along * self.variances / total)
        return (log.softmax(-1).unsqueeze(-1) * mean).sum(1).view_as(noised)

    def forward(self, noised, sigma):
        return self.x0(noised, sigma)


class Discrete(nn.Module):
    """The same network as it would be trained on a table: sees ``alpha (x_0 + sigma n)`` and an index."""

    def __init__(self, exact, prediction, table):
        super().__init__()
        self.exact, self.prediction = exact, prediction
        self.register_buffer("log_sigma", 0.5 * torch.log((1 - table) / table))

    def forward(self, image, time):
        below = time.floor().long().clamp(0, len(self.log_sigma) - 2)
        share = time - below
        # Between its entries, cosine-like schedules aside, log sigma is nearly linear; three points do better.
        sigma = self._between(below, share).exp()
        shape = [-1] + [1] * (image.ndim - 1)
        sigma = sigma.to(image)
        wide = sigma.view(shape)
        alpha = (1 + wide**2).rsqrt()
        x0 = self.exact.x0(image / alpha, sigma)
        n = (image / alpha - x0) / wide
        return {"x0": x0, "epsilon": n, "v": alpha * n - alpha * wide * x0, "flow": n - x0}[self.prediction]

    def _between(self, below, share):
        return torch.lerp(self.log_sigma[below], self.log_sigma[below + 1], share.to(self.log_sigma))


def exact_denoiser(dim, dtype=torch.double):
    return ExactMixture(*mixture(dim, dtype))
