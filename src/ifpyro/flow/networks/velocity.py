r"""The velocity ``F(y, t)`` of a flow: the contract that every network fulfils.

With the symbols of :mod:`ifpyro.flow.axes.schedule`, the flow is ``dy_j/dt = -theta_j'(t) F_j(y, t)`` and

.. math:: F(y, t) = E[\sin\theta\,x_0/s - \cos\theta\,n \mid y], \qquad y = \cos\theta\,x_0/s + \sin\theta\,n .
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.basis import Basis
from ..axes.schedule import Angles


class Velocity(nn.Module, ABC):
    """The contract: any module with these two methods can drive a flow.

    What depends on time alone is separated from what depends on the state, because a fixed grid visits the same few
    times in every solve: the flow calls :meth:`embed` once for the grid and :meth:`forward` at every evaluation.
    Each row of the result must depend on its own row of ``y`` alone (no batch normalisation).

    Attributes:
        broadcasts: Whether :meth:`forward` and :meth:`with_products` also take ``y`` of shape ``(S, n, D)`` with an
            embedding ``(n, E)``, which spares conditional flows a copy of the embedding for each of ``S`` draws.

    Example:
        >>> class Gaussian(ifpyro.Velocity):
        ...     def embed(self, t):
        ...         return t.unsqueeze(-1)
        ...
        ...     def forward(self, y, embedding):
        ...         return torch.zeros_like(y)
        ...
        >>> gaussian = ifpyro.InflationaryFlow(flow.basis, ifpyro.Schedule.preserving(), Gaussian())
        >>> gaussian.log_prob(torch.zeros(2))
        tensor(-0.734)
    """

    broadcasts: bool = False

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

    def timed(self) -> "Velocity":
        """The velocity whose weights :meth:`embed` reads."""
        return self

    def of_rows(self, rows: Tensor) -> "Velocity":
        """The velocity of some rows of a batch, by their indices: itself, unless rows have conditions of their own."""
        return self

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
