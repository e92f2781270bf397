"""Flow-prior sites seen from their Gaussian latent.

A site ``x ~ T(z), z ~ N(0, I)`` whose transform ``T`` is a flow becomes two sites: the latent ``x_base ~ N(0,
I)``, which inference moves, and ``x = T(x_base)``, which the user reads. The joint density is unchanged in
distribution and no log-determinant is ever computed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.infer.reparam import TransformReparam

from ...flow.flow import InflationaryFlow


class _FlowReparam(TransformReparam):
    """Pyro's ``TransformReparam``, for masked flow priors too: the mask moves to the latent."""

    def apply(self, msg: Any) -> Any:
        fn = msg["fn"]
        if isinstance(fn, MaskedDistribution):
            with poutine.mask(mask=fn._mask):
                return self.apply({**msg, "fn": fn.base_dist})
        return super().apply(msg)


def reparam(model: Callable[..., Any]) -> Callable[..., Any]:
    """The same model with every flow-prior site ``x`` driven by its latent site ``x_base``.

    ::

        x_base ~ N(0, I),    x = T(x_base)

    ``x`` keeps its name, shape and place in plates and is recorded as a deterministic site; ``x_base`` has
    shape ``(*batch, latent_dim)``. Observed sites and transformed distributions without a flow are left
    alone. Use it to give a model with flow priors to Pyro's own SVI, autoguides or NUTS; ``ifpyro.MCMC`` and
    ``ifpyro.SMC`` apply it themselves.

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
    return poutine.reparam(model, config=flow_strategy)


def flow_strategy(msg: Any) -> TransformReparam | None:
    """How one site is reparameterised, for ``pyro.poutine.reparam``: latent flow priors, and nothing else."""
    return _FlowReparam() if not msg["is_observed"] and has_flow(msg["fn"]) else None


def has_flow(fn: Any) -> bool:
    """Whether a distribution is a transformed one with a flow among its transforms."""
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        fn = fn.base_dist
    if not isinstance(fn, torch.distributions.TransformedDistribution):
        return False
    return any(getattr(transform, "is_ifpyro_flow", False) for transform in _flatten(fn.transforms))


def _flatten(transforms: Any) -> Iterator[Any]:
    for transform in transforms:
        if isinstance(transform, torch.distributions.ComposeTransform):
            yield from _flatten(transform.parts)
        else:
            yield transform
