"""Latents and data drawn from a Pyro model, many at a time."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..core.errors import ModelError
from ..core.randomness import seeded
from ..infer.model.batched import BatchedModel
from ..infer.model.replay import replay
from ..infer.model.simulate import Simulate, is_data, with_data
from ..infer.model.sites import Call

_Model = Callable[..., Any]


@dataclass(frozen=True)
class Joint:
    """A Pyro model whose data are known by the names and shapes of their sites.

    Attributes:
        model: The model, its data observed: their values are a template's.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        template: Observed site to a value of the right shape.
        base: The model as a batched density.
    """

    model: _Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    template: dict[str, Tensor]
    base: BatchedModel

    @classmethod
    def of(
        cls, model: _Model, args: tuple[Any, ...], kwargs: Mapping[str, Any], observed: Sequence[str] | None, seed: int
    ) -> "Joint":
        """Find the data: what the model observes when called with these arguments, or the sites named.

        Raises:
            ModelError: If there are none, or no site has such a name.
        """
        kwargs = dict(kwargs)
        if not callable(model):
            raise TypeError(f"amortise expects a Pyro model (a callable), got {type(model).__name__}")
        named = None if observed is None else [observed] if isinstance(observed, str) else list(observed)
        with seeded(seed), torch.no_grad(), pyro.validation_enabled(False):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
        if named is None:
            data = {name: node["value"] for name, node in sites.items() if is_data(node)}
            if not data:
                raise ModelError(
                    "the model has no observed site when called with these arguments: pass data of the right shape "
                    "(args=(template,); their values do not matter), or name the sites that are data: observed=('y',)"
                )
        else:
            random = [name for name, node in sites.items() if type(node["fn"]).__name__ != "_Subsample"]
            missing = [name for name in named if name not in random]
            if missing:
                raise ModelError(f"observed names {missing}, but the model's sites are {random}")
            data = {name: sites[name]["value"].detach() for name in named}
            plain, given = model, {name: value.clone() for name, value in data.items()}
            model = poutine.condition(plain, data=given)
        data = {name: value.detach() for name, value in data.items()}
        return cls(model, tuple(args), kwargs, data, BatchedModel(model, tuple(args), kwargs, seed=seed))

    def conditioned(self, data: Mapping[str, Tensor]) -> _Model:
        """The model with these data in place of the template."""
        return with_data(self.model, data)

    def simulate(
        self, num: int, seed: int, progress: bool = False, batch_size: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws of ``q``, ``(num, dim)``, and of the data given them, ``(num, *shape)`` each."""
        with seeded(seed), torch.no_grad(), Simulate():  # refuses factors: they say nothing of how data arise
            self.model(*self.args, **self.kwargs)
        q = self.base.sample_prior(num, torch.Generator(self.base.device).manual_seed(seed))
        latents = self.base.sites(q)
        done = replay(
            Call(self.model, self.args, self.kwargs),
            latents,
            num,
            redraw=True,
            wanted=lambda site: site.name in self.template,
            seed=seed + 1,
            progress=progress,
            batch_size=batch_size,
            label="simulate",
        )
        return q, {name: torch.as_tensor(done.arrays["value", name]).to(q.device) for name in self.template}

    def columns(self, data: Mapping[str, Tensor], batch: Sequence[int]) -> Tensor:
        """Data ``(*batch, *shape)`` of all sites as one condition, ``(*batch, p)``."""
        parts = [data[name].reshape(*batch, -1).to(self.base.dtype) for name in self.template]
        return torch.cat(parts, -1)

    def read(self, y: Any) -> tuple[dict[str, Tensor], torch.Size]:
        """A user's data: by site, ``(*batch, *shape)``, and their batch shape, which is ``()`` or ``(S,)``.

        Raises:
            ValueError: If sites are missing or unknown, or shapes are not those of the model's data.
        """
        names = list(self.template)
        if not isinstance(y, Mapping):
            if len(names) > 1:
                raise ValueError(f"the model has several observed sites, {names}: pass a dictionary of all of them")
            y = {names[0]: y}
        if set(y) != set(names):
            raise ValueError(f"expected data of the sites {names}, got {sorted(y)}")
        found: dict[str, Tensor] = {}
        batches = set()
        for name, template in self.template.items():
            value = torch.as_tensor(y[name], device=self.base.device)
            value = value.to(template.dtype) if template.is_floating_point() or not value.is_floating_point() else value
            lead = value.ndim - template.ndim
            if lead not in (0, 1) or value.shape[lead:] != template.shape:
                shape = tuple(template.shape)
                raise ValueError(
                    f"expected data of site {name!r} of shape {shape}, or {('S', *shape)} for many data sets, got "
                    f"{tuple(value.shape)}; pass data as the model was simulated with"
                )
            found[name] = value
            batches.add(value.shape[:lead])
        if len(batches) != 1:
            raise ValueError(f"expected the same number of data sets for every site, got {sorted(map(tuple, batches))}")
        return found, batches.pop()


def usable(q: Tensor, data: dict[str, Tensor], drop: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """Simulations without NaN or infinity, and how many had some.

    Raises:
        ValueError: If there are such, unless they are to be dropped.
    """
    fine = q.isfinite().all(1)
    for value in data.values():
        fine &= value.reshape(len(value), -1).isfinite().all(1) if value.is_floating_point() else True
    bad = torch.nonzero(~fine).flatten()
    if len(bad) and not drop:
        raise ValueError(
            f"{len(bad)} of {len(q)} simulations hold NaN or infinity (the first ones: {bad[:10].tolist()}); pass "
            "drop_invalid=True to leave them out, which conditions the prior on a simulator that works, or mend the "
            "model"
        )
    if len(bad):
        warnings.warn(
            f"{len(bad)} of {len(q)} simulations hold NaN or infinity and are left out: the posterior is one given "
            "that the simulator works",
            stacklevel=3,
        )
    return q[fine], {name: value[fine] for name, value in data.items()}, len(bad)
