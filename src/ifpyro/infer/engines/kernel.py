"""What the driver asks of a kernel: four verbs, all of them for a whole batch of chains."""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...core.arguments import check_level
from ...flow.solver.fidelity import Level
from ..model.batched import check_model
from ..model.density import BatchedDensity
from .guided_density import Target, Value
from .smc import SMC

SHORT = 20
"""Warm-ups shorter than this renew nothing on the way."""

S = TypeVar("S")
"""What the kernel's chains carry."""

Stats = dict[str, Tensor]
"""Statistics of one draw of every chain, each ``(chains,)``, by name."""


class Kernel(ABC, Generic[S]):
    """A Markov kernel over a model, for many chains at once.

    Args:
        model: the Pyro model.
        level: fidelity of the guide; chosen by measurement if ``None``.

    Raises:
        TypeError: if ``model`` is not callable.
        ValueError: for a level that there is not.
    """

    finds_starts = False
    """Whether prior draws are good enough to start from."""

    def __init__(self, model: Any, level: Level | None) -> None:
        check_model(model, type(self).__name__)
        check_level(level)
        self.model = model
        self.level = level

    def suited_to(self, density: BatchedDensity) -> "Kernel[Any]":
        """The kernel that samples this density: itself, or one made for its structure."""
        return self

    def check(self, density: BatchedDensity) -> None:
        """Raises ``ValueError`` for a density that the kernel cannot sample; asked before any work is done."""

    @abstractmethod
    def begin(
        self, target: Target, q: Tensor, generator: torch.Generator, warmup_steps: int, particles: SMC | None
    ) -> S:
        """Forget earlier runs and place the chains at ``q``, ``(chains, dim)``.

        Args:
            target: the model's density.
            q: where the chains start.
            generator: source of all randomness.
            warmup_steps: how many calls of `warm_up` will follow.
            particles: the SMC run the starts come from, if they do.
        """

    @staticmethod
    def settle(target: Target, q: Tensor, warmup_steps: int, particles: SMC | None) -> Value:
        """The fine density at the starts ``q``, and a guide that chains can leave them with.

        Far from the posterior a guide can be wrong by any amount, and a chain at a point that the guide finds
        much worse than the fine density does would never leave: from starts of unknown quality, use the fine
        density until the kernel first renews its guide.
        """
        fine = target.fine(q)
        if particles is None and warmup_steps >= SHORT and not target.one_level:
            target.level = "fine"
        else:
            target.choose_level(q, fine)
        return fine

    @abstractmethod
    def warm_up(self, state: S, step: int) -> tuple[S, Stats]:
        """One transition that may tune the kernel; ``step`` counts from 0."""

    @abstractmethod
    def freeze(self, state: S) -> S:
        """End all tuning: from here on the kernel is one fixed Markov kernel."""

    @abstractmethod
    def draw(self, state: S) -> tuple[S, Stats]:
        """One transition of the frozen kernel."""

    @abstractmethod
    def positions(self, state: S) -> Tensor:
        """Where the chains stand, ``(chains, dim)``."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """Scalar facts for the result's ``attributes``."""
