"""Finished simulations: in memory, and in one file that survives a crash."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...core.files import read_tensors, write_tensors
from ..arrays import Array
from .result import SBC

if TYPE_CHECKING:
    from .sbc import Ranked

KIND = "sbc"
FIELDS = ("ranks", "truth", "mean", "sd", "ess")


class Records:
    """Rows by the number of their simulation.

    Args:
        seed: of the run they belong to.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.names: tuple[str, ...] = ()
        self._rows: dict[int, dict[str, Array]] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    @property
    def count(self) -> int:
        """How many are finished."""
        return len(self._rows)

    @property
    def first(self) -> int:
        """The lowest number among them."""
        return min(self._rows)

    def add(self, index: int, names: tuple[str, ...], row: "Ranked") -> None:
        """Take in one simulation.

        Raises:
            ValueError: if its quantities are others than before.
        """
        if self.names and names != self.names:
            raise ValueError(
                f"test quantities changed from {self.names} to {names}: every simulation must have the same "
                "parameters; if they come from a file, it belongs to another model"
            )
        self.names = names
        self._rows[index] = {name: np.asarray(getattr(row, name), dtype=np.float64) for name in FIELDS}

    def check(self, truth: Array) -> None:
        """Raises ``ValueError`` unless the first simulation had this truth."""
        before = self._rows[self.first]["truth"]
        if before.shape != truth.shape or not np.allclose(before, truth, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"the file holds simulations of another model, or of other arguments: simulation {self.first} of seed "
                f"{self.seed} had the truth {before}, now {truth}; choose another path, or delete the file"
            )

    def result(self, prob: float, most: int) -> SBC:
        """All simulations numbered below ``most``."""
        order = sorted(index for index in self._rows if index < most)
        columns: dict[str, Any] = {name: np.stack([self._rows[index][name] for index in order]) for name in FIELDS}
        return SBC(names=self.names, prob=prob, seed=self.seed, **columns)

    def save(self, path: str | Path) -> None:
        """Write all of it to one file, atomically."""
        order = sorted(self._rows)
        tensors = {name: torch.as_tensor(np.stack([self._rows[i][name] for i in order])) for name in FIELDS}
        tensors["index"] = torch.tensor(order)
        write_tensors(path, tensors, KIND, {"names": list(self.names), "seed": self.seed})

    @classmethod
    def load(cls, path: str | Path, seed: int) -> "Records":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is damaged, foreign, or of another seed.
        """
        tensors, header = read_tensors(path, KIND)
        if header["seed"] != seed:
            raise ValueError(f"{path} holds simulations of seed {header['seed']}, not {seed}; choose another path")
        records = cls(seed)
        records.names = tuple(header["names"])
        for row, index in enumerate(tensors["index"].tolist()):
            records._rows[index] = {name: tensors[name][row].numpy() for name in FIELDS}
        return records
