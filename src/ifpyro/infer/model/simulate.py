"""A model's data: simulated from the model itself, and put in place of what its arguments say.

Both are done where the observed sites are, not in the model's arguments, so that any model can be used as it is:
arguments say which sites are observed and what shape their data have.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ...core.errors import BatchingError, ModelError
from .sites import is_deterministic


def is_data(msg: Any) -> bool:
    """Whether a message is an observed site with a density of its own: not a factor, nor a computed value."""
    name = type(msg["fn"]).__name__
    return msg["is_observed"] and name not in ("_Subsample", "Unit") and not is_deterministic(msg)


class Simulate(Messenger):
    """Draw the observed sites instead of observing them; `data` then holds what was drawn, of the shape that was
    observed."""

    def __init__(self) -> None:
        super().__init__()
        self.data: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "Unit":
            raise ModelError(
                f"the model has a factor, {name!r}: it says nothing about how data arise, so none can be made"
            )
        scaled = isinstance(msg["scale"], Tensor) or msg["scale"] != 1
        if scaled and type(fn).__name__ != "_Subsample" and not is_deterministic(msg):
            raise ModelError(f"site {name!r} is scaled: a scaled density is not that of any draw, so none can be made")
        if not is_data(msg):
            return
        observed = msg["value"]
        batch = observed.shape[: observed.dim() - fn.event_dim]
        shape = torch.broadcast_shapes(batch, fn.batch_shape)
        with torch.no_grad():
            self.data[name] = (fn if fn.batch_shape == shape else fn.expand(shape)).sample()
        msg["value"] = self.data[name]


class Observe(Messenger):
    """Replace the values of observed sites.

    Args:
        data: name to value; with ``depth``, one value per draw of a batch, ``(n, *shape)``.
        depth: dimensions right of the batch of draws (see `ifpyro.infer.model.handlers`); None for a single draw.
    """

    def __init__(self, data: Mapping[str, Tensor], depth: int | None = None) -> None:
        super().__init__()
        self.data, self.depth = data, depth

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.data or not is_data(msg):
            return
        value = self.data[msg["name"]]
        if self.depth is not None:
            pad = self.depth + msg["fn"].event_dim - (value.dim() - 1)
            if pad < 0:
                raise BatchingError(f"the data of site {msg['name']!r} have more dimensions than the site", msg["name"])
            value = value.reshape(len(value), *(1,) * pad, *value.shape[1:])
        msg["value"] = value


def with_data(model: Callable[..., Any], data: Mapping[str, Tensor], depth: int | None = None) -> Callable[..., Any]:
    """The model with other data at its observed sites. See `Observe`."""

    def observed(*args: Any, **kwargs: Any) -> Any:
        with Observe(data, depth):
            return model(*args, **kwargs)

    return observed
