"""What a training uses unless told otherwise: the optimiser's numbers and the network, by the size of the data."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ..core.arguments import check_number, is_integer
from ..flow.axes.basis import Basis
from ..flow.axes.schedule import Angles
from ..flow.networks.mlp import MLP
from ..flow.networks.velocity import Velocity

_INLET = 3.0  # first weights, in torch's own: large samples of few dimensions have fine structure, seen sooner so


@dataclass(frozen=True)
class Recipe:
    """The optimiser's numbers, chosen from the size of the data by :meth:`for_data`.

    Attributes:
        max_steps: steps of the whole schedule of the learning rate.
        batch: rows a step.
        shared: rows that share one time (the time embedding is computed once for them).
        rate: peak learning rate of AdamW.
        weight_decay: of AdamW.
        average: decay of the moving average of the weights.
        patience: steps without a better validation loss after which training stops.
        check_every: steps between two validations.
        time_power: times are ``u^time_power``, ``u`` uniform: denser near the data end.
        matrix_rate: peak rate of the square matrices between hidden layers, of at most 128 rows, if their steps are to
            be orthogonal matrices; 0 leaves them to AdamW.

    Example:
        >>> recipe = ifpyro.Recipe(max_steps=1000, batch=128)
        >>> recipe.max_steps, recipe.rate
        (1000, 0.005)
    """

    max_steps: int = 16_000
    batch: int = 512
    shared: int = 8
    rate: float = 5e-3
    weight_decay: float = 1e-2
    average: float = 0.999
    patience: int = 16_000
    check_every: int = 200
    time_power: float = 1.5
    matrix_rate: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 0), ("shared", 1), ("patience", 0), ("check_every", 1)):
            if not is_integer(getattr(self, name), least):
                raise ValueError(f"Recipe: {name} expects an integer >= {least}, got {getattr(self, name)!r}")
        if not is_integer(self.batch, self.shared):
            raise ValueError(
                f"Recipe: batch expects an integer >= shared={self.shared} (rows that share a time), got {self.batch!r}"
            )
        check_number("Recipe: rate", self.rate, 0, open_at_least=True)
        check_number("Recipe: time_power", self.time_power, 0, open_at_least=True)
        check_number("Recipe: weight_decay", self.weight_decay, 0)
        check_number("Recipe: matrix_rate", self.matrix_rate, 0)
        check_number("Recipe: average", self.average, 0, 1)

    @classmethod
    def for_data(cls, rows: int, dim: int) -> "Recipe":
        """What worked across tables from 107 x 13 to 200,000 x 2: small tables take smaller, fewer steps.

        Large samples of few dimensions show fine structure, which is learnt at small angles.

        Example:
            >>> ifpyro.Recipe.for_data(rows=1000, dim=10).max_steps
            6000
        """
        if rows >= 5_000:
            return cls(rate=2e-3, time_power=3.0, matrix_rate=0.02) if dim <= 8 else cls(rate=2e-3)
        if rows >= 500:
            return cls(
                max_steps=6_000,
                batch=256,
                shared=4,
                rate=2e-3,
                weight_decay=0.3,
                patience=1_000,
                check_every=100,
            )
        return cls(max_steps=1_500, batch=256, shared=4, rate=1e-3, patience=600, check_every=50)


def default_network(rows: int, dim: int) -> dict[str, Any]:
    """Options of :class:`~ifpyro.flow.networks.mlp.MLP` for ``rows`` samples of ``dim`` columns."""
    small = dim <= 8
    width = 64 if small else 128 if dim <= 128 else 256
    if rows >= 5_000:
        return {"dim": dim, "width": width, "blocks": 3 if small else 2, "dropout": 0.0}
    if rows >= 500:
        return {"dim": dim, "width": width, "blocks": 3 if small else 2, "dropout": 0.3}
    return {"dim": dim, "width": max(width, 128), "blocks": 1, "dropout": 0.5}


def make_network(network: Velocity | dict[str, Any] | None, rows: int, basis: Basis, angles: Angles) -> Velocity:
    """The default network, with options, or a copy of the user's own after a look at what it returns."""
    dim = basis.dim
    if network is None or isinstance(network, dict):
        options = {**default_network(rows, dim), **(network or {})}
        try:
            made = MLP(**options).to(basis.scale)
        except TypeError as error:
            raise ValueError(f"network expects options of MLP {sorted(default_network(rows, dim))}: {error}") from error
        if rows >= 5_000 and dim <= 8:
            with torch.no_grad():
                made.inlet.weight.mul_(_INLET)
                made.inlet.bias.mul_(_INLET)
        return made
    if not isinstance(network, Velocity):
        raise TypeError(
            "network expects an ifpyro.flow.networks.velocity.Velocity or options for MLP, got "
            f"{type(network).__name__}"
        )
    network = copy.deepcopy(network).requires_grad_(True).train().to(basis.scale)
    network.attach(basis, angles)
    with torch.no_grad():
        out = network(basis.scale.new_zeros(2, dim), network.embed(basis.scale.new_full((2,), 0.5, dtype=torch.double)))
    if out.shape != (2, dim):
        raise ValueError(f"network expects to map (n, {dim}) to (n, {dim}), got {tuple(out.shape)} for n = 2")
    return network
