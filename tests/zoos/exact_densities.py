"""Batched densities whose posterior and evidence are known, and statistical assertions against them.

Each density can be given a biased coarse map: under ``fidelity("coarse")`` it is another, wrong posterior. A
sampler that let the coarse density decide anything would miss the exact answer by far.
"""

import math
import warnings

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ifpyro.flow.solver.fidelity import Evaluations, current_fidelity

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


def coarse() -> bool:
    """Whether a cheap map is asked for: "coarse", or fewer than 32 evaluations."""
    level = current_fidelity()
    return level == "coarse" or (isinstance(level, Evaluations) and level.count < 32)


class GaussianMixture:
    """Prior ``sum_k w_k N(m_k, S_k)``, observation ``y = A q + noise`` of standard deviation ``sd``."""

    gaussian_prior = False

    def __init__(self, weight, mean, covariance, matrix, y, sd, bias=0.0):
        as_double = [torch.as_tensor(v, dtype=torch.float64) for v in (weight, mean, covariance, matrix, y)]
        self.weight, self.mean, self.covariance, self.matrix, self.y = as_double
        self.sd, self.bias, self.dim = sd, bias, self.mean.shape[1]
        self.factor = torch.linalg.cholesky(self.covariance)
        self.gradients = self.values = 0
        self.gaussian_prior = len(self.weight) == 1 and bool((self.mean == 0).all())
        self.gaussian_prior &= torch.equal(self.covariance[0], torch.eye(self.dim, dtype=torch.float64))

        eye = torch.eye(len(self.y), dtype=torch.float64)
        a = self.matrix
        observed = a @ self.covariance @ a.T + sd**2 * eye
        residual = self.y - self.mean @ a.T
        normal = torch.distributions.MultivariateNormal(torch.zeros_like(self.y), observed)
        log_evidence = normal.log_prob(residual) + self.weight.log()
        self.log_evidence = float(log_evidence.logsumexp(0))
        self.posterior_weight = log_evidence.softmax(0)
        gain = self.covariance @ a.T @ torch.linalg.inv(observed)
        self.posterior_mean = self.mean + (gain @ residual[:, :, None])[:, :, 0]
        self.posterior_covariance = self.covariance - gain @ a @ self.covariance

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        self.gradients += len(q) * torch.is_grad_enabled()
        self.values += len(q) * (not torch.is_grad_enabled())
        normal = torch.distributions.MultivariateNormal(self.mean, scale_tril=self.factor, validate_args=False)
        log_prior = (normal.log_prob(q[:, None]) + self.weight.log()).logsumexp(1)
        x = q @ self.matrix.T
        if coarse():
            x = x * (1 + self.bias) + self.bias
        log_likelihood = -0.5 * ((x - self.y) / self.sd) ** 2 - math.log(self.sd * math.sqrt(2 * math.pi))
        return log_prior, log_likelihood.sum(-1)

    def sample_prior(self, num, generator):
        component = torch.multinomial(self.weight, num, True, generator=generator)
        noise = torch.randn(num, self.dim, 1, generator=generator, dtype=torch.float64)
        return self.mean[component] + (self.factor[component] @ noise)[:, :, 0]

    def sites(self, q):
        return {"q": q}

    def cdf(self, x: float) -> float:
        """Posterior distribution function of the first axis."""
        scale = self.posterior_covariance[:, 0, 0].sqrt()
        return float(self.posterior_weight @ torch.special.ndtr((x - self.posterior_mean[:, 0]) / scale))

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.posterior_weight @ self.posterior_mean
        second = self.posterior_covariance.diagonal(dim1=1, dim2=2) + self.posterior_mean**2
        return mean, self.posterior_weight @ second - mean**2


def conjugate(bias=0.0, dim=4, sd=0.5) -> GaussianMixture:
    matrix = torch.eye(dim)[:2] + 0.5 * torch.eye(dim)[1:3]
    return GaussianMixture([1.0], torch.zeros(1, dim), torch.eye(dim)[None], matrix, [1.5, -1.0], sd, bias=bias)


def two_modes(bias=0.0) -> GaussianMixture:
    """Modes six units apart, of weights 0.36 and 0.64: no local move crosses between them."""
    covariance = torch.tensor([[[0.3, 0.15], [0.15, 0.3]], [[0.6, 0.0], [0.0, 0.6]]])
    mean = [[-3.0, 0.2], [3.0, 0.0]]
    return GaussianMixture([0.3, 0.7], mean, covariance, [[0.0, 1.0]], [0.8], 0.3, bias=bias)


