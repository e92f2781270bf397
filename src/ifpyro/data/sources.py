"""Data that need not fit into memory: read by index, or as a stream.

Two kinds are told apart by what is cheap. Memory-mapped arrays and map-style data sets give any row at once
(:class:`ByIndex`). Iterable data sets, data loaders, and arrays that are stored in compressed chunks (zarr, HDF5) are
read in their own order, again and again (:class:`Stream`).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .arrays import as_array
from .samples import as_rows

CHUNK_BYTES = 2**26
"""How much is read at a time."""

_LOOKED_AT = 65_536  # rows that decide the dtype
_PIECES = 3  # of a stream, likewise: the first may be a single row

Chunk = tuple[int, Tensor]
"""The index of its first row, and rows ``(n, *event)``."""


class ByIndex:
    """Rows at any index.

    Args:
        fetch: whatever :func:`~ifpyro.data.samples.as_rows` makes rows ``(n, *event)`` of, at an array of indices or a
            slice.
        count: number of rows.
        dtype: of the rows; by default what suits the first chunk (see :mod:`ifpyro.data.arrays`).
    """

    def __init__(
        self, fetch: Callable[[np.ndarray | slice], Any], count: int, dtype: torch.dtype | None = None
    ) -> None:
        self._fetch, self.count = fetch, count
        if not count:
            raise ValueError("expected data with at least one row, got none")
        self.chunk_rows = chunk_rows(as_rows(fetch(slice(0, 1))))
        first = as_rows(fetch(slice(0, min(count, self.chunk_rows, _LOOKED_AT))), dtype=dtype, hold=True)
        self.event_shape, self.dtype = first.shape[1:], first.dtype

    def rows(self, index: Tensor) -> Tensor:
        """Rows at indices of any shape: ``(*index, *event)``."""
        found = as_rows(self._fetch(index.flatten().cpu().numpy()), dtype=self.dtype)
        return found.reshape(*index.shape, *self.event_shape)

    def look(self, most: int) -> Tensor:
        """At most so many rows, spread over the data."""
        return self.rows(torch.arange(0, self.count, -(-self.count // most)))

    def chunks(self, part: int = 0, parts: int = 1) -> Iterator[Chunk]:
        """Every ``parts``-th chunk of consecutive rows, from the ``part``-th on."""
        for start in range(part * self.chunk_rows, self.count, parts * self.chunk_rows):
            rows = self._fetch(slice(start, min(start + self.chunk_rows, self.count)))
            yield start, as_rows(rows, dtype=self.dtype)


class Stream:
    """Rows in the order in which they come.

    Args:
        raw_pass: starts pass number ``k`` through the data: pieces of which
            :func:`~ifpyro.data.samples.as_rows` makes rows, each with the index of its first row.
        dtype: of the rows; by default what suits the first pieces.
    """

    def __init__(self, raw_pass: Callable[[int], Iterator[tuple[int, Any]]], dtype: torch.dtype | None = None) -> None:
        self._raw_pass = raw_pass
        pieces = [as_rows(piece, dtype=dtype, hold=True) for _, piece in itertools.islice(raw_pass(0), _PIECES)]
        if not pieces:
            raise ValueError("expected data with at least one row, but the stream ended at once")
        self.event_shape = pieces[0].shape[1:]
        self.dtype = max((piece.dtype for piece in pieces), key=lambda kind: kind.itemsize)
        self.chunk_rows = chunk_rows(pieces[0])

    def look(self, most: int) -> Tensor:
        """At most so many rows, the first that come."""
        found: list[Tensor] = []
        for _, rows in self.one_pass(0):
            found.append(rows)
            if sum(map(len, found)) >= most:
                break
        return torch.cat(found)[:most]

    def one_pass(self, number: int) -> Iterator[Chunk]:
        """Pass ``number`` through the data: chunks of rows, each with the index of its first row."""
        for start, piece in self._raw_pass(number):
            yield start, as_rows(piece, dtype=self.dtype)


def open_source(x: Any, seed: int = 0, dtype: torch.dtype | None = None) -> ByIndex | Stream | None:
    """How to read ``x`` piece by piece; None for what is in memory already, or has to be.

    Args:
        x: whatever the user calls data.
        seed: of the order in which chunks of stored arrays and shuffling data loaders are read.
        dtype: of the rows; by default see :mod:`ifpyro.data.arrays`.

    Raises:
        TypeError: if a data set holds what cannot be made an array of real numbers.
        ValueError: if there are no rows.
    """
    if isinstance(x, np.memmap):
        return ByIndex(lambda index: np.array(x[index]), _rows_in(x), dtype)
    if isinstance(x, DataLoader):
        return Stream(_loader_passes(x, seed), dtype)
    if isinstance(x, IterableDataset):
        return Stream(_item_passes(x), dtype)
    if isinstance(x, Dataset) or (_has(x, "__getitem__", "__len__") and not _has(x, "__array__") and not _is_list(x)):
        return ByIndex(_dataset_fetch(x), len(x), dtype)
    stored = _has(x, "chunks", "shape", "dtype", "__getitem__") and not isinstance(x, Tensor | np.ndarray)
    if stored and (x.chunks is not None or type(x).__module__.startswith("h5py")):
        return Stream(_stored_passes(x, seed), dtype)
    return None


def chunk_rows(rows: Tensor) -> int:
    """How many rows like these to read at a time."""
    return max(1, CHUNK_BYTES // max(1, rows[0].numel() * rows.dtype.itemsize))


def _has(x: Any, *names: str) -> bool:
    return all(hasattr(x, name) for name in names)


def _is_list(x: Any) -> bool:
    return isinstance(x, list | tuple | str | bytes | dict)


def _rows_in(x: Any) -> int:
    return x.shape[0] if x.ndim else as_rows(x).shape[0]  # of a number, as_rows says what is wrong


def _event(item: Any) -> Any:
    """The event in an item of a data set: the item itself, or the first of a pair such as (image, label)."""
    if isinstance(item, tuple | list) and len(item) and not np.isscalar(item[0]):
        item = item[0]
    if isinstance(item, dict):
        raise TypeError(
            f"expected items that are arrays, or tuples whose first entry is one, got a dictionary of {sorted(item)}; "
            "wrap the data set so that it returns the array"
        )
    if isinstance(item, Tensor):
        return item
    kind = np.asarray(item).dtype
    if kind.kind not in "fiub":
        raise TypeError(
            f"expected items that are arrays of real numbers, or tuples whose first entry is one, got dtype "
            f"{kind}; convert them in the data set (images: torchvision's ToTensor, or numpy.asarray)"
        )
    return as_array(item, "items")


def _stack(items: Sequence[Any], first: int) -> Tensor | np.ndarray:
    events = [_event(item) for item in items]
    shapes = [tuple(event.shape) for event in events]
    odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise ValueError(
            f"expected items of one shape, but item {first} has shape {shapes[0]} and item {first + odd} has "
            f"{shapes[odd]}; crop or resize them in the data set"
        )
    return torch.stack(events) if isinstance(events[0], Tensor) else np.stack(events)


def _dataset_fetch(x: Any) -> Callable[[np.ndarray | slice], Any]:
    def fetch(index: np.ndarray | slice) -> Any:
        wanted = list(range(*index.indices(len(x)))) if isinstance(index, slice) else index.tolist()
        items = x.__getitems__(wanted) if hasattr(x, "__getitems__") else [x[i] for i in wanted]
        return _stack(items, wanted[0] if wanted else 0)

    return fetch


def _item_passes(x: Any, seed: int | None = None) -> Callable[[int], Iterator[tuple[int, Any]]]:
    """Passes through single items; with a seed they are those of a loader, which draws their order."""

    def one_pass(number: int) -> Iterator[tuple[int, Any]]:
        items: list[Any] = []
        start, size = 0, 1  # the first row says how many to read at a time
        for item in x if seed is None else _started(x, seed + number):
            items.append(item)
            if len(items) == size:
                rows = _stack(items, start)
                yield start, rows
                start, size, items = start + len(items), chunk_rows(as_rows(rows)), []
        if items:
            yield start, _stack(items, start)

    return one_pass


def _loader_passes(x: Any, seed: int) -> Callable[[int], Iterator[tuple[int, Any]]]:
    if x.batch_size is None and x.batch_sampler is None:
        return _item_passes(x, seed)

    def one_pass(number: int) -> Iterator[tuple[int, Any]]:
        start = 0
        for batch in _started(x, seed + number):
            rows = _event(batch)
            yield start, rows
            start += len(rows)

    return one_pass


def _started(loader: Any, seed: int) -> Iterator[Any]:
    """What a loader yields. It draws its order from torch's global stream when it starts: it gets one of its own, so
    that a pass can be repeated, and the caller's stream comes back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        items = iter(loader)
        first = list(itertools.islice(items, 1))
    yield from first
    yield from items


def _stored_passes(x: Any, seed: int) -> Callable[[int], Iterator[tuple[int, Any]]]:
    stored = x.chunks[0] if x.chunks else 1
    stored = stored[0] if isinstance(stored, tuple) else stored

    def one_pass(number: int) -> Iterator[tuple[int, Any]]:
        row = as_rows(x[0:1])
        at_once = max(1, chunk_rows(row) // stored // 8) * stored  # several of these make a block
        starts = np.arange(0, x.shape[0], at_once)
        for start in np.random.default_rng([seed, number]).permutation(starts).tolist():
            yield start, x[start : start + at_once]

    return one_pass


def row_hash(rows: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for every row that depends on nothing but its content and the seed, ``(n,)``.

    A stream may come in another order every time: it is by their content that held-out rows are told from the others.
    """
    words = rows.flatten(1).contiguous().view(torch.int32).long()
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator) * 2 + 1
    mixed = (words * odd.to(words.device)).sum(1)  # wraps around: a multiplicative hash
    for shift, factor in ((33, -49064778989728563), (29, -4265267296055464877), (32, 0)):
        mixed = mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))
        mixed = mixed * factor if factor else mixed
    return (mixed >> 11 & ((1 << 53) - 1)).double() / 2**53
