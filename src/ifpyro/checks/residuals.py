r"""Where a network errs along the flow, and what the errors add up to.

With the symbols of :mod:`ifpyro.flow.axes.schedule`, the network ``F`` stands for ``F*(y, t) = E[target | y]``, its
target being ``sin(theta) x_0/s - cos(theta) n``. Its error ``e = F - F*`` is not seen on data, its *residual* is:

.. math:: r(t) = F(y_t, t) - (\sin\theta \, x_0/s - \cos\theta \, n), \qquad E[r \mid y_t] = e(y_t, t) .

de Albuquerque & Pearson (2024, appendix C.3) noise the same data afresh at every time, correlate the residuals of two
times, find little correlation far from the diagonal, and conclude that errors act like noise that cancels along the
flow. That reading needs care. The residual of a *perfect* network is not zero: it is the part of the target that
``y_t`` does not tell. For Gaussian data that alone gives

.. math:: R(t_1, t_2) = \sin\theta(t_1) \, \sin\theta(t_2), \qquad t_1 \ne t_2 ,

since two times share ``x_0`` but not the noise. And fresh noise hides how long errors last on a path. What the
flow adds up is the error along its own paths, to first order

.. math:: \delta y(1) \approx -\int_0^1 J(1, t) \, \theta'(t) \odot e(y_t, t) \, dt ,

``J`` being the Jacobian of the rest of the flow. :func:`path_errors` gives ``e`` where a reference for ``F*`` is at
hand: the exact velocity of a known density, or a second network, trained with another seed (whose difference from
the first is an error too, of a size that both share). :func:`accumulated` gives the integral without ``J``, beside
what it would be if nothing cancelled.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.arguments import check_seed
from ..flow.flow import InflationaryFlow
from ..flow.networks.mixture import GaussianMixtureVelocity
from ..flow.networks.velocity import Velocity
from ..flow.solver.steps import build_solver, take


@dataclass(frozen=True)
class Residuals:
    """Vectors along time.

    Attributes:
        times: ``(m,)``, double precision, in ``[0, 1]``.
        values: ``(m, n, D)``, in unit-variance coordinates of the flow.
    """

    times: Tensor
    values: Tensor

    def size(self) -> Tensor:
        """Root-mean-square length over the rows at each time, divided by ``sqrt(D)``: ``(m,)``."""
        return self.values.square().mean((1, 2)).sqrt()

    def autocorrelation(self) -> Tensor:
        """``R(t_1, t_2) = E[r_1 . r_2] / sqrt(E|r_1|^2 E|r_2|^2)`` over the rows, means not removed: ``(m, m)``."""
        flat = self.values.flatten(1).double()
        unit = flat / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
        return unit @ unit.T


@dataclass(frozen=True)
class Accumulated:
    """What errors along a path come to, in standard deviations of the latent (root mean square over rows and axes).

    Attributes:
        error: of ``integral theta' e dt``.
        without_cancelling: of ``integral |theta' e| dt``, the most that the same errors could come to.
        coherence: the ratio of the two: near 1 if errors point the same way all along, near 0 if they cancel.
    """

    error: float
    without_cancelling: float
    coherence: float


def network_residuals(flow: InflationaryFlow, x: Tensor, times: Tensor | None = None, *, seed: int) -> Residuals:
    """Residuals ``r(t)`` of the network on held-out data, with fresh noise at every time.

    Args:
        flow: a flow.
        x: held-out data, ``(n, *event_shape)``.
        times: ``(m,)`` in ``[0, 1]``; 32 from 0 to 1 by default.
        seed: of the noise.

    Raises:
        ValueError: if times leave ``[0, 1]``.
    """
    times = torch.linspace(0, 1, 32, dtype=torch.double) if times is None else torch.as_tensor(times).double()
    if times.ndim != 1 or bool((times < 0).any()) or bool((times > 1).any()):
        raise ValueError(f"network_residuals expects times of shape (m,) in [0, 1], got {times}")
    rows = _standard(flow, x)
    generator = torch.Generator(rows.device).manual_seed(check_seed(seed))
    values = []
    with torch.no_grad():
        for t in times.to(rows.device):
            theta = flow.angles(t).to(rows)
            noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
            y, target = theta.cos() * rows + theta.sin() * noise, theta.sin() * rows - theta.cos() * noise
            values.append(flow.velocity(y, flow.velocity.embed(t.unsqueeze(0))[0]) - target)
    return Residuals(times, torch.stack(values))


def path_errors(flow: InflationaryFlow, reference: Velocity, x: Tensor, steps: int = 64) -> Residuals:
    """Differences ``e = F - F*`` from a reference along the flow's own paths from data ``x`` to the latent.

    Args:
        flow: a flow.
        reference: ``F*``, a velocity in the same coordinates and with the same angles, such as the exact
            :class:`~ifpyro.flow.networks.mixture.GaussianMixtureVelocity`, or the network of another training.
        x: data, ``(n, *event_shape)``.
        steps: solver steps, at whose nodes errors are taken.
    """
    grid = replace(flow.grid, steps=steps)
    y = _standard(flow, x)
    like = next((b for b in [*reference.parameters(), *reference.buffers()] if b.is_floating_point()), y)
    times = grid.times().to(y.device)
    solver = build_solver(flow.velocity, flow.angles, grid, y)
    values = []
    with torch.no_grad():
        for k, t in enumerate(times):
            ours = flow.velocity(y, flow.velocity.embed(t.unsqueeze(0))[0])
            exact = reference(y.to(like.dtype), reference.embed(t.unsqueeze(0))[0])
            values.append(ours - exact.to(y.dtype))
            if k < steps:
                y = take(flow.velocity, solver.to_latent[k], y)
    return Residuals(times.cpu(), torch.stack(values))


def mixture_velocity(
    flow: InflationaryFlow, weights: Tensor, means: Tensor, covariances: Tensor
) -> GaussianMixtureVelocity:
    """The exact ``F*`` in the coordinates of a flow that was trained on a Gaussian mixture, in double precision.

    Args:
        flow: a flow on real vectors ``(D,)``.
        weights: ``(K,)``, summing to one.
        means: ``(K, D)``.
        covariances: ``(K, D, D)``.
    """
    basis = copy.deepcopy(flow.basis).double()
    to_axes = basis.rotate(torch.diag(1 / basis.unit)) / basis.scale
    covariance = to_axes.T @ covariances.double() @ to_axes
    return GaussianMixtureVelocity(weights.double(), basis.to_standard(means.double()), covariance, flow.angles)


def accumulated(flow: InflationaryFlow, errors: Residuals) -> Accumulated:
    """What :func:`path_errors` add up to along the flow (trapezoidal rule over their times)."""
    rate = flow.angles.speed(errors.times).to(errors.values).unsqueeze(1) * errors.values
    gaps = errors.times.diff().to(rate).view(-1, 1, 1)

    def total(values: Tensor) -> float:
        integral = (0.5 * gaps * (values[1:] + values[:-1])).sum(0)
        return math.sqrt(float(integral.square().mean()))

    error, most = total(rate), total(rate.abs())
    return Accumulated(error, most, error / most if most > 0 else 0.0)


def _standard(flow: InflationaryFlow, x: Tensor) -> Tensor:
    return flow.standardise(x)[0]