class GammaPoisson:
    """``exp(q) ~ Gamma(a, 1)``, counts ``k ~ Poisson(c exp(q))``: a skewed posterior ``Gamma(a + k, 1 +
    c)``."""

    gaussian_prior = False
    dim = 1

    def __init__(self, a=0.7, k=1, c=0.5, bias=0.0):
        self.a, self.k, self.c, self.bias = a, k, c, bias
        self.log_evidence = float(stats.nbinom.logpmf(k, a, 1 / (1 + c)))
        self.posterior = stats.loggamma(a + k, loc=-math.log1p(c))

    def __call__(self, q):
        q = q[:, 0]
        log_prior = self.a * q - q.exp() - math.lgamma(self.a)
        rate = q + math.log(self.c) + (self.bias if coarse() else 0.0)
        return log_prior, self.k * rate - rate.exp() - math.lgamma(self.k + 1)

    def sample_prior(self, num, generator):
        # exact by inversion, since torch's own gamma sampler takes no generator
        uniform = torch.rand(num, 1, generator=generator, dtype=torch.float64).numpy()
        return torch.from_numpy(stats.loggamma(self.a).ppf(uniform))

    def sites(self, q):
        return {"q": q}

    def cdf(self, x):
        return float(self.posterior.cdf(x))

    def moments(self):
        mean, variance = self.posterior.stats("mv")
        return torch.tensor([float(mean)]), torch.tensor([float(variance)])


class Warped:
    """``q ~ N(0, 1)`` seen through ``q^2 + q/2``: two unequal modes under a Gaussian prior; exact by
    quadrature."""

    gaussian_prior = True
    dim = 1

    def __init__(self, y=1.2, sd=0.25, bias=0.0):
        self.y, self.sd, self.bias = y, sd, bias
        self.grid = np.linspace(-8, 8, 20001)
        log_prior, log_likelihood = self(torch.from_numpy(self.grid[:, None]))
        density = (log_prior + log_likelihood).exp().numpy()
        total = np.trapezoid(density, self.grid)
        self.log_evidence, self.density = math.log(total), density / total

    def __call__(self, q):
        q = q[:, 0]
        x = q**2 + 0.5 * q + (self.bias * q if coarse() else 0.0)
        log_normal = 0.5 * math.log(2 * math.pi)
        return -0.5 * q**2 - log_normal, -0.5 * ((x - self.y) / self.sd) ** 2 - math.log(self.sd) - log_normal

    def sample_prior(self, num, generator):
        return torch.randn(num, 1, generator=generator, dtype=torch.float64)

    def sites(self, q):
        return {"q": q}

    def cdf(self, x):
        below = self.grid <= x
        return float(np.trapezoid(self.density[below], self.grid[below]))

    def moments(self):
        mean = np.trapezoid(self.density * self.grid, self.grid)
        variance = np.trapezoid(self.density * (self.grid - mean) ** 2, self.grid)
        return torch.tensor([mean]), torch.tensor([variance])


PROBLEMS = {
    "conjugate": conjugate,
    "two modes": two_modes,
    "skewed": GammaPoisson,
    "warped": Warped,
}
"""Name -> constructor taking ``bias``, the error of the coarse map."""

BIASES = {"conjugate": 0.15, "two modes": 0.15, "skewed": 0.3, "warped": 0.08}


def statistics(problem, draws: Tensor) -> dict[str, tuple[Tensor, float]]:
    """Name -> (statistic of each draw, its exact posterior mean), for draws ``(chains, draws, dim)``."""
    mean, variance = problem.moments()
    first = draws[..., 0]
    found = {}
    for axis in range(draws.shape[-1]):
        found[f"mean {axis}"] = (draws[..., axis], float(mean[axis]))
        found[f"variance {axis}"] = ((draws[..., axis] - mean[axis]) ** 2, float(variance[axis]))
    for x in (float(mean[0]), float(mean[0] + variance[0].sqrt()), 0.0):
        found[f"P(q < {x:.2f})"] = ((first < x).double(), problem.cdf(x))
    return found


def assert_exact(problem, draws: Tensor, errors: float = 4.0) -> None:
    """Means, variances and probabilities of the draws agree with the exact posterior within Monte Carlo
    error."""
    for name, (values, exact) in statistics(problem, draws).items():
        ess = float(arviz.ess(values.numpy(), method="mean"))
        assert ess > 200, f"{name}: effective sample size {ess:.0f} is too small for this test to mean anything"
        error = float(values.std()) / math.sqrt(ess)
        assert abs(float(values.mean()) - exact) < errors * error, (
            f"{name}: {float(values.mean()):.4f}, exact {exact:.4f}, standard error {error:.4f}"
        )
