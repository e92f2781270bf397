"""What the statements of a Pyro model are: latent, observed, computed or a factor; their shapes, plates,
flows.

Everything here looks at one run of a model at one draw.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor
from torch.distributions import TransformedDistribution

from ...core.precision import full_precision
from ...core.randomness import seeded

Kind = Literal["latent", "observed", "deterministic", "factor"]


@dataclass(frozen=True)
class Site:
    """One named statement of a model, as it looks at one draw.

    ``batch_shape`` is that of the log-density, ``depth`` the number of batch dimensions with those of the
    plates around it; ``plates`` names axes of the value, ``base_shape`` is that of a flow's latent. An
    ``auxiliary`` site belongs to a guide alone.
    """

    name: str
    kind: Kind
    value: Tensor
    batch_shape: tuple[int, ...]
    event_dim: int
    depth: int
    plates: dict[int, str]
    base_shape: tuple[int, ...] | None
    auxiliary: bool
    point_mass: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value at one draw."""
        return tuple(self.value.shape)

    @property
    def random(self) -> bool:
        """Whether a fresh run would draw this site by chance."""
        return self.kind == "latent" and not self.point_mass


@dataclass(frozen=True)
class Call:
    """A model with the arguments it is called with."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def core(fn: Any) -> Any:
    """The distribution under wrappers that only reshape or mask it."""
    while not isinstance(fn, TransformedDistribution) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def device_of(fn: Any) -> torch.device | None:
    """Where a distribution's parameters are, which is where its draws are; None if it does not tell."""
    fn = core(fn)
    while isinstance(fn, TransformedDistribution):
        fn = core(fn.base_dist)
    fn = getattr(fn, "component_distribution", fn)
    return next((value.device for value in vars(core(fn)).values() if isinstance(value, Tensor)), None)


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution has all its mass at one value, as autoguides use to return a computed draw."""
    return isinstance(core(fn), pyro.distributions.Delta)


def is_deterministic(msg: Mapping[str, Any]) -> bool:
    """Whether a site only records a value computed from others.

    Both ``pyro.deterministic`` and the reparameterisers record it as an observed point mass, masked out.
    """
    if msg["infer"].get("_deterministic", False):
        return True
    fn, masked = msg["fn"], False
    while not isinstance(fn, TransformedDistribution) and hasattr(fn, "base_dist"):
        masked = masked or getattr(fn, "_mask", None) is False
        fn = fn.base_dist
    return bool(msg["is_observed"]) and masked and isinstance(fn, pyro.distributions.Delta)


def has_flow(fn: Any) -> bool:
    """Whether a flow of this library is among a distribution's transforms."""
    found = False
    fn = core(fn)
    while isinstance(fn, TransformedDistribution):
        for transform in reversed(fn.transforms):
            parts = getattr(transform, "parts", [transform])
            found = found or any(getattr(part, "is_ifpyro_flow", False) for part in parts)
        fn = core(fn.base_dist)
    return found


def flow_base(fn: Any, value: Tensor) -> Tensor:
    """The value carried back through every transform to the base distribution."""
    fn = core(fn)
    while isinstance(fn, TransformedDistribution):
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        fn = core(fn.base_dist)
    return value


def flow_transforms(call: Call, seed: int) -> dict[str, Any]:
    """The transforms from latent to data of a model's flow sites, as one run shows them: name -> transform.

    Sites with other transforms besides are left out, since these may change from draw to draw; so are all sites of what
    is no Pyro model, or cannot be run with its latents drawn from the prior.
    """
    try:
        with quietly(seed), torch.no_grad():
            nodes = poutine.trace(call.model).get_trace(*call.args, **call.kwargs).nodes
    except Exception:
        return {}
    found = {}
    for name, node in nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and has_flow(node["fn"]):
            transforms = core(node["fn"]).transforms
            if len(transforms) == 1 and getattr(transforms[0], "is_ifpyro_flow", False):
                found[name] = transforms[0]
    return found


def read_site(name: str, node: Mapping[str, Any]) -> Site:
    """A site as the trace of one run shows it."""
    fn, value = node["fn"], torch.as_tensor(node["value"])
    kind: Kind
    if site_is_factor(node):
        kind = "factor"
    elif is_deterministic(node):
        kind = "deterministic"
    else:
        kind = "observed" if node["is_observed"] else "latent"
    base = flow_base(fn, value) if kind == "latent" and has_flow(fn) else None
    batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: max(value.dim() - fn.event_dim, 0)])
    return Site(
        name=name,
        kind=kind,
        value=value,
        batch_shape=tuple(batch) if kind != "deterministic" else (),
        event_dim=fn.event_dim,
        depth=max([len(batch), *(-f.dim for f in node["cond_indep_stack"] if f.vectorized)]),
        plates=_plates(node, value, kind),
        base_shape=None if base is None else tuple(base.shape),
        auxiliary=bool(node["infer"].get("is_auxiliary", False)),
        point_mass=is_point_mass(fn),
    )


def _plates(node: Mapping[str, Any], value: Tensor, kind: Kind) -> dict[int, str]:
    """Axes of a value that are plates: axis -> plate name."""
    frames = [f for f in node["cond_indep_stack"] if f.vectorized]
    if not frames:
        return {}
    ndim, event_dim = value.dim(), node["fn"].event_dim
    if kind == "deterministic" and event_dim == ndim:
        # pyro.deterministic counts every axis as an event by default; the plates then are the leftmost axes.
        event_dim = max(0, ndim - max(-f.dim for f in frames))
    axes = {ndim - event_dim + f.dim: f for f in frames}
    return {axis: f.name for axis, f in axes.items() if 0 <= axis < ndim and value.shape[axis] == f.size}


@contextmanager
def quietly(seed: int) -> Iterator[None]:
    """Run a model without a trace: random state, parameter store and validation flags come back as they were.

    Validation is off inside, as in Pyro's own MCMC: a draw on the edge of its support gives a density, not an
    error.
    """
    store = pyro.get_param_store()
    with (
        seeded(seed),
        full_precision(),
        store.scope(store.get_state()),
        pyro.validation_enabled(False),
        poutine.block(),
    ):
        yield


def to_numpy(value: Tensor) -> np.ndarray:
    """A tensor as a NumPy array of its own; bfloat16, which NumPy lacks, becomes float32."""
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        value = value.float()
    return np.array(value.numpy())
