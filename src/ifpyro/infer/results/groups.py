"""Named arrays with names for their axes: groups of an ArviZ object as xarray datasets.

An axis takes its name from the caller's ``dims``, else from the plate it belongs to, else
``<variable>_dim_<axis>``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray

SAMPLE = ("chain", "draw")
Plates = Mapping[str, Mapping[int, str]]
"""Variable -> axis -> plate name."""


def plain_name(name: str) -> str:
    """A site's name as files and ArviZ allow it: the slashes of scopes become dots, and a site that bears the name of
    ArviZ's own dimensions gets an underscore."""
    name = name.replace("/", ".")
    return f"{name}_" if name in SAMPLE else name


class Groups:
    """Datasets by group name, under one choice of dimensions and coordinates."""

    def __init__(
        self,
        dims: Mapping[str, Sequence[str | None]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.dims = {
            plain_name(name): [asked] if isinstance(asked, str) else list(asked) for name, asked in (dims or {}).items()
        }
        self.coords = dict(coords or {})
        self.datasets: dict[str, xarray.Dataset] = {}

    def add(
        self,
        group: str,
        arrays: Mapping[str, np.ndarray],
        lead: tuple[str, ...] = (),
        plates: Plates | None = None,
        batch_only: bool = False,
    ) -> None:
        """Add a group, unless there is nothing to put in it.

        Args:
            group: the group's name.
            arrays: variable -> array whose first axes are ``lead``.
            lead: names of the first axes.
            plates: which of the other axes are plates, counted without ``lead``.
            batch_only: the arrays lack the event axes that ``dims`` may name, as log-likelihoods do.

        Raises:
            ValueError: if ``dims`` or ``coords`` do not fit an array.
        """
        if not arrays:
            return
        arrays = {plain_name(name): array for name, array in arrays.items()}
        plates = {
            plain_name(name): {axis: plain_name(plate) for axis, plate in axes.items()}
            for name, axes in (plates or {}).items()
        }
        # A dimension that bears the name of a variable would be taken for its coordinate.
        taken = {*lead, *arrays}
        sizes: dict[str, int] = {}
        variables = {}
        for name, array in arrays.items():
            first, shape = lead[: array.ndim], array.shape[len(lead) :]
            axes: list[str | None] = []
            for axis, size in enumerate(shape):
                plate = plates.get(name, {}).get(axis)
                fits = plate is not None and plate not in taken | set(axes) and sizes.get(plate, size) == size
                axes.append(plate if fits else None)
            names = [*first, *self._named(name, axes, batch_only)]
            for dim, size in zip(names, array.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"dimension {dim!r} has size {size} in {name!r} but {sizes[dim]} before in "
                        f"{group!r}: give it another name in dims"
                    )
            variables[name] = (names, array)
        coords = {dim: self._labels(dim, size, group) for dim, size in sizes.items()}
        self.datasets[group] = xarray.Dataset(variables, coords=coords)

    def check_names(self) -> None:
        """Raise a ValueError if ``dims`` or ``coords`` name what no group has."""
        variables = {str(name) for data in self.datasets.values() for name in data.data_vars}
        dimensions = {str(name) for data in self.datasets.values() for name in data.dims}
        for what, asked, known in (("dims", self.dims, variables), ("coords", self.coords, dimensions)):
            unknown = sorted(set(asked) - known)
            if unknown:
                raise ValueError(f"{what} has entries for {unknown}, but what there is to name is {sorted(known)}")

    def _named(self, name: str, axes: list[str | None], batch_only: bool) -> list[str]:
        asked = self.dims.get(name)
        if asked is not None:
            free = [axis for axis, old in enumerate(axes) if old is None]
            if len(asked) == len(axes) or (batch_only and len(asked) > len(axes)):
                axes = [old if new is None else new for old, new in zip(axes, asked, strict=False)]
            elif len(asked) == len(free):
                for axis, new in zip(free, asked, strict=True):
                    axes[axis] = new
            elif not batch_only:
                raise ValueError(
                    f"dims[{name!r}] must name its {len(axes)} axes, or the {len(free)} that no plate names, "
                    f"got {asked}"
                )
        return [f"{name}_dim_{axis}" if dim is None else dim for axis, dim in enumerate(axes)]

    def _labels(self, dim: str, size: int, group: str) -> np.ndarray:
        labels = np.asarray(self.coords.get(dim, np.arange(size)))
        if labels.shape == (size,):
            return labels
        if "predictions" in group:
            return np.arange(size)  # new data need not have as many rows as the labels were made for
        raise ValueError(f"coords[{dim!r}] must have {size} labels in group {group!r}, got shape {labels.shape}")
