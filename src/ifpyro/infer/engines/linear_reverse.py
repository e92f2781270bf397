r"""Draws of a flow prior given a linear observation, by noising and denoising from much noise to none: approximate.

On the axes of the flow, a noised state is ``u = cos(theta) v + sin(theta) n`` (:mod:`ifpyro.flow.axes.schedule`),
and the network gives the mean of ``v`` given ``u``; the identity ``E[(target - F)^2] = 1 - E[F^2]`` gives, for every
axis, a variance,

.. math:: v \mid u \approx N(\cos\theta \, u + \sin\theta \, F, \; V), \qquad V = \sin^2\theta \, (1 - E[F^2]) .

Taken for a Gaussian, it meets the observation ``y = b + A v + e`` in closed form: a draw ``v'`` from it and a draw
``e'`` of the noise give one of ``v`` given ``u`` *and* ``y``,

.. math:: v = v' + V A^T (A V A^T + \Sigma)^{-1} (y + e' - b - A v'),

the solution by conjugate gradients, which need products with ``A`` and ``A^T`` alone. Then ``v`` is noised anew at the
next, lower level. The noise of the observation may be as small or as large as it likes: no level is tied to it.

Exact for a Gaussian flow at any number of levels. For others the error is that of a Gaussian for ``v`` given ``u``,
which is least at the last levels, and that draws keep the mode that the first levels gave them: no number of levels is
exact.
"""

import copy
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...core.precision import full_precision
from ...flow.flow import InflationaryFlow
from .linear_observation import LinearObservation

_NODES = 4097
_RESIDUAL = 1e-8  # of conjugate gradients, relative
_LOOSE = 1e-3  # from which the user is warned
_ITERATIONS = 500
_DROWNED = 2.0  # noise over signal, on the axis where it is least, from which all levels look alike


class _Standardised:
    """The observation as one of standardised coordinates ``v``, in double precision."""

    def __init__(self, flow: InflationaryFlow, seen: LinearObservation, draws: int) -> None:
        self._basis, self._seen = copy.deepcopy(flow.basis).double(), seen
        self._scale, self._unit = self._basis.scale, self._basis.unit
        residual = seen.y - seen.forward(self._basis.mean[None])
        self.y = residual.repeat_interleave(draws, 0)
        self.sd = seen.sd

    def forward(self, v: Tensor) -> Tensor:
        return self._seen.forward(self._unit * self._basis.rotate_back(v * self._scale))

    def adjoint(self, r: Tensor) -> Tensor:
        return self._basis.rotate(self._unit * self._seen.adjoint(r)) * self._scale

    def events(self, v: Tensor) -> Tensor:
        return self._basis.from_standard(v)

    def condition(self, v: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
        """Draws given the observations, of draws ``v`` of a Gaussian with so much variance on every axis."""
        gap = self.y + self.sd * noise - self.forward(v)
        # With noise of one on every entry, the least eigenvalue is at least one.
        whitened = conjugate_gradients(
            lambda r: r + self.forward(variance * self.adjoint(r / self.sd)) / self.sd, gap / self.sd
        )
        return v + variance * self.adjoint(whitened / self.sd)


@full_precision()
def reverse_process(
    flow: InflationaryFlow,
    seen: LinearObservation,
    *,
    draws: int,
    sweeps: int,
    ratio: float,
    generator: torch.Generator,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Draws of flattened events, ``(F * draws, D)``, those of one observation one after the other.

    Args:
        flow: the prior.
        seen: the observations.
        draws: of each.
        sweeps: how often every level is noised and denoised.
        ratio: of neighbouring noise levels.
        generator: of all randomness, on the flow's device.
        batch_size: most rows denoised at once.
        progress: show a progress bar over levels.
    """
    problem, rows = _Standardised(flow, seen, draws), len(seen.y) * draws
    times = _levels(flow, ratio)
    theta, embedding = flow.angles(times).double().to(flow.device), flow.velocity.embed(times.to(flow.device))
    velocity = flow.evaluated_velocity()

    def normal(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.double, device=flow.device)

    dim, entries = flow.latent_dim, len(seen.sd)
    plan = [k for k in range(len(times)) for _ in range(sweeps)]
    with torch.no_grad():
        # Under the noise of the first level nothing is left of the data but their covariance.
        v = problem.condition(normal(dim), torch.ones_like(theta[0]), normal(entries))
        for k in tqdm(plan, disable=not progress, desc="noise and denoise"):
            cos, sin = theta[k].cos(), theta[k].sin()
            state = cos * v + sin * normal(dim)
            parts = state.to(flow.dtype).split(batch_size)
            found = torch.cat([velocity(part, embedding[k]) for part in parts]).double()
            variance = sin.square() * (1 - found.square().mean(0)).clamp(0.02, 1)
            v = cos * state + sin * found + variance.sqrt() * normal(dim)
            v = problem.condition(v, variance, normal(entries))
    return problem.events(v)


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """The solutions of ``M x = right`` for every row, ``M`` symmetric and positive definite."""
    x, residual = torch.zeros_like(right), right
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    enough = (_RESIDUAL**2 * size).clamp_min(1e-300)
    for _ in range(min(_ITERATIONS, 2 * right.shape[1] + 2)):
        if bool((size <= enough).all()):
            return x
        image = product(direction)
        step = size / (direction * image).sum(-1, keepdim=True).clamp_min(1e-300)
        step = torch.where(size > enough, step, 0.0)
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + size / before.clamp_min(1e-300) * direction
    worst = float((size / enough).max().sqrt()) * _RESIDUAL
    if worst > _LOOSE:
        warnings.warn(
            f"conjugate gradients left {worst:.1e} of the observation after {_ITERATIONS} steps: the noise is very "
            "small against what the operator sees; the draws fit y less closely than sd says",
            stacklevel=5,
        )
    return x


def _levels(flow: InflationaryFlow, ratio: float) -> Tensor:
    """Times from where noise drowns every axis to the noise floor, at equal steps of the mean ``log tan theta``."""
    t = torch.linspace(0, 1, _NODES, dtype=torch.double)
    tangent = flow.angles(t).cpu().tan()
    drowned = (tangent.amin(-1) >= _DROWNED).nonzero()
    last = int(drowned[0]) if len(drowned) else _NODES - 1
    clock = tangent[: last + 1].log().mean(-1)
    steps = max(1, math.ceil(float(clock[-1] - clock[0]) / -math.log(ratio)))
    wanted = torch.linspace(float(clock[-1]), float(clock[0]), steps + 1, dtype=torch.double)
    right = torch.searchsorted(clock, wanted).clamp(1, last)
    share = (wanted - clock[right - 1]) / (clock[right] - clock[right - 1])
    return t[right - 1] + share.clamp(0, 1) * (t[right] - t[right - 1])
