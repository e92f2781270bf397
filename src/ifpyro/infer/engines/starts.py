"""Where chains and particles may start: draws of the prior at which the posterior is possible."""

import warnings

import torch
from torch import Tensor

from .guided_density import Target, Value

MAX_STARTS = 20
"""How often an impossible prior draw is redrawn as a starting point."""


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
