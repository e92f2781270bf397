"""Training data that need not fit into memory: what one pass through them finds."""

import hashlib
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.pool import Pool
from ..data.moments import Moments
from ..data.parts import chart_of, is_uncut, with_cuts
from ..data.samples import (
    check_columns,
    check_count,
    given_rows,
    held_out_count,
    refuse_not_finite,
    to_unconstrained,
)
from ..data.sources import ByIndex, Chunk, Stream, row_hash
from ..data.support import as_support
from ..flow.axes.basis import PCA_AT_MOST, Basis, kind_for
from .in_memory import unlike_units
from .rows import RowsByIndex, RowsOfStream

MOST_HELD_OUT = 16_384
"""Held-out rows that are kept in memory, fewer of large events."""

KEPT = 4096
"""Training rows that are kept in memory to measure the trained flow on, fewer of large events."""

KEPT_BYTES = 2**28
"""Most memory for either."""


class Streamed:
    """Data of which only chunks are ever in memory; see :class:`Data`.

    One pass finds the moments and refuses what cannot be trained on. Of data that are read by index, the same rows are
    held out as in memory, though at most `MOST_HELD_OUT`; of a stream, those whose content says so.

    Args:
        source: how to read the data.
        validation: the fraction held out, or held-out rows.
        support: whatever :func:`~ifpyro.data.support.as_support` takes.
        seed: of the choice of held-out rows.
        device: where to train.
        pool: the processes that share the pass, where the data are read by index.
        progress: show a progress bar.
        kind: of the basis that will be asked for; only ``pca`` needs all covariances.
    """

    def __init__(
        self,
        source: ByIndex | Stream,
        validation: Any,
        support: Any,
        seed: int,
        device: torch.device | str | None,
        pool: Pool,
        progress: bool,
        kind: str = "auto",
    ) -> None:
        self.event_shape, self.dtype = source.event_shape, source.dtype
        self.device = torch.device("cpu" if device is None else device)
        self._source, self._seed, self._kind = source, seed, kind
        known = as_support(support, self.event_shape)
        if is_uncut(known):
            known = with_cuts(known, source.look(KEPT))
        self.chart = chart_of(known, self.event_shape).to(self.device, self.dtype)
        fraction = validation if isinstance(validation, Real) else None
        held_out = None if fraction is not None else given_rows(validation, self.event_shape, self.dtype)
        self._share = 0.0 if fraction is None else float(fraction)
        if fraction is not None:
            held_out_count(1, fraction)  # refuses what is no fraction
        affordable = max(256, KEPT_BYTES // (self.event_shape.numel() * self.dtype.itemsize))
        self._most_held_out, self._most_kept = min(MOST_HELD_OUT, affordable), min(KEPT, affordable)
        error = None
        try:
            if isinstance(source, ByIndex):
                moments, kept = self._by_index(source, pool, progress)
            else:
                moments, kept = self._by_content(source, progress)
        except (TypeError, ValueError) as problem:
            error = problem
        pool.first_error(error)
        if isinstance(source, ByIndex):
            moments.pool(pool)
        found, self.kept = (self.chart.canonical(rows.to(self.device)) for rows in kept)
        self.first = self.kept[:256]
        self.held_out = found if held_out is None else self.chart.canonical(held_out.to(self.device))
        check_count(moments.count, 0)
        if len(self.held_out) == 0:
            raise ValueError(f"validation={fraction} held out none of {moments.count} rows; pass held-out rows instead")
        check_columns(moments.low, moments.high, self.dtype)
        self.count, self._moments = moments.count, moments

    def basis(self, own_units: bool | None, kind: str) -> Basis:
        """See :meth:`Data.basis`; all eigenvectors are those of all rows, other kinds are found from those kept."""
        moments, shape = self._moments, self.chart.free_shape
        kind = kind_for(kind, len(moments.mean), shape)
        sd = moments.variance.sqrt()
        own_units = unlike_units(sd) if own_units is None else own_units
        if kind != "pca" or len(sd) > PCA_AT_MOST:
            rows = to_unconstrained(self.kept, self.chart)
            return Basis.choose(rows, kind, own_units=own_units, seed=self._seed, event_shape=shape)
        check_count(moments.count, len(sd))
        unit = sd if own_units else torch.ones_like(sd)
        basis = Basis.from_moments(moments.mean, moments.covariance / torch.outer(unit, unit), self.kept)
        return Basis(basis.mean, basis.rotation, basis.scale, unit.to(self.kept))

    def rows(self, basis: Basis) -> RowsByIndex | RowsOfStream:
        """See :meth:`Data.rows`."""

        def standard(rows: Tensor) -> Tensor:
            batch = rows.shape[: rows.ndim - len(self.event_shape)]
            rows = rows.to(basis.scale).reshape(-1, *self.event_shape)
            return basis.to_standard(to_unconstrained(rows, self.chart)).reshape(*batch, -1)

        if isinstance(self._source, ByIndex):
            return RowsByIndex(self._source, self._train_index, standard, basis.scale)

        def of_training(rows: Tensor) -> Tensor:
            return standard(rows[row_hash(rows, self._seed) >= self._share])

        return RowsOfStream(self._source, self.count, of_training, basis.scale)

    def held_out_rows(self, basis: Basis) -> Tensor:
        """See :meth:`Data.held_out_rows`."""
        return basis.to_standard(to_unconstrained(self.held_out, self.chart, "validation"))

    def fingerprint(self) -> str:
        """See :meth:`Data.fingerprint`; of the moments, rounded because their sums may come in another order."""
        moments = self._moments
        numbers = torch.cat([moments.mean, moments.variance]).tolist()
        text = " ".join([str(moments.count), *(f"{number:.6e}" for number in numbers)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _by_index(self, source: ByIndex, pool: Pool, progress: bool) -> tuple[Moments, tuple[Tensor, Tensor]]:
        order = torch.randperm(source.count, generator=torch.Generator().manual_seed(self._seed))
        held_out = min(held_out_count(source.count, self._share), self._most_held_out) if self._share else 0
        if not self._share:
            order = order.sort().values
        train = torch.ones(source.count, dtype=torch.bool)
        train[order[:held_out]] = False
        self._train_index = order[held_out:]
        first = self._checked((0, source.rows(torch.arange(min(source.count, 256)))))
        moments = self._moments_about(first)
        chunks = -(-source.count // (source.chunk_rows * pool.size))
        for start, rows in tqdm(
            source.chunks(pool.rank, pool.size), total=chunks, disable=not progress, desc="moments", unit="chunk"
        ):
            moments.add(self._checked((start, rows))[train[start : start + len(rows)].to(self.device)])
        spread = self._train_index[:: max(1, -(-len(self._train_index) // self._most_kept))]
        kept = source.rows(spread)
        return moments, (source.rows(order[:held_out]) if held_out else kept[:0], kept)

    def _by_content(self, source: Stream, progress: bool) -> tuple[Moments, tuple[Tensor, Tensor]]:
        """Of the rows that are held out, and of the others, those with the smallest hashes are kept."""
        moments: Moments | None = None
        for start, rows in tqdm(source.one_pass(0), disable=not progress, desc="moments", unit="chunk"):
            free = self._checked((start, rows))
            if moments is None:
                moments = self._moments_about(free[:256])
                held_out, kept = _Smallest(self._most_held_out, rows), _Smallest(self._most_kept, rows)
            hashes = row_hash(rows, self._seed)
            out = hashes < self._share
            moments.add(free[~out.to(self.device)])
            held_out.add(hashes[out], rows[out])
            kept.add(hashes[~out], rows[~out])
        assert moments is not None  # a source has at least one row
        return moments, (held_out.rows, kept.rows)

    def _moments_about(self, rows: Tensor) -> Moments:
        dim = rows.shape[1]
        return Moments(rows.mean(0), full=kind_for(self._kind, dim) == "pca" and dim <= PCA_AT_MOST)

    def _checked(self, chunk: Chunk) -> Tensor:
        """The rows of a chunk, refused if anything is wrong with them, on the device, unconstrained and flattened."""
        start, rows = chunk
        if rows.shape[1:] != self.event_shape:
            raise ValueError(
                f"expected rows of event shape {tuple(self.event_shape)} like the first, got {tuple(rows.shape[1:])} "
                f"from row {start} on"
            )
        refuse_not_finite(rows, first=start)
        return to_unconstrained(rows.to(self.device), self.chart, "x", start)


class _Smallest:
    """The rows with the smallest hashes so far."""

    def __init__(self, most: int, like: Tensor) -> None:
        self._most = most
        self._hashes, self.rows = like.new_zeros(0, dtype=torch.double), like[:0]

    def add(self, hashes: Tensor, rows: Tensor) -> None:
        hashes, rows = torch.cat([self._hashes, hashes]), torch.cat([self.rows, rows])
        order = hashes.argsort()[: self._most]
        self._hashes, self.rows = hashes[order], rows[order]
