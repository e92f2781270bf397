r"""Velocities that depend on a condition, ``F(y, t, c)``.

A condition enters a network where time does, by addition to the embedding:

.. math:: F(y, t, c) = F(y, e(t) + g(c)).

For a network whose embedding shifts its first layer and modulates every block, this is concatenation to the input and
modulation of every block at once. ``g(c)`` is computed once for a condition, whatever the solver.
"""

from typing import Any

import torch
from torch import Tensor

from ..axes.basis import Basis
from ..axes.schedule import Angles
from .shifts import Shift
from .velocity import Velocity


class ConditionalVelocity(Velocity):
    """A velocity and the module that turns conditions into shifts of its embedding.

    Args:
        inner: The velocity.
        shift: Of its embedding.
    """

    def __init__(self, inner: Velocity, shift: Shift) -> None:
        super().__init__()
        self.inner, self.shift, self.broadcasts = inner, shift, inner.broadcasts

    def timed(self) -> Velocity:
        """See :meth:`Velocity.timed`."""
        return self.inner.timed()

    def embed(self, t: Tensor) -> Tensor:
        """That of time alone."""
        return self.inner.embed(t)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Velocity for an embedding to which the shift has been added."""
        return self.inner(y, embedding)

    def with_products(self, y: Tensor, embedding: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Velocity.with_products`."""
        return self.inner.with_products(y, embedding, directions)

    def attach(self, basis: Basis, angles: Angles) -> None:
        """See :meth:`Velocity.attach`."""
        self.inner.attach(basis, angles)

    def spec(self) -> dict[str, Any]:
        """Of both parts, None where a part is its user's own."""
        return {"kind": "conditional", "inner": self.inner.spec(), "shift": self.shift.spec()}


class GivenVelocity(Velocity):
    """A velocity whose rows have conditions: one for all of them, or ``B`` in turn.

    Args:
        inner: The velocity of time and state.
        shift: Of its embedding, ``(E,)``, or ``(B, E)``: rows ``i``, ``i + B``, ... have the condition ``i``.
    """

    shift: Tensor

    def __init__(self, inner: Velocity, shift: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("shift", shift)
        # Of one condition that nobody differentiates, the sum is part of the solver's steps. Elsewhere it is made when
        # the velocity is evaluated, so that steps are shared by all conditions and remember no graph.
        self.settled = (
            shift.ndim == 1 and not shift.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(shift)
        )

    def timed(self) -> Velocity:
        """See :meth:`Velocity.timed`."""
        return self if self.settled else self.inner.timed()

    def of_rows(self, rows: Tensor) -> "GivenVelocity":
        """See :meth:`Velocity.of_rows`."""
        return self if self.shift.ndim == 1 else GivenVelocity(self.inner, self.shift[rows % len(self.shift)])

    def embed(self, t: Tensor) -> Tensor:
        """Of one settled condition, time and condition; otherwise time alone."""
        embedding = self.inner.embed(t)
        return embedding + self.shift if self.settled else embedding

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Velocity of rows ``(n, D)``, ``n`` a multiple of ``B``."""
        if self.settled:
            return self.inner(y, embedding)
        embedding = embedding + self.shift
        rows, repeated = self._arranged(y, embedding)
        return self.inner(rows, repeated).reshape(y.shape)

    def with_products(self, y: Tensor, embedding: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Velocity.with_products`."""
        if self.settled:
            return self.inner.with_products(y, embedding, directions)
        embedding = embedding + self.shift
        rows, repeated = self._arranged(y, embedding)
        along = directions.reshape(len(directions), *rows.shape)
        value, products = self.inner.with_products(rows, repeated, along)
        return value.reshape(y.shape), products.reshape(directions.shape)

    def spec(self) -> dict[str, Any] | None:
        """Of one condition: the inner velocity's."""
        inner = self.inner.spec()
        return (
            None if inner is None or self.shift.ndim > 1 else {"kind": "given", "size": len(self.shift), "inner": inner}
        )

    def _arranged(self, y: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and embeddings that fit each other."""
        if embedding.ndim == 1 or len(y) == len(embedding):
            return y, embedding
        if self.inner.broadcasts:  # never an embedding for each of many rows: they are far larger than states
            return y.unflatten(0, (-1, len(embedding))), embedding
        return y, embedding.repeat(len(y) // len(embedding), 1)
