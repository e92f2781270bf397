"""Velocities evaluated in reduced precision, states kept in full; and single precision that is not cut short.

The network's matrix products and convolutions run in, say, bfloat16, as torch's autocast arranges them; the state, the
rotation around the network and the sums of the solver stay in single precision (see
:class:`~ifpyro.flow.axes.basis.Basis`, which keeps autocast out of its products).

On NVIDIA GPUs torch by itself evaluates convolutions of single precision in TF32, to ten bits. That is too coarse to
tell whether draws in a batch are what they are alone, to invert a map to rounding, or to choose a solver's steps; a
network whose errors do not matter so much is better served by an autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from ..flow.networks.velocity import Velocity


class Autocast(Velocity):
    """Another velocity under autocast.

    Args:
        inner: the velocity.
        dtype: of its products.
    """

    def __init__(self, inner: Velocity, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def embed(self, t: Tensor) -> Tensor:
        """In full precision: once for a grid."""
        return self.inner.embed(t)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Velocity in the dtype of ``y``."""
        with torch.autocast(y.device.type, dtype=self.dtype):
            return self.inner(y, embedding).to(y.dtype)

    def with_products(self, y: Tensor, embedding: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the inner velocity, in reduced precision too: of the map that is evaluated."""
        with torch.autocast(y.device.type, dtype=self.dtype):
            value, products = self.inner.with_products(y, embedding, directions)
        return value.to(y.dtype), products.to(y.dtype)

    def extra_repr(self) -> str:
        """The dtype."""
        return str(self.dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in the precision of their arguments, and their gradients if taken within; torch's setting, which
    all threads share, comes back afterwards.

    Also a decorator. Matrix products are in full precision by torch's default, which is the user's to change.
    """
    cudnn: Any = torch.backends.cudnn
    settings: list[tuple[Any, str, Any, Any]] = []  # each with its full value and that before
    with suppress(RuntimeError):  # it was set by the attribute that newer versions of torch have; the two do not mix
        settings.append((cudnn, "allow_tf32", False, cudnn.allow_tf32))
    if hasattr(cudnn, "conv"):  # the first changes the second, which has the last word
        settings.append((cudnn.conv, "fp32_precision", "ieee", cudnn.conv.fp32_precision))
    for owner, name, full, _ in settings:
        setattr(owner, name, full)
    try:
        yield
    finally:
        for owner, name, _, before in settings:
            setattr(owner, name, before)
