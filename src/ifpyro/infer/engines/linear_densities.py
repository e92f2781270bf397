r"""Two views of the posterior of a flow prior under a linear Gaussian observation, as densities for the engines.

**From the Gaussian.** In standardised coordinates ``v`` the flow's Gaussian is ``N(0, I)`` and the observation ``y =
b + A v + e``. The Gaussian's own posterior is known,

.. math:: v = m + L q, \qquad q \sim N(0, I), \qquad L L^T = (I + A^T \Sigma^{-1} A)^{-1},

and because both priors meet the same likelihood, the posterior of the flow is

.. math:: p(q \mid y) \propto N(q; 0, I) \; \frac{p(v)}{N(v; 0, I)} .

The noise is in ``m`` and ``L`` alone. However small it is, what a sampler has to bridge is the ratio of two priors; for
a Gaussian flow that is one. The price is the flow's log-density at every draw, which takes the Jacobian. A *surrogate*
of few evaluations stands for it on the way, and the flow's own decides by importance weights at the end.

**From the prior.** In the latent, ``p(z | y) ∝ N(z; 0, I) N(y; A x(z), Σ)``: a decode a draw, and best where the noise
is so large that little is learned.
"""

import math

import torch
from torch import Tensor

from ...core.precision import full_precision
from ...flow.flow import InflationaryFlow
from ...flow.networks.velocity import Velocity
from ...flow.solver.fidelity import Evaluations, current_fidelity
from ...flow.solver.grid import cheap_grid
from ...flow.solver.steps import Trace, take_with_traces, velocity_and_jacobian
from .linear_observation import LinearObservation
from .tempering import effective_fraction

SURROGATES = (6, 8, 12, 16, 24, 32, 48)
"""Evaluations of the velocity with which a surrogate of the log-density may be solved."""

AGREEMENT = 0.9
"""Effective share of draws of the surrogate's posterior that are as many draws of the flow's."""


class FromGaussian:
    """The posterior over ``q``, from the Gaussian's (`ifpyro.infer.model.density.BatchedDensity`).

    Args:
        flow: the prior.
        seen: the observation, of which ``y`` is one, ``(1, m)``.
        batch_size: most rows solved at once.

    Attributes:
        evaluations: those of the surrogate for the flow's log-density; None for the flow's own.
        log_reference: log-evidence of the observation under the Gaussian.
    """

    gaussian_prior = True

    def __init__(self, flow: InflationaryFlow, seen: LinearObservation, batch_size: int) -> None:
        self.flow, self.batch_size = flow, batch_size
        self.dim, self.device = flow.latent_dim, flow.device
        self.evaluations: int | None = SURROGATES[0]
        basis = flow.basis
        scale, unit, mean = basis.scale.double(), basis.unit.double(), basis.mean.double()
        axes = basis.rotate_back(torch.eye(self.dim, dtype=flow.dtype, device=flow.device)).double()
        self._mean_x, self._to_x = mean, scale[:, None] * axes * unit
        operator, residual = seen.forward(self._to_x).T, seen.y - seen.forward(mean[None])
        whitened, observed = operator / seen.sd[:, None], residual[0] / seen.sd
        precision, directions = torch.linalg.eigh(whitened.T @ whitened)
        precision = 1 + precision.clamp(min=0)
        self._factor = directions * precision.rsqrt()
        shift = (observed @ whitened @ directions) / precision
        self._mean = shift @ directions.T
        fit = observed.square().sum() - shift.square() @ precision
        size = 2 * seen.sd.log().sum() + precision.log().sum() + len(seen.sd) * math.log(2 * math.pi)
        self.log_reference = float(-0.5 * (fit + size))

    def events(self, q: Tensor) -> Tensor:
        """Flattened events ``x`` of rows ``q``, ``(n, D)``, in double precision."""
        return self._mean_x + self._standardised(q) @ self._to_x

    def log_ratio(self, q: Tensor, evaluations: int | None) -> Tensor:
        """``log p(v) - log N(v; 0, I)`` by the flow's own map, or by a surrogate of so many evaluations, ``(n,)``."""
        rows = self._standardised(q).to(self.flow.dtype).split(self.batch_size)
        return torch.cat([self._log_ratio(v, evaluations) for v in rows])

    def match(self, q: Tensor) -> None:
        """Take the cheapest surrogate that agrees with the flow's log-density at rows ``q`` of the posterior."""
        exact = self.log_ratio(q, None)
        for self.evaluations in SURROGATES:
            gap = (exact - self.log_ratio(q, self.evaluations)).nan_to_num(-torch.inf)
            if float(effective_fraction(gap)) >= AGREEMENT:
                return
        self.evaluations = None

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """See `BatchedDensity`; guides of few evaluations are surrogates too."""
        level, evaluations = current_fidelity(), self.evaluations
        if isinstance(level, Evaluations) and (evaluations is None or level.count < evaluations):
            evaluations = level.count
        return _log_normal(q), self.log_ratio(q, evaluations)

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Draws of the Gaussian's posterior."""
        return torch.randn(num, self.dim, generator=generator, device=self.device, dtype=self.flow.dtype)

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """See `BatchedDensity`."""
        return {"x": self.events(q)}

    def _standardised(self, q: Tensor) -> Tensor:
        return self._mean + q.double() @ self._factor.T

    @full_precision()
    def _log_ratio(self, v: Tensor, evaluations: int | None) -> Tensor:
        if evaluations is None:
            z, log_det = self.flow.map.to_latent(v, log_det=True)
        else:
            z, log_det = self._quadrature(v, evaluations)
        return 0.5 * (v.square() - z.square()).sum(-1) - log_det

    def _quadrature(self, v: Tensor, evaluations: int) -> tuple[Tensor, Tensor]:
        """The latent, and ``log|det dv/dz|``, of the equation: no map is inverted, and divergences are summed."""
        velocity, z, log_det = self.flow.evaluated_velocity(), v, v.new_zeros(len(v))
        trace = _exact_trace(velocity)
        for step in self.flow.map.steps(v, cheap_grid(evaluations, self.flow.grid)).to_latent:
            z, traces = take_with_traces(step, z, trace)
            log_det = log_det - traces[0]
        return z, log_det


