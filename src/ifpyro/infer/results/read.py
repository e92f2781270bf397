"""Read the result of any sampler as draws by chain, statistics, and the model they came from.

Four kinds of result are understood:

* Pyro's ``MCMC``, with any kernel;
* Pyro's ``SVI``, or a guide with its model: draws are taken from the guide;
* a mapping from site names to tensors of shape ``(chains, draws, *shape)``;
* any object that follows the protocol of this library's own engines::

      result.model                    # or result.kernel.model: the Pyro model
      result.model_args               # the arguments the model was called with
      result.model_kwargs
      result.get_samples(group_by_chain=True)   # name -> (chains, draws, *shape)
      result.sample_stats()           # name -> (chains, draws), under ArviZ's names; optional
      result.attributes               # name -> number or string, such as sampling_time; optional
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.infer import HMC, MCMC, NUTS, SVI
from pyro.poutine.messenger import unwrap
from torch import Tensor

from ..model.replay import describe, replay
from ..model.sites import Call


@dataclass(frozen=True)
class Result:
    """Draws ``(chains, draws, *shape)``, statistics ``(chains, draws)`` or ``(chains,)``, their origin."""

    samples: dict[str, Tensor]
    stats: dict[str, np.ndarray]
    call: Call | None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of chains and of draws in each."""
        chains, draws = next(iter(self.samples.values())).shape[:2]
        return int(chains), int(draws)

    def flat(self) -> dict[str, Tensor]:
        """The draws of all chains in one row, ``(chains * draws, *shape)``."""
        return {name: value.reshape(-1, *value.shape[2:]) for name, value in self.samples.items()}


def read_result(
    result: Any,
    *,
    model: Callable[..., Any] | None = None,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Result:
    """Draws, statistics and model of a result; ``num_samples``, ``seed`` and what follows serve guides only.

    Raises:
        TypeError: if the result is of no known kind, or a guide comes without its model.
        ValueError: if the sampler has not run, or its draws do not share their first two dimensions.
    """
    if isinstance(result, Mapping):
        samples = {str(name): torch.as_tensor(value) for name, value in result.items()}
        return _checked(Result(samples, {}, _call(model, args, kwargs)))
    if isinstance(result, MCMC):
        return _checked(_from_pyro(result, model, args, kwargs))
    if isinstance(result, SVI):
        result, model = result.guide, model or result.model
    elif callable(getattr(result, "get_samples", None)):
        return _checked(_from_protocol(result, model, args, kwargs))
    if not callable(result):
        raise TypeError(
            "to_arviz expects Pyro's MCMC or SVI, a guide (with model=), a mapping from names to draws of "
            "shape (chains, draws, ...), or an object with get_samples(group_by_chain=True); "
            f"got {type(result).__name__}"
        )
    if model is None:
        model = getattr(result, "model", None)
    if model is None:
        raise TypeError(f"to_arviz needs the model that the guide {result!r} stands for: pass model=")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"to_arviz expects num_samples to be a positive integer, got {num_samples!r}")
    call = _call(model, args, kwargs)
    assert call is not None
    return _checked(_from_guide(result, call, num_samples, seed, batch_size, progress))


def _from_pyro(
    mcmc: MCMC,
    model: Callable[..., Any] | None,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
) -> Result:
    if mcmc._samples is None:
        raise ValueError("to_arviz got an MCMC without draws: call its run(...) first")
    samples = mcmc.get_samples(group_by_chain=True)
    if not samples:
        raise ValueError("to_arviz got an MCMC whose model has no latent sites: there is no posterior to convert")
    kernel = mcmc.kernel
    chains, draws = next(iter(samples.values())).shape[:2]
    stats: dict[str, np.ndarray] = {}
    records = [record or {} for record in mcmc._diagnostics]
    if all("divergences" in record for record in records):
        stats["diverging"] = np.zeros((chains, draws), dtype=bool)
        for chain, record in enumerate(records):
            stats["diverging"][chain, list(record["divergences"])] = True
    if all("acceptance rate" in record for record in records):
        stats["acceptance_rate"] = np.array([float(record["acceptance rate"]) for record in records])
    # Several chains share one kernel object, or leave theirs in another process: only a lone chain's is its
    # own.
    if chains == 1 and isinstance(kernel, HMC):
        stats["step_size"] = np.full((1, draws), float(kernel.step_size))
        if not isinstance(kernel, NUTS):
            stats["n_steps"] = np.full((1, draws), int(kernel.num_steps))
    call = _call(
        model or getattr(kernel, "model", None),
        mcmc._args if args is None else args,
        mcmc._kwargs if kwargs is None else kwargs,
    )
    attributes = {"kernel": type(kernel).__name__, "warmup_steps": int(mcmc.warmup_steps)}
    return Result(dict(samples), stats, call, attributes)


