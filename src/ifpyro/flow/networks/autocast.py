"""Velocities evaluated in reduced precision, states kept in full.

The network's matrix products and convolutions run in, say, bfloat16, as torch's autocast arranges them; the state, the
rotation around the network and the sums of the solver stay in single precision (see
:class:`~ifpyro.flow.axes.basis.Basis`, which keeps autocast out of its products).
"""

import torch
from torch import Tensor

from .velocity import Velocity


class Autocast(Velocity):
    """Another velocity under autocast.

    Args:
        inner: the velocity.
        dtype: of its products.
    """

    def __init__(self, inner: Velocity, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype, self.broadcasts = inner, dtype, inner.broadcasts

    def of_rows(self, rows: Tensor) -> "Autocast":
        """Of the inner velocity's."""
        return Autocast(self.inner.of_rows(rows), self.dtype)

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
