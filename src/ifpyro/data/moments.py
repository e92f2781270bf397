r"""Mean and covariance of data that pass by once, chunk after chunk, in double precision and bounded memory.

With a pilot mean ``c``, taken from the first rows so that nothing cancels, what is kept are the sums

.. math:: n, \qquad S_1 = \sum_i (x_i - c), \qquad S_2 = \sum_i (x_i - c)(x_i - c)^T,

which add up over chunks and over processes, and give :math:`\mu = c + S_1/n` and
:math:`\Sigma = (S_2 - S_1 S_1^T / n) / (n - 1)`.
"""

import torch
from torch import Tensor

from ..core.pool import Pool

CHUNK = 4096  # rows


class Moments:
    """Running moments of rows of ``D`` columns.

    Args:
        pilot: a rough mean, ``(D,)``; the same in all processes.
        full: keep all of ``S_2``; otherwise only its diagonal, as many columns want.
    """

    def __init__(self, pilot: Tensor, full: bool = True) -> None:
        self._pilot, self._full = pilot.double(), full
        self._first, self._squares = torch.zeros_like(self._pilot), torch.zeros_like(self._pilot)
        self._products = self._pilot.new_zeros(len(pilot), len(pilot)) if full else self._pilot.new_zeros(0, 0)
        self.count = 0
        self.low = torch.full_like(self._pilot, torch.inf)
        self.high = torch.full_like(self._pilot, -torch.inf)

    def add(self, rows: Tensor) -> None:
        """Take in rows ``(n, D)``."""
        if len(rows) == 0:
            return
        centred = rows.double() - self._pilot
        self._first += centred.sum(0)
        self._squares += centred.square().sum(0)
        if self._full:
            self._products.addmm_(centred.T, centred)
        self.count += len(rows)
        self.low = torch.minimum(self.low, rows.min(0).values.double())
        self.high = torch.maximum(self.high, rows.max(0).values.double())

    def pool(self, pool: Pool) -> None:
        """Add up what all processes have seen."""
        if pool.size == 1:
            return
        self.count = int(pool.totals([self.count])[0])
        self._first, self._squares = pool.sum(self._first), pool.sum(self._squares)
        self._products = pool.sum(self._products) if self._full else self._products
        self.low, self.high = pool.rows(self.low[None]).min(0).values, pool.rows(self.high[None]).max(0).values

    @property
    def mean(self) -> Tensor:
        """``mu``, ``(D,)``, double precision."""
        return self._pilot + self._first / self.count

    @property
    def variance(self) -> Tensor:
        """The diagonal of ``Sigma``, ``(D,)``, double precision."""
        return (self._squares - self._first.square() / self.count) / (self.count - 1)

    @property
    def covariance(self) -> Tensor:
        """``Sigma``, ``(D, D)``, double precision; of full moments only."""
        return (self._products - torch.outer(self._first, self._first) / self.count) / (self.count - 1)


def mean_and_sd(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the columns of rows in memory, in double precision without a copy of all in it."""
    mean = sum((part.sum(0, dtype=torch.double) for part in x.split(CHUNK)), x.new_zeros((), dtype=torch.double))
    mean = mean / len(x)
    square = sum(((part.double() - mean).square().sum(0) for part in x.split(CHUNK)), torch.zeros_like(mean))
    return mean, (square / (len(x) - 1)).sqrt()
