"""Batches of standardised training rows, from memory, by index, or from a stream."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..data.sources import ByIndex, Stream

BLOCK_BYTES = 2**28
"""Rows of a stream that are kept in memory, to draw from, until as many have been drawn."""


class Rows(Protocol):
    """Standardised training rows, drawn at random with replacement from torch's global stream."""

    dim: int
    dtype: torch.dtype
    device: torch.device

    def draw(self, shape: tuple[int, int], mine: slice) -> Tensor:
        """The columns ``mine`` of random rows of this shape: ``(shape[0], len(mine), D)``."""
        ...

    def position(self) -> list[int]:
        """Where a stream stands; of what can be drawn from anywhere, nothing."""
        ...

    def go_to(self, position: list[int]) -> None:
        """Stand where :meth:`position` was taken."""
        ...


class _RowsOfAnyPlace:
    """Rows that can be drawn from anywhere: there is no place to remember."""

    def position(self) -> list[int]:
        """See :meth:`Rows.position`."""
        return []

    def go_to(self, position: list[int]) -> None:
        """See :meth:`Rows.go_to`."""


class RowsInMemory(_RowsOfAnyPlace):
    """Rows of one tensor, ``(N, D)``; see :class:`Rows`."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.dim, self.dtype, self.device = rows.shape[1], rows.dtype, rows.device

    def draw(self, shape: tuple[int, int], mine: slice) -> Tensor:
        """See :meth:`Rows.draw`."""
        return self._rows[torch.randint(len(self._rows), shape, device=self.device)[:, mine]]


class RowsByIndex(_RowsOfAnyPlace):
    """Rows read when they are drawn; see :class:`Rows`.

    Args:
        source: the data.
        index: of the training rows among them.
        standard: standardises rows ``(*batch, *event)`` as they were read.
        like: a tensor ``(D,)`` of the dtype and on the device of training.
    """

    def __init__(self, source: ByIndex, index: Tensor, standard: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self._source, self._index, self._standard = source, index, standard
        self.dim, self.dtype, self.device = len(like), like.dtype, like.device

    def draw(self, shape: tuple[int, int], mine: slice) -> Tensor:
        """See :meth:`Rows.draw`."""
        # On the device of training, as in memory, so that the same rows are drawn there.
        chosen = torch.randint(len(self._index), shape, device=self.device)[:, mine].cpu()
        return self._standard(self._source.rows(self._index[chosen]))


class RowsOfStream:
    """Rows drawn from a block of a stream, which is renewed after as many draws as it has rows; see :class:`Rows`.

    A stream that fits into one block is read once.

    Args:
        source: the stream.
        count: number of training rows in one pass.
        standard: standardises the training rows among ``(n, *event)`` as they were read.
        like: a tensor ``(D,)`` of the dtype and on the device of training.
    """

    def __init__(self, source: Stream, count: int, standard: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self._source, self._count, self._standard, self._like = source, count, standard, like
        self.dim, self.dtype, self.device = len(like), like.dtype, like.device
        self._most = min(count, max(1, BLOCK_BYTES // (self.dim * self.dtype.itemsize)))
        self.go_to([0, 0, 0])

    def draw(self, shape: tuple[int, int], mine: slice) -> Tensor:
        """See :meth:`Rows.draw`."""
        used_up = self._draws * shape[0] * shape[1] >= len(self._block) and self._most < self._count
        if len(self._block) == 0 or used_up:
            self._next_block()
        self._draws += 1
        chosen = torch.randint(len(self._block), shape, device=self.device)
        return self._block[chosen[:, mine]]

    def position(self) -> list[int]:
        """The pass and chunk at which the block starts, and how often it was drawn from."""
        return [*self._start, self._draws]

    def go_to(self, position: list[int]) -> None:
        """See :meth:`Rows.go_to`."""
        self._start, draws = (position[0], position[1]), position[2]
        self._chunks = self._chunks_from(*self._start)
        self._reached = self._start
        self._block = self._like.new_zeros(0, self.dim)
        if draws:
            self._next_block()
        self._draws = draws

    def _next_block(self) -> None:
        self._start, self._draws = self._reached, 0
        parts: list[Tensor] = []
        while sum(map(len, parts)) < self._most:
            rows, self._reached = next(self._chunks)
            parts.append(self._standard(rows))
        self._block = torch.cat(parts)

    def _chunks_from(self, number: int, skip: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Chunks of rows from a place on, pass after pass, each with the place after it."""
        while True:
            seen = False
            for k, (_, rows) in enumerate(self._source.one_pass(number)):
                seen = True
                if k >= skip:
                    yield rows, (number, k + 1)
            if not seen:
                raise ValueError(f"expected a stream that can be read again, but pass {number + 1} brought no rows")
            number, skip = number + 1, 0
