"""Single precision that is not cut short.

On NVIDIA GPUs torch by itself evaluates convolutions of single precision in TF32, to ten bits. That is too coarse to
tell whether draws in a batch are what they are alone, to invert a map to rounding, or to choose a solver's steps; a
network whose errors do not matter so much is better served by an autocast.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # blocks that threads are in
_before: list[tuple[Any, str, Any]] = []  # the settings as they were before the first of them


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in the precision of their arguments, and their gradients if taken within.

    Torch's setting belongs to all threads: the first block sets it, and the last one to end, in whichever thread, gives
    it back as it was. Also a decorator. Matrix products are in full precision by torch's default, which is the user's
    to change.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _before[:] = _set_full()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for owner, name, before in _before:
                    setattr(owner, name, before)


def _set_full() -> list[tuple[Any, str, Any]]:
    """Ask for full precision; the settings with what they were."""
    cudnn: Any = torch.backends.cudnn
    settings: list[tuple[Any, str, Any, Any]] = []  # each with its full value and that before
    with suppress(RuntimeError):  # it was set by the attribute that newer versions of torch have; the two do not mix
        settings.append((cudnn, "allow_tf32", False, cudnn.allow_tf32))
    if hasattr(cudnn, "conv"):  # the first changes the second, which has the last word
        settings.append((cudnn.conv, "fp32_precision", "ieee", cudnn.conv.fp32_precision))
    for owner, name, full, _ in settings:
        setattr(owner, name, full)
    return [(owner, name, before) for owner, name, _, before in settings]
