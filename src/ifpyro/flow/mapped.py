"""What every flow has: axes, a discrete map over them, and how that is run."""

from typing import Any

import torch

from .axes.basis import Basis
from .axes.schedule import Angles
from .solver.discrete_map import DiscreteMap
from .solver.grid import Grid


def _switch(name: str, doc: str) -> Any:
    """A property that stands for a switch of the map."""

    def get(flow: "Mapped") -> Any:
        return getattr(flow.map.switches, name)

    def put(flow: "Mapped", value: Any) -> None:
        flow.map.switch(**{name: value})

    return property(get, put, doc=doc)


class Mapped:
    """Axes and a discrete map over them.

    Attributes:
        basis: The axes.
        map: The map, whose settings are this object's.
    """

    basis: Basis
    map: DiscreteMap

    @property
    def latent_dim(self) -> int:
        """Number of latent coordinates: the dimension of the unconstrained data."""
        return self.basis.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the flow's buffers."""
        return self.basis.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where the flow lives."""
        return self.basis.scale.device

    @property
    def angles(self) -> Angles:
        """The angles of the schedule on the flow's axes."""
        return self.map.angles

    @property
    def grid(self) -> Grid:
        """The fine solver grid, the map that *is* the model."""
        return self.map.grid

    @grid.setter
    def grid(self, grid: Grid) -> None:
        self.map.grid = grid

    @property
    def coarse_steps(self) -> int:
        """Steps of the cheap map used under ``ifpyro.fidelity("coarse")``."""
        return self.map.coarse_steps

    @coarse_steps.setter
    def coarse_steps(self, steps: int) -> None:
        self.map.coarse_steps = steps

    refinements = _switch("refinements", "Fixed-point iterations a step of the inverse.")
    exact_up_to = _switch("exact_up_to", "Axes up to which log-determinants are exact.")
    autocast = _switch("autocast", "Reduced precision of the network's products, or None.")
    gradient_checkpointing = _switch("gradient_checkpointing", "Whether gradients run every solver step again.")
    cuda_graphs = _switch("cuda_graphs", "Whether decodes on a GPU are recorded and played back.")
