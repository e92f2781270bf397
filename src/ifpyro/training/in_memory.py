"""What a training needs to know of its data, and samples that are in memory."""

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from ..data.samples import check_trainable, split, to_unconstrained
from ..flow.axes.basis import Basis, kind_for
from .rows import Rows, RowsInMemory


class Data(Protocol):
    """Data to train on, and to hold out."""

    count: int
    """Training rows."""
    event_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    held_out: Tensor
    """Validation rows, ``(n, *event)``."""
    kept: Tensor
    """Training rows to measure on, ``(n, *event)``: all there are in memory, some of those that are not."""
    first: Tensor
    """The first few rows, ``(n, *event)``, where there are not enough held-out ones to measure on."""

    def basis(self, own_units: bool | None, kind: str) -> Basis:
        """The axes of the unconstrained training rows, of a kind of :meth:`~ifpyro.flow.axes.basis.Basis.choose`."""
        ...

    def rows(self, basis: Basis) -> Rows:
        """The training rows on those axes."""
        ...

    def held_out_rows(self, basis: Basis) -> Tensor:
        """The validation rows on those axes, ``(n, D)``."""
        ...

    def fingerprint(self) -> str:
        """A digest that tells other data apart."""
        ...


class InMemory:
    """Samples in memory, ``(N, *event)``; see :class:`Data`."""

    def __init__(self, x: Tensor, validation: Any, support: Constraint | None, generator: torch.Generator) -> None:
        if support is not None:
            to_unconstrained(x, support)  # refuses rows outside by the indices that the caller knows
        self.event_shape, self.dtype, self.device = x.shape[1:], x.dtype, x.device
        self.first = x[:256]
        self.kept, self.held_out = split(x, validation, generator)
        self._train = free_rows(self.kept, support, "x")
        self._free_shape = free_shape(self.first, support)
        self._held_out = free_rows(self.held_out, support, "validation")
        self.count = len(self._train)

    def basis(self, own_units: bool | None, kind: str) -> Basis:
        """See :meth:`Data.basis`."""
        kind = kind_for(kind, self._train.shape[1], self._free_shape)
        check_trainable(self._train, full_rank=kind == "pca")
        own_units = unlike_units(self._train.std(0)) if own_units is None else own_units
        return Basis.choose(self._train, kind, own_units=own_units, event_shape=self._free_shape)

    def rows(self, basis: Basis) -> "RowsInMemory":
        """See :meth:`Data.rows`."""
        return RowsInMemory(basis.to_standard(self._train))

    def held_out_rows(self, basis: Basis) -> Tensor:
        """See :meth:`Data.held_out_rows`."""
        return basis.to_standard(self._held_out)

    def fingerprint(self) -> str:
        """See :meth:`Data.fingerprint`."""
        digest = hashlib.sha256(self._train.cpu().numpy().tobytes())
        digest.update(self._held_out.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def unlike_units(sd: Tensor) -> bool:
    """Whether columns with these standard deviations look like quantities of unlike units."""
    return bool(sd.max() >= 10 * sd.min())


def free_shape(x: Tensor, support: Constraint | None) -> torch.Size:
    """Shape of an event in unconstrained space."""
    return (x if support is None else to_unconstrained(x[:1], support)).shape[1:]


def free_rows(x: Tensor, support: Constraint | None, name: str, first: int = 0) -> Tensor:
    """Rows in unconstrained space, flattened."""
    return (x if support is None else to_unconstrained(x, support, name, first)).flatten(1)
