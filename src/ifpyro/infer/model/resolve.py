"""From what the user hands to a kernel, a Pyro model or a density, to the batched density the engines see."""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from ..engines.guided_density import Target, Value
from .density import BatchedDensity

MAX_STARTS = 20
"""How often an impossible prior draw is redrawn as a starting point."""


def check_model(model: object, kernel: str) -> None:
    """Raises ``TypeError`` unless ``model`` can be called."""
    if not callable(model):
        raise TypeError(
            f"{kernel} expects a Pyro model (a callable with pyro.sample statements), got {type(model).__name__}"
        )


def resolve_density(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    batching: Literal["plate", "vmap", "loop"] | None,
    batch_size: int | None,
    seed: int,
) -> BatchedDensity:
    """The batched density of ``model(*args, **kwargs)``; an object that already is one comes back as it is.

    Raises:
        TypeError: if arguments are given for a density, which takes none.
        ValueError: if there is nothing to infer.
    """
    if all(hasattr(model, name) for name in ("dim", "sample_prior", "sites", "gaussian_prior")):
        if args or kwargs:
            raise TypeError("run() expects no arguments when the kernel holds a density instead of a Pyro model")
        density = model
    else:
        from .batched import BatchedModel

        density = BatchedModel(model, args, kwargs, batching=batching, batch_size=batch_size, seed=seed)
    if density.dim < 1:
        raise ValueError("the model has no continuous latent site: there is nothing to infer")
    return density


def new_generator(density: BatchedDensity, seed: int) -> torch.Generator:
    """A generator on the device on which the density draws."""
    return torch.Generator(device=getattr(density, "device", "cpu")).manual_seed(seed)


def check_start(value: Value, what: str) -> None:
    """Raises ``ValueError`` if no row of ``value`` is possible under the model; warns if some are not
    numbers."""
    total = value.tempered(1.0)
    undefined = value.log_prior.isnan() | value.log_likelihood.isnan()
    if bool(undefined.all()):
        raise ValueError(
            f"the model's log-density is NaN at every one of {len(total)} {what}: check the likelihood for "
            "0/0, logarithms of negative numbers, or NaN in the data"
        )
    if not bool((total > -torch.inf).any()):
        raise ValueError(
            f"the observation is impossible (log-likelihood -inf) at every one of {len(total)} {what}: "
            "check that the data lie in the support of the likelihood, or widen the likelihood"
        )
    if bool((value.log_likelihood == torch.inf).any()):
        raise ValueError(f"the model's log-likelihood is +inf at some of {len(total)} {what}: is a scale in it 0?")
    if bool(undefined.any()):
        warnings.warn(
            f"the model's log-density is NaN at {int(undefined.sum())} of {len(total)} {what}; "
            "they count as impossible",
            stacklevel=3,
        )


def possible_prior_draws(target: Target, num: int, generator: torch.Generator) -> Tensor:
    """``num`` prior draws at which the posterior density is positive, ``(num, dim)``.

    Raises:
        ValueError: if some stay impossible after `MAX_STARTS` attempts.
    """
    q = target.density.sample_prior(num, generator)
    value = target.fine(q)
    check_start(value, "prior draws")
    for _ in range(MAX_STARTS):
        impossible = ~value.tempered(1.0).isfinite()
        if not bool(impossible.any()):
            return q
        q = torch.where(impossible[:, None], target.density.sample_prior(num, generator), q)
        value = target.fine(q)
    raise ValueError(
        f"{int((~value.tempered(1.0).isfinite()).sum())} of {num} chains found no possible start among "
        f"{MAX_STARTS} prior draws each: start from SMC (init='smc'), or give init as a dictionary"
    )
