"""Random state that is given back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with its own random state, on the processor and all NVIDIA GPUs; the global one comes back after it.

    Which of them a model draws on is not known before it has run. GPUs that nothing in this process has used yet have
    no state to give back, and are not seeded.
    """
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed other kinds of devices too
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield
