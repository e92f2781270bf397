"""How finely a flow must be solved: measured on held-out data, not hoped for."""

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.precision import full_precision
from .flow import InflationaryFlow, log_normal
from .solver.fidelity import fidelity
from .solver.grid import Grid
from .solver.steps import take

STEPS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
MEASURED = 24  # steps whose errors are measured to place the others
KNOTS = 33
_BAR = "{desc} {elapsed} {postfix}"
ROUNDING = 1e-7  # standard deviations; the error of a step in single precision is not known below it
MOST_STEPS = 16  # what the log-density may ask for: 64 evaluations with rk4
LOG_PROB = 5.0  # nats of error in the log-density, on average, for one standard deviation of tolerance
MOST_REFINEMENTS = 5
FEWEST_ROWS = 64  # from which the spread of a column is taken from rows
ROUND_TRIP = 2e-5  # standard deviations; rounding alone leaves about 1e-6 in single precision


class HasLatent(Protocol):
    """Whatever has latents."""

    @property
    def latent_dim(self) -> int:
        """How many."""
        ...


def choose_grid(
    flow: InflationaryFlow, x: Tensor, tolerance: float, rows: int = 256, *, progress: bool = False
) -> None:
    """Give the flow the fewest steps whose step-doubling error is within tolerance, its coarse map, and its inverse.

    The steps lie where they are needed (:func:`knots_for`). The error of a grid is the root-mean-square difference, in
    units of the data's standard deviations, between decoding with it and with twice its steps, over the latents of
    held-out rows. Up to 16 steps are granted to bring the mean error of the log-density below five times the tolerance
    (in nats), since thin data stretch it more than the positions. The coarse map is the cheapest one whose error is
    below a hundredth of a standard deviation; the inverse is refined until it closes the round trip. What was measured
    goes into ``flow.report["numerics"]``.

    Args:
        flow: the flow; its ``grid`` and ``coarse_steps`` are replaced.
        x: held-out data, ``(N, *event_shape)``.
        tolerance: largest accepted error, in standard deviations.
        rows: number of rows to measure on; fewer in more than 128 dimensions.
        progress: show a progress bar over the things that are measured.
    """
    x = x[: affordable(rows, flow)]
    with torch.no_grad(), tqdm(desc="tuning the solver", disable=not progress, bar_format=_BAR) as bar:
        bar.set_postfix_str(f"encoding {len(x)} rows")
        flow.grid = Grid(MOST_STEPS)  # of whatever accuracy, these are latents to decode from
        z = flow.encode(x)
        knots = knots_for(flow, z)
        errors: dict[Grid, float] = {}
        for steps in STEPS:
            grid = Grid(steps, knots=knots)
            bar.set_postfix_str(f"{grid.evaluations} evaluations")
            errors[grid] = doubling_error(flow, z, grid)
            if errors[grid] <= tolerance:
                break
        flow.grid = min(errors, key=lambda grid: errors[grid])
        bar.set_postfix_str("log-densities")
        exact = flow.latent_dim <= flow.exact_up_to  # an estimated log-density has an error of its own
        while exact and flow.grid.steps < MOST_STEPS and _log_prob_error(flow, x) > LOG_PROB * tolerance:
            flow.grid = replace(flow.grid, steps=flow.grid.steps + 2)
        chosen = flow.grid
        flow.coarse_steps = next(
            (g.steps for g, error in errors.items() if g.steps < chosen.steps and error < 1e-2), chosen.steps
        )
        bar.set_postfix_str("the round trip")
        _choose_refinements(flow, x)
    flow.report["numerics"] = {"tolerance": tolerance, **measure(flow, x)}


def _choose_refinements(flow: InflationaryFlow, x: Tensor) -> None:
    """The fewest refinements that close the round trip; where none do, the fewest that come about as near."""
    errors: list[float] = []
    for flow.refinements in range(1, MOST_REFINEMENTS + 1):
        errors.append(round_trip(flow, x)[0])
        if errors[-1] <= ROUND_TRIP:
            return
    near = [k for k, error in enumerate(errors, 1) if error <= 1.2 * min(errors)]
    flow.refinements = near[0] if near else MOST_REFINEMENTS


@full_precision()
def knots_for(flow: InflationaryFlow, z: Tensor) -> tuple[float, ...]:
    r"""The times at equal shares of the effort that decoding ``z`` takes: knots of a
    :class:`~ifpyro.flow.solver.grid.Grid`.

    If the error of one step of length ``h`` at time ``t`` is ``c(t) h^(p+1)``, a given number of steps has the least
    sum of errors where their density is proportional to ``c^{1/(p+1)}``. Along the paths from ``z``, the error ``e_k``
    (root mean square) of single steps of length ``h_k`` is measured against two of half the length; the density is

    .. math:: \rho_k \propto e_k^{1/4} / h_k .

    For rk4 the exponent would be 1/5; 1/4 did a little better on trained flows, where early errors grow on the way.

    Args:
        flow: the flow.
        z: latents ``(n, D)``.
    """
    once, twice = flow.map.steps(z, Grid(MEASURED)).to_data, flow.map.steps(z, Grid(2 * MEASURED)).to_data
    efforts = torch.empty(MEASURED, dtype=torch.double)
    y = z
    for k, step in enumerate(once):
        halved = take(flow.velocity, twice[2 * k + 1], take(flow.velocity, twice[2 * k], y))
        error = float((take(flow.velocity, step, y) - halved).square().mean().sqrt())
        efforts[MEASURED - 1 - k] = (error + ROUNDING) ** 0.25  # paths run from time 1 to 0
        y = halved
    nodes = Grid(MEASURED).times().numpy()
    share = torch.cat([efforts.new_zeros(1), efforts.cumsum(0)]) / efforts.sum()
    inner = np.interp(np.arange(1, KNOTS - 1) / (KNOTS - 1), share.numpy(), nodes)
    return (0.0, *inner.tolist(), 1.0)


