"""Finished simulations: in memory, and in one file that survives a crash."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...core.files import read_tensors, reading, write_tensors
from ..arrays import Array
from .result import SBC

KIND = "sbc"
FIELDS = ("ranks", "truth", "mean", "sd", "ess")


class Ranked(NamedTuple):
    """One simulation, ready to be kept."""

    names: tuple[str, ...]
    ranks: Array
    truth: Array
    mean: Array
    sd: Array
    ess: float


class Records:
    """Rows by the number of their simulation.

    Args:
        seed: of the run they belong to.
        engine: what the engine calls itself.
    """

    def __init__(self, seed: int, engine: str = "") -> None:
        self.seed, self.engine = seed, engine
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

    def add(self, index: int, names: tuple[str, ...], row: Ranked) -> None:
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

    def check(self, run: Callable[[int], "Ranked"], engine: str, alone: bool) -> None:
        """Refuse to go on from these simulations unless the first one, made again, comes out as it did.

        Its truth shows another model, other arguments or other data, since the log-likelihood is part of it; its
        posterior another engine. An engine of the same name whose draws depend on more than the seed need only agree
        within Monte Carlo error.

        Args:
            run: makes a simulation.
            engine: what the engine now calls itself.
            alone: whether a simulation does not depend on those made with it.

        Raises:
            ValueError: if model or engine are others.
        """
        row, name = self._rows[self.first], f"simulation {self.first} of seed {self.seed}"
        again = run(self.first)
        advice = "choose another path, or delete the file"
        truth = np.asarray(again.truth)
        if row["truth"].shape != truth.shape or not np.allclose(row["truth"], truth, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"the file holds simulations of another model, or of other arguments: {name} had the truth "
                f"{row['truth']}, now {truth}; {advice}"
            )
        if _same(row, new := _numbers(again)):
            return
        repeatable = alone and _same(new, _numbers(run(self.first)))
        if repeatable or engine != self.engine or not _agree(row, new):
            raise ValueError(
                f"the file holds simulations of another engine: {self.engine or 'one without a name'} gave {name} the "
                f"posterior mean {row['mean']}, {engine} gives {new['mean']}; {advice}"
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
        write_tensors(path, tensors, KIND, {"names": list(self.names), "seed": self.seed, "engine": self.engine})

    @classmethod
    def load(cls, path: str | Path, seed: int) -> "Records":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is damaged, foreign, or of another seed.
        """
        tensors, header = read_tensors(path, KIND)
        with reading(path, "simulations"):
            if header["seed"] != seed:
                raise ValueError(f"{path} holds simulations of seed {header['seed']}, not {seed}; choose another path")
            records = cls(seed, str(header.get("engine", "")))
            records.names = tuple(map(str, header["names"]))
            indices, rows, count = tensors["index"].tolist(), len(tensors["index"]), len(records.names)
            for field in FIELDS:
                wanted = (rows,) if field == "ess" else (rows, count)
                if tensors[field].shape != wanted or not bool(tensors[field].isfinite().all()):
                    raise ValueError(f"{path} is damaged: {field!r} must hold {wanted} finite numbers")
            for row, index in enumerate(indices):
                records._rows[int(index)] = {name: tensors[name][row].numpy() for name in FIELDS}
        return records


def _numbers(row: "Ranked") -> dict[str, Array]:
    return {name: np.asarray(getattr(row, name), dtype=np.float64) for name in ("mean", "sd", "ess")}


def _same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return all(np.allclose(a[name], b[name], rtol=1e-3, atol=1e-6) for name in ("mean", "sd", "ess"))


def _agree(a: dict[str, Array], b: dict[str, Array]) -> bool:
    """Whether two posteriors of one data set agree within six standard errors."""
    share = 1 / np.maximum(a["ess"], 2) + 1 / np.maximum(b["ess"], 2)
    sd = np.maximum(a["sd"], b["sd"])
    means = np.abs(a["mean"] - b["mean"]) <= 6 * sd * np.sqrt(share)
    spreads = np.abs(a["sd"] - b["sd"]) <= 6 * sd * np.sqrt(share / 2)
    return bool((means & spreads).all())
