"""Log-densities with a standard error: the estimates of :mod:`ifpyro.flow.solver.traces` along the paths of data."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..core.precision import full_precision
from .solver.discrete_map import solve_to_latent
from .solver.steps import take_with_traces
from .solver.traces import hutch_plus_plus, hutchinson, signs

if TYPE_CHECKING:
    from .flow import InflationaryFlow


class LogProbEstimate(NamedTuple):
    """A log-density and how well it is known.

    Attributes:
        value: nats, shape ``(*batch,)``.
        standard_error: of ``value``, by the spread of independent estimates; zero where the value is exact. With ``p``
            estimates it has ``p - 1`` degrees of freedom: few of them call for Student's quantiles.
    """

    value: Tensor
    standard_error: Tensor


@full_precision()
def estimate_log_prob(
    flow: "InflationaryFlow", x: Tensor, probes: int, method: str, seed: int, batch_size: int | None
) -> LogProbEstimate:
    """See :meth:`ifpyro.InflationaryFlow.log_prob_estimate`."""
    makers = {"hutchinson": hutchinson, "hutch++": hutch_plus_plus}
    if method not in makers:
        raise ValueError(f"method expects one of {sorted(makers)}, got {method!r}")
    plus = method == "hutch++"
    least = 6 if plus else 2
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < least:
        raise ValueError(f"probes expects an integer >= {least} for {method!r} (one has no spread), got {probes!r}")
    # The products with Q itself are the third third. Q need not span everything, but a spread takes two estimates.
    vectors = max(4, min(2 * (probes // 3), 2 * (flow.latent_dim - 1))) if plus else probes
    generator = torch.Generator(flow.device).manual_seed(seed)

    def fresh(_: int, y: Tensor) -> Tensor:
        return signs((vectors, *y.shape), generator, y)

    values, errors = [], []
    with torch.no_grad():
        if flow.latent_dim <= flow.exact_up_to:
            exact = flow.log_prob(x, batch_size=batch_size)
            return LogProbEstimate(exact, torch.zeros_like(exact))
        v, batch, inside = flow.standardise(x, with_log_det=True)
        for rows in v.split(batch_size or max(1, len(v))):
            y = solve_to_latent(flow, rows, with_log_det=False)[0]
            base, total = log_normal(y), y.new_zeros(())
            trace = makers[method](flow.evaluated_velocity(), fresh)
            for step in flow.solver(y).to_data:
                y, parts = take_with_traces(step, y, trace)
                total = total + parts
            values.append(base - total.mean(0))
            errors.append(total.std(0) / len(total) ** 0.5)
    value = torch.cat(values).reshape(batch) - flow.basis.log_det() - inside
    return LogProbEstimate(value, torch.cat(errors).reshape(batch))


def log_normal(z: Tensor) -> Tensor:
    """Log-density of ``N(0, I)`` at ``z`` of shape ``(*batch, D)``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