class FromPrior:
    """The posterior over the latent ``z``, from the prior (`ifpyro.infer.model.density.BatchedDensity`).

    Args:
        flow: the prior.
        seen: the observation, of which ``y`` is one, ``(1, m)``.
        batch_size: most rows decoded at once.
    """

    gaussian_prior = True
    log_reference = 0.0

    def __init__(self, flow: InflationaryFlow, seen: LinearObservation, batch_size: int) -> None:
        self.flow, self.seen, self.batch_size = flow, seen, batch_size
        self.dim, self.device = flow.latent_dim, flow.device
        self._matrix = seen.matrix(self.dim)
        self._constant = -seen.sd.log().sum() - 0.5 * len(seen.sd) * math.log(2 * math.pi)

    def events(self, z: Tensor) -> Tensor:
        """Flattened events ``x`` of latents, ``(n, D)``, in double precision."""
        return self.flow.decode(z, batch_size=self.batch_size).reshape(len(z), -1).double()

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """See `BatchedDensity`."""
        residual = (self.seen.y - self.events(z) @ self._matrix.T) / self.seen.sd
        return _log_normal(z), (self._constant - 0.5 * residual.square().sum(-1)).to(z.dtype)

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Draws of the prior."""
        return torch.randn(num, self.dim, generator=generator, device=self.device, dtype=self.flow.dtype)

    def sites(self, z: Tensor) -> dict[str, Tensor]:
        """See `BatchedDensity`."""
        return {"x": self.events(z)}


def _log_normal(q: Tensor) -> Tensor:
    return -0.5 * q.square().sum(-1) - 0.5 * q.shape[1] * math.log(2 * math.pi)


def _exact_trace(velocity: Velocity) -> Trace:
    def trace(stage: int, y: Tensor, embedding: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        value, jacobian = velocity_and_jacobian(velocity, y, embedding)
        return value, (rate * jacobian.diagonal(dim1=-2, dim2=-1)).sum(-1)[None]

    return trace
