"""One density on the devices of many processes.

The first process runs an engine (SMC, HMC, elliptical slice) as if it were alone. Wherever the engine evaluates the
density, its rows, which are chains and particles, fall to the processes in consecutive blocks: every process computes
values and gradients of its block, and all of them come back to the first. What an engine learns in warm-up is hence
learned from the chains of all processes, the draws are those of a run in one process up to rounding, and they are all
in one place. What travels, ``(n, dim)`` numbers, is little beside the solves of a flow that they cost.

The other processes serve until the first one is done, or tell why they cannot.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...core.errors import PoolError
from ...core.pool import Pool
from ...flow.solver.fidelity import Evaluations, Level, at, current_fidelity
from ..model.density import BatchedDensity
from ..model.runner import Totals, gradient

_DONE, _FAILED, _EVALUATE, _RESIZE = range(4)
_HEADER = 6  # numbers before the draws in a message: what, level, rows, dim, dtype, whether gradients are wanted
_NAMED: dict[int, Level] = {-1: "fine", -2: "coarse"}  # positive: solver steps; below these: evaluations
_DTYPES = (torch.float32, torch.float64)


@contextmanager
def everywhere(density: BatchedDensity, pool: Pool | None) -> Iterator[BatchedDensity | None]:
    """The density as an engine should see it, evaluated by all processes of a pool while the block lasts.

    Args:
        density: the same density in every process.
        pool: the processes; None, or a pool of one, changes nothing.

    Yields:
        the density for the first process; None for the others, which have then served and are to go on.

    Raises:
        ValueError: for a density of many data sets, whose rows cannot be parted.
        PoolError: if another process has died, or, in the other processes, if the first one has failed.
    """
    if pool is None or pool.size == 1:
        yield density
        return
    if getattr(density, "families", 1) > 1:
        raise ValueError("many data sets at once run in one process: give every process data sets of its own instead")
    worker = _Worker(density, pool)
    if pool.rank:
        with _signals_ignored():
            worker.serve()
        yield None
        return
    outcome = _FAILED
    with _signals_noted(worker.signals):
        try:
            yield EverywhereDensity(worker)
            outcome = _DONE
        finally:
            if not pool.broken:
                worker.tell([outcome])


def _code(level: Level) -> int:
    """A fidelity as one number."""
    if isinstance(level, Evaluations):
        return min(_NAMED) - level.count
    return level if isinstance(level, int) else next(code for code, name in _NAMED.items() if name == level)


def _level(code: int) -> Level:
    """The fidelity of `_code`."""
    return Evaluations(min(_NAMED) - code) if code < min(_NAMED) else _NAMED.get(code, code)


class EverywhereDensity:
    """A batched density (`BatchedDensity`) for the first process; see `everywhere`."""

    def __init__(self, worker: "_Worker") -> None:
        self._worker, self._inner = worker, worker.density
        self.dim, self.gaussian_prior = self._inner.dim, self._inner.gaussian_prior

    def __call__(self, q: Tensor) -> Totals:
        """See `BatchedDensity`; evaluated by all processes."""
        totals: Totals = _Everywhere.apply(q, self._worker)
        return totals

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """See `BatchedDensity`."""
        return self._inner.sample_prior(num, generator)

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """See `BatchedDensity`."""
        return self._inner.sites(q)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Worker:
    """The part of one process."""

    def __init__(self, density: BatchedDensity, pool: Pool) -> None:
        self.density, self.pool = density, pool
        self.signals: list[int] = []
        self._device = torch.device(getattr(density, "device", "cpu"))
        self._length = _HEADER * 8  # bytes of a message; draws mostly come in one shape, and then so do messages

    def serve(self) -> None:
        """Evaluate whatever the first process asks for, until it is done."""
        while True:
            message = self.pool.share(torch.zeros(self._length, dtype=torch.uint8))
            what, level, rows, dim, dtype, with_gradient = message[: _HEADER * 8].view(torch.long).tolist()
            if what == _RESIZE:
                self._length = level
            elif what == _EVALUATE:
                q = message[_HEADER * 8 :].view(_DTYPES[dtype]).reshape(rows, dim)
                self._evaluate(q, level, bool(with_gradient))
            elif what == _DONE:
                return
            else:
                raise PoolError("the first process failed; its own output says why")

    def lead(self, q: Tensor, with_gradient: bool) -> Tensor:
        """Columns log-prior, log-likelihood and, if asked for, the gradients of both, ``(n, 2 + 2 dim)``.

        Raises:
            RuntimeError: if the model fails in another process.
        """
        if q.dtype not in _DTYPES:
            raise TypeError(f"expected draws in single or double precision, got {q.dtype}")
        code = _code(current_fidelity())
        numbers = [_EVALUATE, code, *q.shape, _DTYPES.index(q.dtype), int(with_gradient)]
        self.tell(numbers, q.cpu().contiguous().view(torch.uint8).flatten())
        columns, error = self._evaluate(q.cpu(), code, with_gradient)
        if self.signals:
            self.signals.clear()
            raise KeyboardInterrupt
        if error is not None:
            raise error
        return columns.to(q.device)

    def tell(self, numbers: list[int], content: Tensor | None = None) -> None:
        """Send the others a message."""
        header = torch.tensor(numbers + [0] * (_HEADER - len(numbers))).view(torch.uint8)
        message = header if content is None else torch.cat([header, content])
        if content is not None and len(message) != self._length:
            self.tell([_RESIZE, len(message)])
            self._length = len(message)
        self.pool.share(torch.nn.functional.pad(message, (0, self._length - len(message))))

    def _evaluate(self, q: Tensor, level: int, with_gradient: bool) -> tuple[Tensor, Exception | None]:
        """The columns of all rows, and what went wrong, if anything did, here or in another process."""
        mine = q[self.pool.mine(len(q))].to(self._device)
        width = 2 + (2 * q.shape[1] if with_gradient else 0)
        block, error = mine.new_zeros(len(mine), width), None
        try:
            with at(_level(level)):
                if len(mine):
                    block = self._columns(mine, with_gradient)
        except Exception as problem:  # whatever the model raises: the others wait for an answer
            error = problem
        failed = block.new_full((len(block), 1), float(error is not None))
        columns = self.pool.blocks(torch.cat([block, failed], 1).cpu(), len(q))
        if bool(columns[:, -1].any()):
            text = "" if error is None else f"process {self.pool.rank}: {type(error).__name__}: {error}"
            said = [text for text in self.pool.texts(text) if text]
            error = error or RuntimeError(said[0])
        return columns[:, :-1], error

    def _columns(self, q: Tensor, with_gradient: bool) -> Tensor:
        if not with_gradient:
            with torch.no_grad():
                return torch.stack(self.density(q), 1)
        with torch.enable_grad():
            q = q.detach().requires_grad_(True)
            prior, likelihood = self.density(q)
            gradients = gradient(prior.sum(), q), gradient(likelihood.sum(), q)
        return torch.cat([torch.stack([prior.detach(), likelihood.detach()], 1), *gradients], 1)


class _Everywhere(torch.autograd.Function):
    """Values from all processes, with the gradients that they computed beside them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, worker: _Worker) -> Any:
        with_gradient = ctx.needs_input_grad[0]
        columns = worker.lead(q.detach(), with_gradient)
        if with_gradient:
            ctx.save_for_backward(*columns[:, 2:].chunk(2, 1))
        return columns[:, 0].contiguous(), columns[:, 1].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight_prior: Tensor, weight_likelihood: Tensor) -> Any:
        prior, likelihood = ctx.saved_tensors
        return weight_prior[:, None] * prior + weight_likelihood[:, None] * likelihood, None


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Leave Ctrl-C and SIGTERM to the first process, which ends the run for all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_noted(came: list[int]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the processes have finished an exchange: a sampler that is interrupted then
    keeps its draws."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda found, _: came.append(found)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
