r"""Toy data whose density is known: noisy curves in the plane and noisy surfaces in space.

Every set is a curve ``c`` that is run through at random and blurred by noise of standard deviation ``sigma``, so that
its density is an integral over one parameter,

.. math:: p(x) = \int_0^1 N(x;\, c(u),\, \sigma^2 I) \, du ,

which a quadrature with four nodes on every ``sigma`` of arc length gives to better than 1e-10 nats within eight
``sigma`` of the curve. In space, the curve is drawn out along the second axis by a uniform variable, whose noisy
density is a difference of two normal distribution functions. The sine is the exception: noise on its second axis
alone, so a closed form, with hard edges.

These are the five sets of de Albuquerque & Pearson (2024, appendix B.4), with their noise levels as defaults.
``moons``, ``circles``, ``s_curve`` and ``swirl`` agree in distribution with scikit-learn's ``make_moons``,
``make_circles``, ``make_s_curve`` and ``make_swiss_roll``.

>>> moons = ifpyro.datasets.moons().unit_variance()
>>> x = moons.sample(20_000, seed=0)
>>> float(moons.log_prob(x).mean())
-1.609926842279656
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.arguments import check_seed

_NODES_PER_NOISE = 4
_PANEL = 16  # Gauss nodes on one panel of an open arc
_PAIRS = 2_000_000  # distances between rows and nodes that are held in memory at once


class ToySet(ABC):
    """A distribution that can be sampled and has an exact log-density.

    Attributes:
        dim: number of coordinates ``D``.
        mean: exact mean, ``(D,)``, double precision.
        covariance: exact covariance, ``(D, D)``, double precision.

    Example:
        >>> moons = ifpyro.datasets.moons()
        >>> moons.dim, moons.mean
        (2, tensor([0.500, 0.250], dtype=torch.float64))
    """

    dim: int
    mean: Tensor
    covariance: Tensor

    def sample(self, n: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` independent draws, ``(n, D)``; the same for the same seed.

        Example:
            >>> ifpyro.datasets.moons().sample(3, seed=0)
            tensor([[ 2.047,  0.426],
                    [ 1.581, -0.258],
                    [ 0.823, -0.456]])
        """
        return self._draw(n, torch.Generator().manual_seed(check_seed(seed))).to(dtype)

    def unit_variance(self, scale: Sequence[float] | None = None) -> "ToySet":
        """The same set, centred, with every coordinate at standard deviation one (by its exact moments).

        Args:
            scale: standard deviations of the coordinates instead of ones.

        Example:
            >>> ifpyro.datasets.moons().unit_variance().covariance.diagonal()
            tensor([1.000, 1.000], dtype=torch.float64)
        """
        wanted = torch.ones(self.dim, dtype=torch.double) if scale is None else torch.tensor(scale, dtype=torch.double)
        if wanted.shape != (self.dim,) or not bool((wanted > 0).all()):
            raise ValueError(f"unit_variance expects a scale of {self.dim} positive numbers, got {scale}")
        return _Rescaled(self, self.mean, self.covariance.diagonal().sqrt() / wanted)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density in nats for ``x`` of shape ``(*batch, D)``: ``(*batch,)``, double precision.

        Raises:
            ValueError: if the last dimension of ``x`` is not ``D``.

        Example:
            >>> ifpyro.datasets.circles().log_prob(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
            tensor([ -0.923, -17.011], dtype=torch.float64)
        """
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"log_prob expects points of shape (*batch, {self.dim}), got {tuple(x.shape)}")
        return self._log_density(x.double().reshape(-1, self.dim)).reshape(x.shape[:-1])

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """The Gaussian mixture that a plane curve is to 1e-6 nats: weights ``(K,)``, means, covariances ``(K, 2, 2)``.

        With it, everything that is exact for a Gaussian mixture is exact for the set.

        Raises:
            ValueError: for sets with hard edges (the sine), or in space.

        Example:
            >>> weights, means, covariances = ifpyro.datasets.moons(noise=0.3).mixture()
            >>> exact = ifpyro.InflationaryFlow.from_gaussian_mixture(weights, means, covariances)
            >>> exact.log_prob(torch.zeros(2, dtype=torch.double))
            tensor(-1.713, dtype=torch.float64)
            >>> ifpyro.datasets.moons(noise=0.3).log_prob(torch.zeros(2))
            tensor(-1.712, dtype=torch.float64)
        """
        raise ValueError("mixture expects a curve in the plane with noise on both coordinates: circles or moons")

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n, D)``, double precision."""

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """``(n,)`` for ``x`` of shape ``(n, D)``."""


@dataclass(frozen=True)
class Arc:
    """One stretch of a plane curve: ``point`` takes ``u`` in ``[0, 1]``, shape ``(m,)``, to ``(m, 2)``.

    Attributes:
        point: the curve.
        length: its arc length, or a bound on it, which sets the number of nodes.
        closed: whether it ends where it began: equidistant nodes are then best, and otherwise Gauss's, on panels.
    """

    point: Callable[[Tensor], Tensor]
    length: float
    closed: bool = False

    def quadrature(self, nodes: int) -> tuple[Tensor, Tensor]:
        """At least so many nodes ``(m, 2)``, and weights ``(m,)``, that integrate over ``u``."""
        if self.closed:
            u = torch.arange(nodes, dtype=torch.double) / nodes
            return self.point(u), torch.full((nodes,), 1 / nodes, dtype=torch.double)
        panels = math.ceil(nodes / _PANEL)
        roots, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(_PANEL))
        u = (torch.arange(panels, dtype=torch.double).unsqueeze(1) + (roots + 1) / 2) / panels
        return self.point(u.flatten()), (weights / (2 * panels)).repeat(panels)


