"""Single precision that is not cut short.

On NVIDIA GPUs torch by itself evaluates convolutions of single precision in TF32, to ten bits. That is too coarse to
tell whether draws in a batch are what they are alone, to invert a map to rounding, or to choose a solver's steps; a
network whose errors do not matter so much is better served by an autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in the precision of their arguments, and their gradients if taken within; torch's setting, which
    all threads share, comes back afterwards.

    Also a decorator. Matrix products are in full precision by torch's default, which is the user's to change.
    """
    cudnn: Any = torch.backends.cudnn
    settings: list[tuple[Any, str, Any, Any]] = []  # each with its full value and that before
    with suppress(RuntimeError):  # it was set by the attribute that newer versions of torch have; the two do not mix
        settings.append((cudnn, "allow_tf32", False, cudnn.allow_tf32))
    if hasattr(cudnn, "conv"):  # the first changes the second, which has the last word
        settings.append((cudnn.conv, "fp32_precision", "ieee", cudnn.conv.fp32_precision))
    for owner, name, full, _ in settings:
        setattr(owner, name, full)
    try:
        yield
    finally:
        for owner, name, _, before in settings:
            setattr(owner, name, before)