def _from_protocol(
    result: Any,
    model: Callable[..., Any] | None,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
) -> Result:
    samples = result.get_samples(group_by_chain=True)
    if not isinstance(samples, Mapping) or not samples:
        raise ValueError("to_arviz got a result without draws: call its run(...) first")
    if model is None:
        model = getattr(getattr(result, "kernel", None), "model", None) or getattr(result, "model", None)
    read = getattr(result, "sample_stats", None)
    stats = {str(k): np.asarray(torch.as_tensor(v).detach().cpu()) for k, v in (read() if read else {}).items()}
    call = _call(
        model,
        getattr(result, "model_args", ()) if args is None else args,
        getattr(result, "model_kwargs", {}) if kwargs is None else kwargs,
    )
    values = {str(name): torch.as_tensor(value) for name, value in samples.items()}
    return Result(values, stats, call, dict(getattr(result, "attributes", None) or {}))


def _from_guide(
    guide: Callable[..., Any], call: Call, num_samples: int, seed: int, batch_size: int | None, progress: bool
) -> Result:
    told = Call(guide, call.args, call.kwargs)
    sites, partial = describe(told, seed=seed)
    local = sorted(
        s.name for s in sites.values() if s.kind == "latent" and not s.auxiliary and partial & set(s.plates.values())
    )
    if local:
        raise ValueError(
            f"plates {sorted(partial)} of the guide show another part of their data in every run, so that draws of "
            f"{local} would mix rows up: pass args= under which the guide and model=... see all of it"
        )
    drawn = replay(
        told,
        {},
        num_samples,
        wanted=lambda site: site.kind == "latent" and not site.auxiliary,
        joint=True,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        label="guide",
    )
    samples = {name: torch.from_numpy(v)[None] for (what, name), v in drawn.arrays.items() if what == "value"}
    if not samples:
        raise ValueError(f"the guide {guide!r} has no latent sites: there is no posterior to convert")
    # A guide of point masses has no density.
    has_density = any(site.random for site in drawn.sites.values())
    stats = {"log_q": drawn.arrays["lp", ""][None]} if has_density else {}
    return Result(samples, stats, call, {"kernel": type(guide).__name__})


def _call(
    model: Callable[..., Any] | None, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any] | None
) -> Call | None:
    if model is None:
        return None
    if args is not None and not isinstance(args, (tuple, list)):
        raise TypeError(f"to_arviz expects args to be a tuple of the model's arguments, got {type(args).__name__}")
    call = Call(model, tuple(args or ()), dict(kwargs or {}))
    try:
        _signature(model).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise TypeError(f"the model cannot be called with these arguments ({error}): pass args= and kwargs=") from None
    return call


def _signature(model: Callable[..., Any]) -> inspect.Signature:
    inner = unwrap(model)
    if isinstance(inner, torch.nn.Module):
        inner = inner.forward
    return inspect.signature(inner)


def rebind(call: Call, change: tuple[Any, ...] | Mapping[str, Any]) -> Call:
    """The same model with other arguments: a tuple replaces them all, a mapping replaces those it names."""
    if isinstance(change, tuple):
        new = _call(call.model, change, {})
        assert new is not None
        return new
    bound = _signature(call.model).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    unknown = sorted(set(change) - set(bound.arguments))
    if unknown:
        raise ValueError(f"predictions names {unknown}, but the model's arguments are {sorted(bound.arguments)}")
    bound.arguments.update(change)
    return Call(call.model, bound.args, bound.kwargs)


def named_arguments(call: Call) -> dict[str, Any]:
    """The model's arguments by name; those of ``*args`` are numbered."""
    signature = _signature(call.model)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*call.args, **call.kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def _checked(result: Result) -> Result:
    if not result.samples:
        raise ValueError("to_arviz got no draws: the mapping from site names to draws is empty")
    short = {name: tuple(v.shape) for name, v in result.samples.items() if v.dim() < 2}
    if short:
        raise ValueError(f"to_arviz expects draws of shape (chains, draws, ...), got {short}")
    shape = result.shape
    for name, value in result.samples.items():
        if tuple(value.shape[:2]) != shape:
            raise ValueError(f"draws differ in (chains, draws): {shape} and, for {name!r}, {tuple(value.shape[:2])}")
    if 0 in shape:
        raise ValueError(f"to_arviz got {shape[0]} chains of {shape[1]} draws: there is nothing to convert")
    for name, stat in result.stats.items():
        if stat.shape not in (shape, shape[:1]):
            raise ValueError(f"statistic {name!r} must have shape {shape} or {shape[:1]}, got {stat.shape}")
    return result
