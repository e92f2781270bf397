"""Random state that is given back, and what else all threads of a process share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_THREAD = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Run a block while no other thread is in such a block; a thread that is in one may enter another.

    Pyro's handlers, its parameter store, validation flags and torch's random state belong to the whole process: two
    models that run at once would see each other's sites and draw each other's numbers. Also a decorator.
    """
    with _ONE_THREAD:
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with its own random state, on the processor and all NVIDIA GPUs; the global one comes back after it.

    Which GPUs a model draws on is not known before it has run. GPUs that nothing in this process has used yet have
    no state to give back, and are not seeded. Other threads that want the same wait (:func:`alone`): two trainings in
    two threads run one after the other, each to the result that it has alone.
    """
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with alone(), torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed other kinds of devices too
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield
