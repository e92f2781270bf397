r"""Flow-prior sites seen from their Gaussian latent.

A site ``x ~ T(z), z ~ N(0, I)`` whose transform ``T`` has a flow in it becomes two sites: the latent ``x_base ~ N(0,
I)``, which inference moves, and ``x = T(x_base)``, which the user reads. The joint density is unchanged in
distribution and no log-determinant is ever computed.

Only where the model scales or masks the site is one needed. ``poutine.scale`` with a factor ``s`` asks for ``p(x)^s``,
and not for ``N(z; 0, I)^s``, which is another density of ``x``; seen from ``z``,

.. math:: \log N(z; 0, I) + (s - 1) \left( \log N(z; 0, I) - \log |\det T'(z)| \right) ,

and with a mask, which is ``s = 0``, the density is flat in ``x``: ``log|det T'(z)|``. What is added to the latent's own
density is a factor, ``x_scaled``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import MaskedDistribution
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.reparam_messenger import ReparamHandler, ReparamMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Size, Tensor
from torch.distributions import ComposeTransform, Independent, TransformedDistribution

from ...core.errors import ModelError
from ...flow.flow import InflationaryFlow

SCALED_BASE = "_ifpyro_scaled_base"
"""Under this key the ``infer`` of a factor names the latent whose scaled or masked density it completes."""

_OWN = "_ifpyro_own"  # what a messenger has made itself: its identity, the name and the scale of the site


def reparam(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same model with every flow-prior site ``x`` driven by its latent site ``x_base``.

    ::

        x_base ~ N(0, I),    x = T(x_base)

    ``x`` keeps its name, shape and place in plates and is recorded as a deterministic site; ``x_base`` has
    shape ``(*batch, latent_dim)``. ``T`` may consist of several transforms, the flow among them. Where the model
    scales or masks ``x``, a factor ``x_scaled`` keeps the density that of the model. Observed sites and transformed
    distributions without a flow are left alone. Use it to give a model with flow priors to Pyro's own SVI, autoguides
    or NUTS; ``ifpyro.MCMC`` and ``ifpyro.SMC`` apply it themselves.

    Args:
        model: any Pyro model.

    Returns:
        A Pyro model with the same arguments and return value.

    Raises:
        TypeError: if ``model`` is not callable.

    Source: Gorinova, Moore & Hoffman 2019, "Automatic reparameterisation of probabilistic programs".

    Example:
        >>> def model():
        ...     return pyro.sample("x", flow.prior())
        ...
        >>> trace = pyro.poutine.trace(ifpyro.reparam(model)).get_trace()
        >>> [name for name in trace.nodes if not name.startswith("_")]
        ['x_base', 'x']
    """
    if not callable(model) or isinstance(model, InflationaryFlow):
        raise TypeError(f"reparam expects a Pyro model (a callable), got {type(model).__name__}")
    handler: Callable[..., Any] = ReparamHandler(_FlowMessenger(), model)
    return handler


def has_flow(fn: Any) -> bool:
    """Whether a distribution is a transformed one with a flow among its transforms."""
    return any(getattr(transform, "is_ifpyro_flow", False) for transform in _unfold(fn).transforms)


class _Unfolded(NamedTuple):
    """A transformed distribution taken apart."""

    base: Any
    transforms: list[Any]
    """From the base to the value, compositions taken apart."""
    masks: list[Any]
    """Of the distribution, and of those it wraps."""
    inner_mask: bool
    """Whether a mask lies within an event: such a mask is not one of the site."""


def _unfold(fn: Any) -> _Unfolded:
    transforms: list[Any] = []
    masks: list[Any] = []
    wrapped = inner = False
    while True:
        if isinstance(fn, MaskedDistribution):
            inner |= wrapped
            masks.append(fn._mask)
        elif isinstance(fn, TransformedDistribution):
            transforms[:0] = _flat(fn.transforms)
            wrapped = True
        elif isinstance(fn, Independent) and isinstance(
            fn.base_dist, (Independent, MaskedDistribution, TransformedDistribution)
        ):
            wrapped = True
        else:
            return _Unfolded(fn, transforms, masks, inner)
        fn = fn.base_dist


def _flat(transforms: Any) -> list[Any]:
    found: list[Any] = []
    for transform in transforms:
        found += _flat(transform.parts) if isinstance(transform, ComposeTransform) else [transform]
    return found


class _FlowMessenger(ReparamMessenger):
    """Reparameterises flow-prior sites, and keeps the scales, masks and prefixes of their names, which the model gives
    to what stands in their place a second time, from acting twice."""

    def __init__(self) -> None:
        super().__init__({})

    def _pyro_sample(self, msg: Any) -> None:
        own = msg["infer"].get(_OWN)
        if own is not None and own[0] == id(self):
            msg["name"], msg["scale"] = own[1:]
            if SCALED_BASE in msg["infer"]:
                msg["mask"] = None
            return
        if type(msg["fn"]).__name__ == "_Subsample" or msg["is_observed"] or not has_flow(msg["fn"]):
            return
        # Every draw of a subsample stands for several, whose latents are as many: N(z) itself is repeated.
        stands_for: Any = 1.0
        frames = {frame.name for frame in msg["cond_indep_stack"]}
        for messenger in _PYRO_STACK:
            if isinstance(messenger, SubsampleMessenger) and messenger.name in frames:
                stands_for = stands_for * messenger.size / messenger.subsample_size
        self.config = {msg["name"]: _FlowReparam(id(self), msg["scale"] / stands_for, stands_for, msg["mask"])}
        try:
            super()._pyro_sample(msg)
        finally:
            self.config = {}


class _FlowReparam(Reparam):
    """How one site is reparameterised.

    Args:
        owner: identity of the messenger.
        scale: the scale that the model gives it.
        stands_for: the scale of a subsample.
        mask: the mask that the model gives it, or None.
    """

    def __init__(self, owner: int, scale: Any, stands_for: Any, mask: Any) -> None:
        self.owner, self.scale, self.stands_for, self.mask = owner, scale, stands_for, mask

    def apply(self, msg: Any) -> Any:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        base, transforms, masks, inner_mask = _unfold(fn)
        if inner_mask:
            raise ModelError(
                f"flow-prior site {name!r} has a mask inside its event: apply .mask(...) after .to_event() and all "
                "transforms, or use poutine.mask"
            )
        base = base.to_event(len(base.batch_shape) - len(fn.batch_shape))
        z = value
        for transform in reversed(transforms) if value is not None else ():
            z = transform.inv(z)
        for mask in masks:
            base = base.mask(mask)
        # The model's own mask and scale act on this statement as they do on every other.
        z = pyro.sample(
            f"{name}_base", base, obs=z, infer={"is_observed": msg["is_observed"], **self._infer(f"{name}_base")}
        )
        x = value
        if x is None:
            x = z
            for transform in transforms:
                x = transform(x)
        for mask in masks:
            self.mask = mask if self.mask is None else self.mask & mask
        # A number is seen not to scale; a tensor, which may be part of a batch of draws, cannot be asked.
        if isinstance(self.scale, Tensor) or self.scale != 1 or (self.mask is not None and self.mask is not True):
            plain = base.base_dist if masks else base
            while isinstance(plain, MaskedDistribution):
                plain = plain.base_dist
            factor = Unit(plain, transforms, z, self.scale, self.mask)
            infer = {"is_auxiliary": True, SCALED_BASE: f"{name}_base", **self._infer(f"{name}_scaled")}
            pyro.sample(f"{name}_scaled", factor, obs=factor.sample(), infer=infer)
        return {"fn": dist.Delta(x, event_dim=fn.event_dim).mask(False), "value": x, "is_observed": True}

    def _infer(self, name: str) -> dict[str, Any]:
        return {_OWN: (self.owner, name, self.stands_for)}


class Unit(dist.TorchDistribution):  # Pyro knows factors by this name
    """What a scale and a mask of ``x = T(z)`` add to the density of ``z``, computed when it is asked for.

    Args:
        base: distribution of ``z``.
        transforms: ``T``, in order.
        z: the latent.
        scale: the power of ``p(x)``.
        mask: where it counts; None everywhere.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own name)
    support = torch.distributions.constraints.real

    def __init__(self, base: Any, transforms: list[Any], z: Tensor, scale: Any, mask: Any) -> None:
        self._base, self._transforms, self._z, self._scale, self._mask = base, transforms, z, scale, mask
        super().__init__(base.batch_shape, Size((0,)), validate_args=False)

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008 (as in torch)
        """Nothing, once for every element of the batch."""
        return self._z.new_empty(sample_shape + self.shape())

    def expand(self, batch_shape: Size, _instance: Any = None) -> "Unit":
        """The same, for as many elements as the latent has."""
        return Unit(self._base.expand(batch_shape), self._transforms, self._z, self._scale, self._mask)

    @property
    def log_factor(self) -> Tensor:
        """One number for every element of the batch."""
        log_normal, log_det = self._terms()
        scaled = (self._scale - 1) * (log_normal - log_det)
        if self._mask is None or self._mask is True:
            return scaled
        return torch.where(torch.as_tensor(self._mask, device=scaled.device), scaled, log_det)

    def unmasked(self) -> "Unit | None":
        """The same without the mask; None where nothing is left of it."""
        if not isinstance(self._scale, Tensor) and self._scale == 1:
            return None
        return Unit(self._base, self._transforms, self._z, self._scale, None)

    def log_prob(self, value: Tensor) -> Tensor:
        """The factor, whatever the value."""
        return self.log_factor

    def _terms(self) -> tuple[Tensor, Tensor]:
        """``log N(z)`` and ``log|det T'(z)|``, one number for every element of the batch."""
        batch = self._z.dim() - self._base.event_dim
        log_det = self._z.new_zeros(())
        y = self._z
        for transform in self._transforms:
            after = transform(y)
            part = transform.log_abs_det_jacobian(y, after)
            log_det = log_det + (part.flatten(batch).sum(-1) if part.dim() > batch else part)
            y = after
        return self._base.log_prob(self._z), log_det
