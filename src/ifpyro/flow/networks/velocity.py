r"""The velocity ``F(y, t)`` of a flow: its contract, a network that learns it, and one case where it is exact.

With the symbols of :mod:`ifpyro.flow.axes.schedule`, the flow is ``dy_j/dt = -theta_j'(t) F_j(y, t)`` and

.. math:: F(y, t) = E[\sin\theta\,x_0/s - \cos\theta\,n \mid y], \qquad y = \cos\theta\,x_0/s + \sin\theta\,n .
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..axes.basis import Basis
from ..axes.schedule import Angles


class Velocity(nn.Module, ABC):
    """The contract: any module with these two methods can drive a flow.

    What depends on time alone is separated from what depends on the state, because a fixed grid visits the same few
    times in every solve: the flow calls :meth:`embed` once for the grid and :meth:`forward` at every evaluation.
    Each row of the result must depend on its own row of ``y`` alone (no batch normalisation).
    """

    @abstractmethod
    def embed(self, t: Tensor) -> Tensor:
        """Features of the times ``t`` of shape ``(m,)`` (double precision, in ``[0, 1]``): shape ``(m, E)``."""

    @abstractmethod
    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Velocity ``F`` for ``y`` of shape ``(n, D)`` and an embedding of shape ``(n, E)`` or ``(E,)``."""

    def with_products(self, y: Tensor, embedding: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """``F`` and its directional derivatives ``F'(y) v``, by forward-mode differentiation.

        Args:
            y: states, ``(n, D)``.
            embedding: of their time, ``(E,)`` or ``(n, E)``.
            directions: ``v``, ``(p, n, D)``.

        Returns:
            ``F`` of shape ``(n, D)`` and the products, ``(p, n, D)``.
        """

        def product(direction: Tensor) -> tuple[Tensor, Tensor]:
            primal, tangent = torch.func.jvp(lambda state: self(state, embedding), (y,), (direction,))[:2]
            return primal, tangent

        values, products = torch.func.vmap(product)(directions)
        return values[0], products

    def attach(self, basis: Basis, angles: Angles) -> None:
        """Told by a flow, and by training before its first step, in which coordinates ``y`` is given.

        Args:
            basis: the axes of the data.
            angles: their angles.
        """

    def spec(self) -> dict[str, Any] | None:
        """Plain data that rebuilds this module in :func:`ifpyro.load`, or None if the user must pass it there."""
        return None


class FramedVelocity(Velocity):
    """A velocity that must know its axes: it remembers what :meth:`attach` was told."""

    def __init__(self) -> None:
        super().__init__()
        self._frame: tuple[Basis, Angles] | None = None  # in a tuple, where torch does not take it for a submodule

    def attach(self, basis: Basis, angles: Angles) -> None:
        """Remember the axes; see :meth:`Velocity.attach`."""
        self._frame = (basis, angles)

    def frame(self) -> tuple[Basis, Angles]:
        """The axes and their angles.

        Raises:
            RuntimeError: if no flow has told them.
        """
        if self._frame is None:
            raise RuntimeError(
                f"{type(self).__name__} works inside a flow: make one with ifpyro.fit(..., network=...) or "
                "ifpyro.from_denoiser"
            )
        return self._frame


class MLP(Velocity):
    """A residual multilayer perceptron whose output starts at zero, so that an untrained flow is a Gaussian.

    Each block computes ``h + W_2 silu((1 + a(t)) * (W_1 silu(h)) + b(t))``; scales ``a`` and shifts ``b`` come
    from angle features, ``sin`` and ``cos`` of multiples of ``t`` and its logarithm near the data end.

    The velocity has no constant and no linear part (the axes are standardised), so an axis that depends on no other and
    is symmetric shows itself in the third order of its own coordinate alone. Random hidden units hardly see it, and
    descent can stay where the axis is Gaussian; the inputs ``sin(2^k y_j)`` and ``cos(2^k y_j)``, if ``waves`` asks for
    them, see it at once, and fine structure sooner.

    Args:
        dim: number of axes ``D``.
        width: hidden units.
        blocks: residual blocks.
        dropout: probability of dropping a hidden unit in training.
        frequencies: number of harmonics of ``t``.
        waves: octaves of sines and cosines of every coordinate that the inlet sees beside the coordinate.
    """

    _rates: Tensor

    def __init__(
        self,
        dim: int,
        width: int = 128,
        blocks: int = 2,
        dropout: float = 0.0,
        frequencies: int = 8,
        waves: int = 0,
    ) -> None:
        super().__init__()
        if min(dim, width, blocks, frequencies) < 1 or waves < 0 or not 0 <= dropout < 1:
            raise ValueError(
                "MLP expects dim, width, blocks, frequencies >= 1, waves >= 0 and 0 <= dropout < 1, got dim="
                f"{dim}, width={width}, blocks={blocks}, frequencies={frequencies}, waves={waves}, dropout={dropout}"
            )
        self.dim, self.width, self.blocks = dim, width, blocks
        self.dropout_rate, self.frequencies, self.waves = dropout, frequencies, waves
        self.time = nn.Sequential(nn.Linear(2 * frequencies + 2, width), nn.SiLU())
        self.modulation = nn.Linear(width, width * (2 * blocks + 1))
        self.inlet = nn.Linear(dim * (1 + 2 * waves), width)
        self.register_buffer("_rates", 2.0 ** torch.arange(waves), persistent=False)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(blocks))
        self.outlet = nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def embed(self, t: Tensor) -> Tensor:
        """All that depends on time alone, the layers' biases included: ``(m, width * (2 blocks + 1))``.

        First the inlet's shift; then for every block its gain ``1 + a(t)`` and its shift ``(1 + a(t)) c_1 + b(t)``,
        ``c_1`` being the bias of ``W_1``.
        """
        k = torch.arange(1, self.frequencies + 1, device=t.device, dtype=t.dtype) * math.pi
        phase = t.unsqueeze(-1) * k
        near_data = 0.5 * torch.log(t + 1e-3).unsqueeze(-1)
        features = torch.cat([phase.sin(), phase.cos(), near_data, t.unsqueeze(-1)], -1)
        shift, *pairs = self.modulation(self.time(features.to(self.outlet.weight.dtype))).split(self.width, dim=-1)
        parts = [shift + self.inlet.bias]
        for a, b, first in zip(pairs[::2], pairs[1::2], self.first, strict=True):
            parts += [1 + a, (1 + a) * cast(nn.Linear, first).bias + b]
        return torch.cat(parts, -1)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Velocity ``F`` of shape ``(n, D)``."""
        shift, *pairs = embedding.split(self.width, dim=-1)
        h = _affine(shift, self._with_waves(y), self.inlet.weight)
        for gain, offset, first, second in self._blocks(pairs):
            inner = nn.functional.linear(nn.functional.silu(h), first)
            inner = nn.functional.silu(torch.addcmul(offset, inner, gain))
            if self.training and self.dropout_rate:
                inner = self.dropout(inner)
            h = _affine(h, inner, second)
        return _affine(self.outlet.bias, nn.functional.silu(h), self.outlet.weight)

    def with_products(self, y: Tensor, embedding: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Velocity.with_products`; written out, which spares small networks most of the overhead."""
        if self.training and self.dropout_rate:  # the dropped units must be the same ones in both
            return super().with_products(y, embedding, directions)
        linear = nn.functional.linear
        shift, *pairs = embedding.split(self.width, dim=-1)
        seen = self._with_waves(y)
        h = _affine(shift, seen, self.inlet.weight)
        dh = linear(self._tangents(seen, directions), self.inlet.weight)
        for gain, offset, first, second in self._blocks(pairs):
            active, slope = _silu_and_slope(h)
            inner, inner_slope = _silu_and_slope(torch.addcmul(offset, linear(active, first), gain))
            h = _affine(h, inner, second)
            dh = dh + linear(inner_slope * gain * linear(slope * dh, first), second)
        active, slope = _silu_and_slope(h)
        return _affine(self.outlet.bias, active, self.outlet.weight), linear(slope * dh, self.outlet.weight)

    def _with_waves(self, y: Tensor) -> Tensor:
        """``y`` followed by all ``sin(2^k y_j)`` and all ``cos(2^k y_j)``: ``(..., D (1 + 2 waves))``."""
        if not self.waves:
            return y
        phase = (y.unsqueeze(-1) * self._rates).flatten(-2)
        return torch.cat([y, phase.sin(), phase.cos()], -1)

    def _tangents(self, seen: Tensor, directions: Tensor) -> Tensor:
        """Directional derivatives of :meth:`_with_waves`, whose value is ``seen``."""
        if not self.waves:
            return directions
        turned = (directions.unsqueeze(-1) * self._rates).flatten(-2)
        sin, cos = seen[..., self.dim :].chunk(2, -1)
        return torch.cat([directions, cos * turned, -sin * turned], -1)

    def _blocks(self, pairs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Gain, shift and the two weight matrices of every block."""
        for gain, shift, first, second in zip(pairs[::2], pairs[1::2], self.first, self.second, strict=True):
            yield gain, shift, cast(nn.Linear, first).weight, cast(nn.Linear, second).weight

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "kind": "mlp",
            "dim": self.dim,
            "width": self.width,
            "blocks": self.blocks,
            "dropout": self.dropout_rate,
            "frequencies": self.frequencies,
            "waves": self.waves,
        }


def _affine(shift: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``shift + x W^T``, in one pass over the result where ``x`` is a matrix."""
    return torch.addmm(shift, x, weight.T) if x.ndim == 2 else shift + nn.functional.linear(x, weight)


def _silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x sigmoid(x)`` and its derivative."""
    gate = torch.sigmoid(x)
    active = x * gate
    return active, gate + active * (1 - gate)


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
