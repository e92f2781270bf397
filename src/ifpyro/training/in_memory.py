"""What a training needs to know of its data, and samples that are in memory."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.charts import Chart
from ..data.parts import chart_of, with_cuts
from ..data.samples import check_trainable, split, to_unconstrained
from ..data.support import as_support
from ..flow.axes.basis import Basis, kind_for
from .rows import Rows, RowsInMemory


class Data(Protocol):
    """Data to train on, and to hold out."""

    count: int
    """Training rows."""
    event_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    chart: Chart
    """Of the support, its circles cut; kept and held-out rows are canonical."""
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
    """Samples in memory, ``(N, *event)``; see :class:`Data`.

    Args:
        x: the samples.
        validation: the fraction held out, or held-out rows.
        support: whatever :func:`~ifpyro.data.support.as_support` takes.
        generator: of the choice of held-out rows.
        names: of the columns, where they have any.
    """

    def __init__(
        self,
        x: Tensor,
        validation: Any,
        support: Any,
        generator: torch.Generator,
        names: Sequence[Any] | None = None,
    ) -> None:
        known = as_support(support, x.shape[1:], names)
        self.chart = chart_of(with_cuts(known, x), x.shape[1:]).to(x)
        to_unconstrained(x, self.chart)  # refuses rows outside by the indices that the caller knows
        x = self.chart.canonical(x)
        self.event_shape, self.dtype, self.device = x.shape[1:], x.dtype, x.device
        self.first = x[:256]
        self.kept, held_out = split(x, validation, generator)
        self.held_out = self.chart.canonical(held_out)
        self._train = to_unconstrained(self.kept, self.chart)
        self._held_out = to_unconstrained(self.held_out, self.chart, "validation")
        self.count = len(self._train)

    def basis(self, own_units: bool | None, kind: str) -> Basis:
        """See :meth:`Data.basis`."""
        kind = kind_for(kind, self._train.shape[1], self.chart.free_shape)
        check_trainable(self._train, full_rank=kind == "pca")
        own_units = unlike_units(self._train.std(0)) if own_units is None else own_units
        return Basis.choose(self._train, kind, own_units=own_units, event_shape=self.chart.free_shape)

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