def measure(flow: InflationaryFlow, x: Tensor) -> dict[str, Any]:
    """Numerical errors of a flow on data ``x``: step doubling of the map and of the log-density, and the round trip.

    Returns:
        ``evaluations`` of one decode; ``doubling_rmse`` in standard deviations; ``log_prob_error``, the mean absolute
        difference of the log-density to that with twice the steps, in nats (where densities are estimates, with their
        own error); ``round_trip_rmse`` of
        ``decode(encode(x)) - x`` in standard deviations and of ``encode(decode(z)) - z``.
    """
    with torch.no_grad():
        data, latent = round_trip(flow, x)
        return {
            "evaluations": flow.grid.evaluations,
            "doubling_rmse": doubling_error(flow, flow.encode(x), flow.grid),
            "log_prob_error": _log_prob_error(flow, x),
            "round_trip_rmse": data,
            "round_trip_latent_rmse": latent,
        }


def latent_power(flow: InflationaryFlow, x: Tensor, rows: int = 1024) -> dict[str, Any]:
    """Mean square of the latents of rows spread over ``x``: 1 for a flow that fits, below 1 on rows it has memorised.

    Returns:
        ``mean`` over all entries, its ``standard_error``, the mean square of every axis in ``axes``, and ``rows`` used.
    """
    index = torch.arange(0, len(x), -(-len(x) // affordable(rows, flow)), device=x.device)
    with torch.no_grad():
        squares = flow.of_rows(index).encode(x[index]).square().double()
    per_row = squares.mean(1)
    return {
        "mean": float(per_row.mean()),
        "standard_error": float(per_row.std() / len(per_row) ** 0.5),
        "axes": [round(value, 4) for value in squares.mean(0).tolist()],
        "rows": len(per_row),
    }


def affordable(rows: int, flow: HasLatent) -> int:
    """Fewer rows where each has more than 128 entries: passes cost more, and errors are averaged over entries too."""
    return max(4, min(rows, rows * 128**2 // flow.latent_dim**2))


def round_trip(flow: InflationaryFlow, x: Tensor) -> tuple[float, float]:
    """RMSE of ``decode(encode(x)) - x`` in standard deviations of the columns, and of ``encode(decode(z)) - z``."""
    z = flow.encode(x)
    back = flow.decode(z)
    relative = (back - flow.chart.canonical(x)).reshape(len(x), -1) / _column_sd(flow, x)
    return float(relative.square().mean().sqrt()), float((flow.encode(back) - z).square().mean().sqrt())


def _column_sd(flow: InflationaryFlow, x: Tensor) -> Tensor:
    """Standard deviations of the data's columns, ``(D,)``: of the rows where they are enough to tell, and else of the
    Gaussian with the flow's mean and axes, seen through its support."""
    generator = torch.Generator().manual_seed(0)
    batch = flow.batch_shape or torch.Size([FEWEST_ROWS])  # a flow given conditions has as many as there are rows
    normal = torch.randn(*batch, flow.latent_dim, generator=generator, dtype=flow.dtype).to(flow.device)
    drawn = flow.chart.constrain(flow.basis.from_standard(normal), False)[0]
    expected = drawn.reshape(batch.numel(), -1).std(0).clamp_min(torch.finfo(flow.dtype).tiny)
    if len(x) < FEWEST_ROWS:
        return expected
    found = x.reshape(len(x), -1).std(0)
    return torch.where(found > 0, found, expected)


def _log_prob_error(flow: InflationaryFlow, x: Tensor) -> float:
    few = x[: affordable(64, flow)]
    flow = flow.of_rows(torch.arange(len(few), device=few.device))
    z, log_det = flow.encode_and_log_det(few)
    with fidelity(steps=2 * flow.grid.steps):
        finer, finer_log_det = flow.encode_and_log_det(few)
    return float((log_normal(z) + log_det - log_normal(finer) - finer_log_det).abs().mean())


def doubling_error(flow: InflationaryFlow, z: Tensor, grid: Grid) -> float:
    """RMSE of decoding ``z`` with a grid against decoding with half its step, in standard deviations."""
    once = flow.map.on_grid(z, grid)
    twice = flow.map.on_grid(z, replace(grid, steps=2 * grid.steps))
    return float((once - twice).square().mean().sqrt())
