"""The processes of one job, as ``torchrun`` or ``accelerate launch`` start them, and what they tell one another.

A :class:`Pool` of one process is the identity in everything, so that code written for many runs alone unchanged. Plain
``torch.distributed`` does all of it: both launchers describe the job in the same environment variables, and a training
step needs no more than one sum over processes. A job is single-program: every process runs the same script, and all
of them must make the same calls in the same order.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PoolError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Pool:
    """The processes of one job; by default this process alone.

    Use :meth:`join` to find the others.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        device: where this process should compute: its own GPU if there is one.
        interrupted: set it, in any process, to end a training of all of them after its current step.
        broken: whether a process was found to have died; nothing can be exchanged any more.

    Example:
        >>> pool = ifpyro.Pool()
        >>> pool.rank, pool.size
        (0, 1)
        >>> pool.mine(10)
        slice(0, 10, None)
    """

    interrupted = False
    broken = False

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def join(cls, timeout: float = 1800.0, backend: str | None = None) -> "Pool":
        """The pool of this job: of all processes under ``torchrun`` or ``accelerate launch``, else of this one alone.

        Args:
            timeout: seconds for which a process waits for the others before it gives up.
            backend: of ``torch.distributed``. By default torch's choice; but gloo, through the processor, where a
                process sees fewer GPUs than there are processes on its machine: NCCL does not let them share one. Where
                each process is shown a GPU of its own, ask for ``"cpu:gloo,cuda:nccl"``.

        Raises:
            PoolError: if the processes do not find one another.
            ValueError: on a backend that torch does not know.

        Example:
            >>> pool = ifpyro.Pool.join()
            >>> pool.size  # more than one under torchrun
            1
        """
        if backend is not None:
            _check_backend(backend)
        if dist.is_available() and dist.is_initialized():
            return _Processes()
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return Pool()
        missing = [name for name in _NEEDED if name not in os.environ]
        if missing:
            raise PoolError(
                f"WORLD_SIZE says {os.environ['WORLD_SIZE']} processes, but {', '.join(missing)} is not set; start "
                "them with torchrun or accelerate launch"
            )
        try:
            dist.init_process_group(backend or _backend(), timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise PoolError(
                f"the {os.environ['WORLD_SIZE']} processes of this job did not find one another within {timeout:.0f} "
                f"seconds ({error})"
            ) from error
        return _Processes()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes of tensors of one shape."""
        return x

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sums over processes of a few numbers."""
        return list(numbers)

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, one process after the other; their numbers may differ."""
        return x

    def mine(self, n: int) -> slice:
        """The part of ``n`` rows that falls to this process; the parts are consecutive and differ by at most one."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def blocks(self, x: Tensor, n: int) -> Tensor:
        """All ``n`` rows, of which every process passes its own part, ``mine(n)``."""
        return x

    def share(self, x: Tensor) -> Tensor:
        """The first process's tensor; all pass one of the same shape and dtype."""
        return x

    def share_bytes(self, content: bytes) -> bytes:
        """The first process's bytes, whatever the others pass."""
        return content

    def texts(self, text: str) -> list[str]:
        """What all processes say, in their order."""
        return [text]

    def first_error(self, error: Exception | None) -> None:
        """Raise everywhere what went wrong anywhere: the error of the first process that has one.

        Raises:
            Exception: ``error`` itself, or a ``ValueError`` with another process's message.
        """
        if error is not None:
            raise error

    def leave(self) -> None:
        """End the job's communication; for the end of a script."""


class _Processes(Pool):
    """Processes that have found one another through ``torch.distributed``."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        gpus = torch.cuda.device_count()
        self.device = torch.device("cuda", local % gpus) if gpus else torch.device("cpu")

    def sum(self, x: Tensor) -> Tensor:
        carried = self._carried(x)
        self._call(lambda: dist.all_reduce(carried))
        return carried.to(x.device)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        return self.sum(torch.tensor(numbers, dtype=torch.double)).tolist()

    def rows(self, x: Tensor) -> Tensor:
        counts = torch.zeros(self.size, dtype=torch.long, device=x.device)
        counts[self.rank] = len(x)
        return self._gather(x, self.sum(counts).tolist())

    def blocks(self, x: Tensor, n: int) -> Tensor:
        ends = [rank * n // self.size for rank in range(self.size + 1)]
        return self._gather(x, [end - start for start, end in pairwise(ends)])

    def share(self, x: Tensor) -> Tensor:
        carried = self._carried(x)
        self._call(lambda: dist.broadcast(carried, 0))
        return carried.to(x.device)

    def share_bytes(self, content: bytes) -> bytes:
        length = int(self.share(torch.tensor(len(content))))
        buffer = torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return self.share(buffer).numpy().tobytes()

    def texts(self, text: str) -> list[str]:
        content = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        return self.rows(content).numpy().tobytes().decode().split("\0")[: self.size]

    def first_error(self, error: Exception | None) -> None:
        texts = self.texts("" if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text:
                raise ValueError(f"process {rank}: {text}")

    def leave(self) -> None:
        dist.destroy_process_group()

    def _carried(self, x: Tensor) -> Tensor:
        """A copy of a tensor that can travel: from where it is, or where a backend meets it."""
        backend = dist.get_backend_config()
        travels = ("gloo" if x.device.type == "cpu" else "nccl") in backend
        elsewhere = torch.device("cpu") if "gloo" in backend else self.device
        return x.to(x.device if travels else elsewhere, copy=True, memory_format=torch.contiguous_format)

    def _gather(self, x: Tensor, lengths: list[int]) -> Tensor:
        padded = self._carried(torch.cat([x, x.new_zeros(max(lengths) - len(x), *x.shape[1:])]))
        parts = [torch.empty_like(padded) for _ in lengths]
        self._call(lambda: dist.all_gather(parts, padded))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)]).to(x.device)

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            self.broken = True
            reason = str(error).splitlines()[0]
            raise PoolError(
                f"process {self.rank} of {self.size} lost touch with the others: one of them has died or failed; its "
                f"own output says why ({reason})"
            ) from error


def _check_backend(backend: str) -> None:
    known = sorted(dist.Backend.backend_list) if dist.is_available() else []
    if not all(part.split(":")[-1] in known for part in backend.split(",")):
        raise ValueError(
            f"backend expects names among {known}, alone or one a device as in 'cpu:gloo,cuda:nccl', got {backend!r}"
        )


def _backend() -> str | None:
    """Torch's choice; where processes share a GPU, which NCCL refuses to serve, they meet on the processor."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return "gloo" if torch.cuda.is_available() and torch.cuda.device_count() < here else None