class NoisyCurve(ToySet):
    """Plane arcs, equally likely, each run through uniformly in its parameter, with noise on both coordinates.

    Args:
        arcs: the pieces of the curve.
        noise: standard deviation of the noise, positive.
    """

    dim = 2

    def __init__(self, arcs: Sequence[Arc], noise: float) -> None:
        self.noise = _positive("noise", noise)
        self.arcs = tuple(arcs)
        nodes, weights = self.nodes(_NODES_PER_NOISE)
        self.mean = weights @ nodes
        centred = nodes - self.mean
        self.covariance = centred.T @ (weights.unsqueeze(1) * centred) + self.noise**2 * torch.eye(2).double()
        self._nodes, self._log_weights = nodes, weights.log()

    def nodes(self, per_noise: float) -> tuple[Tensor, Tensor]:
        """Points on the curve ``(m, 2)`` and weights ``(m,)``: about ``per_noise`` for every ``sigma`` of length.

        The Gaussian mixture with these centres, weights and covariances ``sigma^2 I`` is the set itself, to the
        accuracy of the quadrature.
        """
        rules = [arc.quadrature(max(16, math.ceil(per_noise * arc.length / self.noise))) for arc in self.arcs]
        return torch.cat([p for p, _ in rules]), torch.cat([w for _, w in rules]) / len(rules)

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Equal covariances ``sigma^2 I`` about :meth:`nodes`."""
        nodes, weights = self.nodes(1.5)
        return weights, nodes, (self.noise**2 * torch.eye(2, dtype=torch.double)).expand(len(nodes), 2, 2)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, generator=generator, dtype=torch.double)
        which = torch.randint(len(self.arcs), (n,), generator=generator)
        x = self.noise * torch.randn(n, 2, generator=generator, dtype=torch.double)
        for k, arc in enumerate(self.arcs):
            x[which == k] += arc.point(u[which == k])
        return x

    def _log_density(self, x: Tensor) -> Tensor:
        nodes, log_weights = self._nodes.to(x.device), self._log_weights.to(x.device)
        parts = []
        for rows in x.split(max(1, _PAIRS // len(nodes))):
            square = (rows[:, :1] - nodes[:, 0]).square() + (rows[:, 1:] - nodes[:, 1]).square()
            parts.append(torch.logsumexp(log_weights - 0.5 * square / self.noise**2, 1))
        return torch.cat(parts) - math.log(2 * math.pi * self.noise**2)


class NoisyStrip(ToySet):
    """A plane curve drawn out along a second axis by ``U(0, width)``; the same noise on all three coordinates.

    Args:
        curve: the curve in the first and third coordinate, with its noise.
        width: extent along the second coordinate.
    """

    dim = 3

    def __init__(self, curve: NoisyCurve, width: float) -> None:
        self.curve, self.width = curve, _positive("width", width)
        self.mean = torch.tensor([curve.mean[0], width / 2, curve.mean[1]], dtype=torch.double)
        self.covariance = torch.zeros(3, 3, dtype=torch.double)
        self.covariance[::2, ::2] = curve.covariance
        self.covariance[1, 1] = width**2 / 12 + curve.noise**2

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        plane = self.curve._draw(n, generator)
        across = self.width * torch.rand(n, generator=generator, dtype=torch.double)
        across += self.curve.noise * torch.randn(n, generator=generator, dtype=torch.double)
        return torch.stack([plane[:, 0], across, plane[:, 1]], -1)

    def _log_density(self, x: Tensor) -> Tensor:
        # P(a < N < b) from the tails on the side where they are small, so that nothing cancels outside the strip.
        from_middle = (x[:, 1] - self.width / 2).abs()
        near = (from_middle - self.width / 2) / self.curve.noise
        far = (from_middle + self.width / 2) / self.curve.noise
        log_near, log_far = torch.special.log_ndtr(-near), torch.special.log_ndtr(-far)
        across = log_near + torch.log(-torch.expm1(log_far - log_near)) - math.log(self.width)
        return self.curve._log_density(x[:, ::2]) + across


class Sine(ToySet):
    """``x ~ U(-1, 1)``, ``y = sin(4 pi x)/4 + noise``: four periods, with noise on the second coordinate alone."""

    dim = 2

    def __init__(self, noise: float) -> None:
        self.noise = _positive("noise", noise)
        self.mean = torch.zeros(2, dtype=torch.double)
        # E[x sin(4 pi x)] over U(-1, 1) is -1/(4 pi)
        shared = -1 / (16 * math.pi)
        self.covariance = torch.tensor([[1 / 3, shared], [shared, 1 / 32 + noise**2]], dtype=torch.double)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        x = 2 * torch.rand(n, generator=generator, dtype=torch.double) - 1
        noise = self.noise * torch.randn(n, generator=generator, dtype=torch.double)
        return torch.stack([x, torch.sin(4 * math.pi * x) / 4 + noise], -1)

    def _log_density(self, x: Tensor) -> Tensor:
        residual = (x[:, 1] - torch.sin(4 * math.pi * x[:, 0]) / 4) / self.noise
        density = -0.5 * residual.square() - 0.5 * math.log(2 * math.pi * self.noise**2) - math.log(2)
        return torch.where(x[:, 0].abs() <= 1, density, -math.inf)


class _Rescaled(ToySet):
    """``(x - shift) / unit`` for ``x`` of another set."""

    def __init__(self, inner: ToySet, shift: Tensor, unit: Tensor) -> None:
        self.inner, self.shift, self.unit, self.dim = inner, shift, unit, inner.dim
        self.mean = (inner.mean - shift) / unit
        self.covariance = inner.covariance / unit / unit.unsqueeze(1)

    def mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """That of the inner set, moved along."""
        weights, means, covariances = self.inner.mixture()
        return weights, (means - self.shift) / self.unit, covariances / self.unit / self.unit.unsqueeze(1)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        return (self.inner._draw(n, generator) - self.shift) / self.unit

    def _log_density(self, x: Tensor) -> Tensor:
        shift, unit = self.shift.to(x.device), self.unit.to(x.device)
        return self.inner._log_density(x * unit + shift) + unit.log().sum()


def circles(noise: float = 0.08, factor: float = 0.5) -> NoisyCurve:
    """Two circles about the origin, of radius 1 and ``factor``.

    Example:
        >>> ifpyro.datasets.circles().sample(1000, seed=0).norm(dim=1).mean()
        tensor(0.744)
    """
    factor = _positive("factor", factor)
    return NoisyCurve([Arc(_circle(radius), 2 * math.pi * radius, closed=True) for radius in (1.0, factor)], noise)


def moons(noise: float = 0.08) -> NoisyCurve:
    """Two interleaving half circles of radius 1, about (0, 0) and (1, 1/2).

    Example:
        >>> moons = ifpyro.datasets.moons(noise=0.1)
        >>> x = moons.sample(1000, seed=0)
        >>> moons.log_prob(x).mean()
        tensor(-1.008, dtype=torch.float64)
    """

    def upper(u: Tensor) -> Tensor:
        return torch.stack([torch.cos(math.pi * u), torch.sin(math.pi * u)], -1)

    def lower(u: Tensor) -> Tensor:
        return torch.stack([1 - torch.cos(math.pi * u), 0.5 - torch.sin(math.pi * u)], -1)

    return NoisyCurve([Arc(upper, math.pi), Arc(lower, math.pi)], noise)


def sine(noise: float = 0.15) -> Sine:
    """Four periods of a sine of amplitude 1/4 over ``[-1, 1]``, with noise on the second coordinate alone.

    Example:
        >>> ifpyro.datasets.sine().log_prob(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([0.285,   -inf], dtype=torch.float64)
    """
    return Sine(noise)


def s_curve(noise: float = 0.2) -> NoisyStrip:
    """An S in the first and third coordinate, two units wide.

    Example:
        >>> ifpyro.datasets.s_curve().sample(1000, seed=0).std(0)
        tensor([0.736, 0.612, 1.401])
    """

    def upper(u: Tensor) -> Tensor:
        t = -1.5 * math.pi * u
        return torch.stack([torch.sin(t), 1 - torch.cos(t)], -1)

    # Two arcs, since their curvatures jump where they meet.
    halves = [Arc(upper, 1.5 * math.pi), Arc(lambda u: -upper(u), 1.5 * math.pi)]
    return NoisyStrip(NoisyCurve(halves, noise), 2.0)


def swirl(noise: float = 1.25) -> NoisyStrip:
    """A spiral in the first and third coordinate (the Swiss roll), 21 units wide.

    Example:
        >>> ifpyro.datasets.swirl().sample(1000, seed=0).std(0)
        tensor([6.551, 6.192, 7.243])
    """

    def spiral(u: Tensor) -> Tensor:
        t = 1.5 * math.pi * (1 + 2 * u)
        return torch.stack([t * torch.cos(t), t * torch.sin(t)], -1)

    return NoisyStrip(NoisyCurve([Arc(spiral, 3 * math.pi * 4.5 * math.pi)], noise), 21.0)


def paper() -> dict[str, ToySet]:
    """The seven toy sets of the paper by name: five at unit variance, and the two in space with half the width.

    Source: de Albuquerque & Pearson 2024, section 6.1 and appendix C.2.

    Example:
        >>> list(ifpyro.datasets.paper())
        ['circles', 'sine', 'moons', 'S-curve', 'swirl', 'S-curve, flat', 'swirl, flat']
    """
    flat = (1.0, 0.5, 1.0)
    return {
        "circles": circles().unit_variance(),
        "sine": sine().unit_variance(),
        "moons": moons().unit_variance(),
        "S-curve": s_curve().unit_variance(),
        "swirl": swirl().unit_variance(),
        "S-curve, flat": s_curve().unit_variance(flat),
        "swirl, flat": swirl().unit_variance(flat),
    }


def _circle(radius: float) -> Callable[[Tensor], Tensor]:
    return lambda u: radius * torch.stack([torch.cos(2 * math.pi * u), torch.sin(2 * math.pi * u)], -1)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} expects a positive number, got {value!r}")
    return float(value)
