"""Run a Pyro model again at many draws, in batches of bounded memory.

A sampler keeps the latent sites only. Deterministic sites, log-likelihoods and predictions follow from them
by running the model again at each draw. The run at one draw is the definition; batches must give the same:

* ``vmap``: :func:`torch.func.vmap` of the run at one draw. It cannot mix draws up, and refuses what it cannot
  do.
* ``plate``: one run under an outermost plate over draws, to the left of every other batch dimension. Only
  this draws new values in a batch, but a model may mix its draws there without an error: by ``x.mean()``
  meant over one draw, by ``if (x > 0).any()``, by indexing from the left. So the values it drew are held
  fixed, every number is computed again by ``vmap``, and all rows must agree, log-densities of the drawn sites
  included.
* ``loop``: the run at one draw, draw after draw, wherever the others fail.

Three rows of every batch are compared with the run at one draw as well.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from tqdm import tqdm

from .sites import Call, Site, device_of, flow_base, is_deterministic, quietly, read_site, to_numpy

Key = tuple[str, str]
"""What a number is, and of which site: ``("value", "x")``, ``("log_prob", "y")``, ``("base", "x")``, ``("lp",
"")``."""
Outputs = dict[Key, Tensor]

_DRAWS = "_ifpyro_draws"
_MAX_ELEMENTS = 2**22
_MAX_BATCH = 512


@dataclass(frozen=True)
class Replayed:
    """What a replay gives: NumPy arrays with draws first, the sites at one draw, the method used."""

    arrays: dict[Key, np.ndarray]
    sites: dict[str, Site]
    method: str


class _CannotBatch(Exception):
    """A batched run cannot be read as one result per draw."""


class _Steer(Messenger):
    """Hold the given sites at their values and, if asked, draw observed sites anew."""

    def __init__(self, given: Mapping[str, Tensor], redraw: bool, one_draw: bool) -> None:
        super().__init__()
        self.given, self.redraw, self.one_draw = given, redraw, one_draw

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg) or site_is_factor(msg):
            return
        if self.redraw and msg["is_observed"] and not is_deterministic(msg):
            # Data may have more batch dimensions than the distribution: one fresh value for each observation.
            value = msg["value"]
            batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            msg["fn"] = fn = fn.expand(batch)
            msg["value"], msg["is_observed"] = None, False
        if name in self.given and not msg["is_observed"]:
            value = self.given[name]
            # A value of another shape might broadcast into something that looks right.
            if self.one_draw and value.shape != fn.shape():
                raise ValueError(
                    f"site {name!r} has shape {tuple(fn.shape())} in the model called with these arguments, "
                    f"but its draws have shape {tuple(value.shape)}: pass arguments under which the draws of "
                    f"{name!r} fit, or a model in which it does not depend on the size of the data"
                )
            msg["value"] = value.to(device_of(fn) or value.device)


@dataclass(frozen=True)
class _Job:
    """One question asked of a model: which numbers, given which sites."""

    call: Call
    redraw: bool
    wanted: Callable[[Site], bool]
    log_likelihood: bool
    joint: bool
    fresh: frozenset[str] = frozenset()
    """Sites that a run draws anew: their values are kept for the comparison, whether wanted or not."""

    def trace(self, given: Mapping[str, Tensor], plate: Any = None) -> dict[str, Any]:
        """The sample statements of one run, those of plates among them."""
        steer = _Steer(given, self.redraw, plate is None)
        with poutine.trace() as tracer, steer:
            if plate is None:
                self.call.model(*self.call.args, **self.call.kwargs)
            else:
                with plate:
                    self.call.model(*self.call.args, **self.call.kwargs)
        return {name: node for name, node in tracer.trace.nodes.items() if node["type"] == "sample"}

    def outputs(
        self,
        given: Mapping[str, Tensor],
        sites: Mapping[str, Site],
        count: int | None = None,
        plate: Any = None,
    ) -> Outputs:
        """Every number asked for, at one draw, or with ``count`` rows from one run under ``plate``."""
        nodes = {n: node for n, node in self.trace(given, plate).items() if not site_is_subsample(node)}
        if nodes.keys() != sites.keys():
            changed = sorted(nodes.keys() ^ sites.keys())
            raise ValueError(f"the model's sites must not change from draw to draw, but these came or went: {changed}")

        def rows(value: Tensor, shape: tuple[int, ...]) -> Tensor:
            if count is None:
                if tuple(value.shape) != shape:
                    raise ValueError(f"a site's shape changed from draw to draw: {shape} and {tuple(value.shape)}")
                return value
            return _rows(value, count, shape)

        out: Outputs = {}
        total: Tensor | float = 0.0
        for name, node in nodes.items():
            site = sites[name]
            value = torch.as_tensor(node["value"])
            if self.wanted(site) or name in self.fresh:
                out["value", name] = rows(value, site.shape)
            if self.wanted(site) and site.base_shape is not None:
                out["base", name] = rows(flow_base(node["fn"], value), site.base_shape)
            # A flow's own density needs no comparison: its base is fixed, no draws can be mixed up in it.
            pointwise = (self.log_likelihood and site.kind == "observed") or (
                name in self.fresh and site.base_shape is None
            )
            if not (pointwise or (self.joint and site.kind != "deterministic")):
                continue
            log_prob = node["fn"].log_prob(value, *node["args"], **node["kwargs"])
            if pointwise:
                masked = scale_and_mask(log_prob, mask=node["mask"])
                out["log_prob", name] = rows(masked, site.batch_shape)
            if self.joint:
                scaled = rows(scale_and_mask(log_prob, node["scale"], node["mask"]), site.batch_shape)
                total = total + (scaled.sum() if count is None else scaled.reshape(count, -1).sum(1))
        if self.joint:
            out["lp", ""] = torch.as_tensor(total)
        return out


def _read(nodes: Mapping[str, Any]) -> dict[str, Site]:
    return {name: read_site(name, node) for name, node in nodes.items() if not site_is_subsample(node)}


def _rows(value: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """Read a batched value as ``(count, *shape)``: the draws first, then ones, then the shape at one draw."""
    size = math.prod(shape)
    if value.dim() and value.shape[0] == count and value.numel() == count * size:
        if [n for n in value.shape[1:] if n != 1] == [n for n in shape if n != 1]:
            return value.reshape(count, *shape)
    elif value.numel() == size:
        return value.reshape(shape).expand(count, *shape)
    raise _CannotBatch(f"a batch of {count} draws of shape {shape} came out with shape {tuple(value.shape)}")


def _under_plate(job: _Job, given: dict[str, Tensor], count: int, sites: dict[str, Site]) -> Outputs:
    depth = max((site.depth for site in sites.values()), default=0)
    wide = {}
    for name, value in given.items():
        shape = sites[name].shape
        batch_ndim = len(shape) - sites[name].event_dim
        wide[name] = value.reshape(count, *(1,) * (depth - batch_ndim), *shape)
    return job.outputs(wide, sites, count, pyro.plate(_DRAWS, count, dim=-depth - 1))


def _under_vmap(job: _Job, given: dict[str, Tensor], count: int, sites: dict[str, Site]) -> Outputs:
    def one(values: dict[str, Tensor], _: Tensor) -> dict[str, Tensor]:
        return {"\0".join(key): value for key, value in job.outputs(values, sites).items()}

    found = torch.func.vmap(one, randomness="different")(given, torch.arange(count))
    return {(key.split("\0")[0], key.split("\0")[1]): value for key, value in found.items()}


def _at_once(job: _Job, given: dict[str, Tensor], count: int, sites: dict[str, Site]) -> tuple[str, Outputs]:
    """All draws in one run, and how; raises if that cannot be done or the result cannot be trusted."""
    method, held, drawn = "vmap", given, None
    if job.fresh:
        method, drawn = "plate", _under_plate(job, given, count, sites)
        held = given | {name: drawn["value", name] for name in job.fresh}
    exact = _under_vmap(job, held, count, sites)
    if drawn is not None:
        _compare(drawn, exact)
    picks = sorted({0, count // 2, count - 1})
    singles = [job.outputs({name: value[i] for name, value in held.items()}, sites) for i in picks]
    _compare(
        {key: rows[picks] for key, rows in exact.items()},
        {key: torch.stack([single[key] for single in singles]) for key in singles[0]},
    )
    return method, exact if drawn is None else drawn


def _compare(found: Outputs, exact: Outputs) -> None:
    """Raise if any number differs by more than rounding."""
    if found.keys() != exact.keys():
        raise _CannotBatch(f"sites differ: {sorted(found.keys() ^ exact.keys())}")
    for key, right in exact.items():
        value = found[key]
        if value.shape != right.shape or value.dtype != right.dtype:
            raise _CannotBatch(f"{key} has shape {tuple(value.shape)} where {tuple(right.shape)} is right")
        same = (value == right) | (value.isnan() & right.isnan())
        if right.dtype.is_floating_point and right.numel():
            tolerance, floor = (1e-7, 1e-10) if right.dtype == torch.float64 else (1e-3, 1e-6)
            # Rounding follows the usual size of an element, which other rows show where it crosses zero.
            size = right.abs().nan_to_num(0.0, 0.0, 0.0)
            usual, largest = size.median(0, keepdim=True).values, size.amax(0, keepdim=True)
            same |= (value - right).abs() <= tolerance * (size + usual) + floor * largest
        if not bool(same.all()):
            raise _CannotBatch(f"{key} differs between the batch and single draws")


def replay(
    call: Call,
    given: Mapping[str, Tensor],
    count: int,
    *,
    redraw: bool = False,
    wanted: Callable[[Site], bool] = lambda site: True,
    log_likelihood: bool = False,
    joint: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    label: str = "replay",
) -> Replayed:
    """Run a model at every draw and collect values and log-densities.

    Args:
        call: the model and its arguments.
        given: latent sites held fixed, name -> ``(count, *shape)``; sites that are not given are drawn.
        count: number of draws.
        redraw: draw observed sites from their distribution instead of holding them at the data.
        wanted: which sites' values to collect.
        log_likelihood: collect the log-density of every observed site, one number per batch element.
        joint: collect ``lp``, the sum of the scaled and masked log-densities of all sites.
        seed: of everything that is drawn; the global random state is left as it was.
        batch_size: draws in one batch; by default as many as keep a batch's sites under 4 million numbers, at
            most 512.
        progress: show a bar once the replay has taken two seconds.
        label: the bar's name.

    Returns:
        Arrays of shape ``(count, *shape)``, the sites at the first draw, and the method used.

    Raises:
        ValueError: if given draws do not fit the model, or its sites change from draw to draw.
    """
    job = _Job(call, redraw, wanted, log_likelihood, joint)
    with quietly(seed), torch.no_grad():
        start_at = {name: value[0] for name, value in given.items()}
        first = _read(job.trace(start_at))
        given = {n: v for n, v in given.items() if n in first and first[n].kind == "latent"}
        fresh = frozenset(s.name for s in first.values() if s.random and s.name not in given)
        job = _Job(call, redraw, wanted, log_likelihood, joint, fresh)
        per_draw = sum(s.value.numel() + math.prod(s.batch_shape) for s in first.values())
        size = batch_size or max(1, min(_MAX_BATCH, _MAX_ELEMENTS // max(per_draw, 1)))
        used: list[str] = []
        arrays: dict[Key, np.ndarray] = {}
        with tqdm(total=count, desc=label, disable=not progress, delay=2.0, leave=False) as bar:
            for start in range(0, count, size):
                stop = min(start + size, count)
                part = {name: value[start:stop] for name, value in given.items()}
                found = _batch(job, part, stop - start, first, bar, used)
                for key, value in found.items():
                    what, name = key
                    if what == "log_prob" and first[name].kind != "observed":
                        continue  # only there for the comparison
                    if what in ("value", "base") and not wanted(first[name]):
                        continue
                    array = to_numpy(value)
                    store = arrays.setdefault(key, np.empty((count, *array.shape[1:]), array.dtype))
                    store[start:stop] = array
    return Replayed(arrays, first, "+".join(dict.fromkeys(used)))


def _batch(
    job: _Job,
    given: dict[str, Tensor],
    count: int,
    sites: dict[str, Site],
    bar: tqdm,
    used: list[str],
) -> Outputs:
    """One batch, at once if that can be trusted; after the first failure in a loop."""
    if count > 1 and "loop" not in used:
        try:
            method, found = _at_once(job, given, count, sites)
        except Exception:
            pass  # Whatever a batch cannot do, the loop can, or it raises the model's own error.
        else:
            used.append(method)
            bar.update(count)
            return found
    singles = []
    for i in range(count):
        singles.append(job.outputs({name: value[i] for name, value in given.items()}, sites))
        bar.update()
    used.append("loop")
    return {key: torch.stack([single[key] for single in singles]) for key in singles[0]}


def describe(call: Call, given: Mapping[str, Tensor] | None = None, seed: int = 0) -> tuple[dict[str, Site], set[str]]:
    """The sites of a model at one draw, and the names of the plates that show only part of their data.

    Args:
        call: the model and its arguments.
        given: latent sites held fixed, name -> ``(*shape)``; the others are drawn.
        seed: of what is drawn.
    """
    job = _Job(call, False, lambda site: False, False, False)
    with quietly(seed), torch.no_grad():
        nodes = job.trace(given or {})
        sites = _read(nodes)
    plates = {name: node["fn"] for name, node in nodes.items() if site_is_subsample(node)}
    return sites, {n for n, f in plates.items() if f.subsample_size is not None and f.subsample_size < f.size}
