"""The default network: a residual multilayer perceptron of state and time."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.arguments import is_integer, is_number
from .velocity import Velocity


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

    Example:
        >>> network = ifpyro.MLP(dim=2, width=32, blocks=1)
        >>> network(torch.randn(5, 2), network.embed(torch.tensor([0.5], dtype=torch.double)))
        tensor([[0., 0.],
                [0., 0.],
                [0., 0.],
                [0., 0.],
                [0., 0.]], grad_fn=<AddmmBackward0>)
    """

    broadcasts = True
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
        counts = all(is_integer(count, 1) for count in (dim, width, blocks, frequencies)) and is_integer(waves, 0)
        if not counts or not is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(
                "MLP expects integers dim, width, blocks, frequencies >= 1, waves >= 0 and a number 0 <= dropout < 1, "
                f"got dim={dim!r}, width={width!r}, blocks={blocks!r}, frequencies={frequencies!r}, waves={waves!r}, "
                f"dropout={dropout!r}"
            )
        dim, width, blocks, frequencies, waves = (int(count) for count in (dim, width, blocks, frequencies, waves))
        self.dim, self.width, self.blocks = dim, width, blocks
        self.dropout_rate, self.frequencies, self.waves = dropout, frequencies, waves
        linear = partial(nn.Linear, dtype=torch.float32)  # so that one seed draws the same under any default dtype
        self.time = nn.Sequential(linear(2 * frequencies + 2, width), nn.SiLU())
        self.modulation = linear(width, width * (2 * blocks + 1))
        self.inlet = linear(dim * (1 + 2 * waves), width)
        self.register_buffer("_rates", 2.0 ** torch.arange(waves, dtype=torch.float32), persistent=False)
        self.first = nn.ModuleList(linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(linear(width, width, bias=False) for _ in range(blocks))
        self.outlet = linear(width, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)
        self.to(torch.get_default_dtype())

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
