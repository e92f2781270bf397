"""Training on pairs: samples and their conditions."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.pool import Pool
from ..core.randomness import seeded
from ..data.charts import Chart
from ..data.conditions import Conditions, as_conditions
from ..data.parts import chart_of, with_cuts
from ..data.samples import as_samples, check_trainable, column_names, given_rows, held_out_count, some, to_unconstrained
from ..data.sources import open_source
from ..data.support import as_support
from ..flow.axes.basis import Basis, kind_for
from ..flow.axes.regression import ridge
from ..flow.axes.schedule import Schedule
from ..flow.conditional import ConditionalFlow
from ..flow.networks.conditional import ConditionalVelocity
from ..flow.networks.shifts import FeatureShift, ModuleShift, SetShift, Shift
from ..flow.networks.velocity import Velocity
from ..flow.tuning import affordable, choose_grid, latent_power
from . import checkpoint as checkpoints
from .in_memory import unlike_units
from .loop import Run, one_thread
from .recipe import Recipe, default_network, make_network
from .rows import RowsInMemory

FEW = 0.5
"""Distinct conditions per row below which whole conditions are held out, not rows."""

FEWEST = 8
"""Distinct conditions from which whole ones can be held out."""

NARROW = 0.2
"""The noise floor, in widths of the narrowest conditions' data."""

MEASURED = 256
"""Held-out pairs on which numerics are measured."""


@dataclass(frozen=True)
class Pairs:
    """Training and held-out pairs, conditions as they were given and in features."""

    conditions: Conditions
    chart: Chart
    x: Tensor
    c: Tensor
    held_out: Tensor
    held_out_c: Tensor


def fit_conditional(
    x: Any,
    condition: Any,
    *,
    labels: bool | Sequence[int] | None,
    sets: bool,
    condition_network: nn.Module | None,
    schedule: Schedule | None,
    network: Velocity | dict[str, Any] | None,
    validation: Any,
    max_steps: int | None,
    max_seconds: float | None,
    support: Any,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    progress: bool,
    own_units: bool | None,
    recipe: Recipe | None,
    tolerance: float,
    checkpoint: str | Path | None,
    pool: Pool,
    basis: Basis | str,
) -> ConditionalFlow:
    """Train a flow of ``x`` given ``condition``; see :func:`ifpyro.fit`."""
    pairs = _open(x, condition, validation, support, labels, sets, seed, device, dtype)
    train = to_unconstrained(pairs.x, pairs.chart)
    held_out = to_unconstrained(pairs.held_out, pairs.chart, "validation")
    features = pairs.conditions(pairs.c)
    check_trainable(train, full_rank=False)
    fitted = ridge(features, train)
    axes = _axes(basis, fitted.residuals, own_units, pairs.chart.free_shape).with_mean(fitted.intercept)

    def standard(rows: Tensor, c: Tensor) -> Tensor:
        return axes.to_standard(rows - pairs.conditions(c) @ fitted.coefficient)

    v = standard(train, pairs.c)
    schedule = schedule or Schedule.details_first(start=noise_floor(v, features))
    schedule.check_axes(axes.principal, axes.dim)
    size = axes.dim + pairs.conditions.width
    recipe = recipe or Recipe.for_data(len(train), size)
    with seeded(seed), one_thread():
        torch.manual_seed(seed)  # devices of other kinds too
        angles = schedule.angles(axes.scale)
        options = network
        if network is None or isinstance(network, dict):
            options = {**default_network(len(train), size), "dim": axes.dim, **(network or {})}
        inner = make_network(options, len(train), axes, angles)
        shift = _shift(condition_network, pairs, inner, options if isinstance(options, dict) else {})
        net = ConditionalVelocity(inner, shift.to(axes.scale)).train()

        def with_known(rows: Tensor, c: Tensor) -> Tensor:
            conditions = pairs.conditions
            known = conditions(c) if shift.takes == "features" else conditions.inputs(c).flatten(1)
            return torch.cat([standard(rows, c), known], 1)

        rows = with_known(train, pairs.c)
        digest = hashlib.sha256(rows.nan_to_num(-1e30).cpu().numpy().tobytes()).hexdigest()[:16]
        known = rows.shape[1] - axes.dim
        kept_out = with_known(held_out, pairs.held_out_c)
        run = Run(net, angles, RowsInMemory(rows), kept_out, recipe, len(train), digest, pool, conditions=known)
        limit = max_steps if max_steps is not None else recipe.max_steps
        stopped = checkpoints.train(run, checkpoint, schedule, seed, limit, max_seconds, progress)
    run.best_network()
    flow = ConditionalFlow(
        pairs.conditions,
        axes,
        fitted.coefficient,
        schedule,
        net,
        event_shape=pairs.x.shape[1:],
        support=pairs.chart.support,
        report={
            "training": {
                **run.report(stopped, seed),
                "features": pairs.conditions.width,
                "penalty": fitted.penalty,
                "explained": explained(train, fitted.residuals),
            }
        },
    )
    few, few_c = (pairs.held_out, pairs.held_out_c) if len(held_out) >= 32 else (pairs.x, pairs.c)
    count = affordable(MEASURED, flow)
    measured = flow.given(_as_given(few_c[:count], pairs.conditions))
    choose_grid(measured, few[:count], tolerance)
    flow.grid, flow.coarse_steps = measured.grid, measured.coarse_steps
    flow.refinements = measured.refinements
    flow.report["numerics"] = measured.report["numerics"]
    spread = torch.linspace(0, len(pairs.x) - 1, min(len(pairs.x), 1024)).long()
    flow.report["training"]["latents"] = latent_power(
        flow.given(_as_given(pairs.c[spread], pairs.conditions)), pairs.x[spread]
    )
    return flow


def explained(x: Tensor, residuals: Tensor) -> float:
    """Share of the variance of held-out rows that the regression explains, averaged over columns."""
    return float(1 - (residuals.square().mean(0) / x.var(0)).mean())


def noise_floor(v: Tensor, features: Tensor, most: float = 0.01, neighbours: int = 12) -> float:
    """The angle at which noise is a fifth as wide as the data of the narrowest conditions, at most ``most``.

    The width at a condition is the smallest standard deviation, along any direction, of the rows whose features are
    nearest: an upper bound, since their conditions differ. The twentieth percentile over conditions counts.

    Args:
        v: Standardised residuals, ``(N, D)``.
        features: ``(N, p)``.
        most: The floor of data without conditions.
        neighbours: Rows at one condition; more in many dimensions.
    """
    count = max(neighbours, 3 * v.shape[1])
    if len(v) < 4 * count or v.shape[1] > 32:
        return most
    some_rows = torch.linspace(0, len(v) - 1, min(len(v), 4096)).long().to(v.device)
    asked = some_rows[torch.linspace(0, len(some_rows) - 1, min(len(some_rows), 256)).long()]
    near = torch.cdist(features[asked], features[some_rows]).topk(count, largest=False).indices
    there = v[some_rows][near].double()
    centred = there - there.mean(1, keepdim=True)
    width = torch.linalg.svdvals(centred)[:, -1] / (count - 1) ** 0.5
    return float((NARROW * width.quantile(0.05)).clamp(most / 10, most))


def _open(
    x: Any,
    condition: Any,
    validation: Any,
    support: Any,
    labels: bool | Sequence[int] | None,
    sets: bool,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Pairs:
    if open_source(x, seed, dtype) is not None:
        raise TypeError(
            f"fit with a condition expects samples in memory, got {type(x).__name__}; load them, for instance "
            "np.asarray(x), or train on a part"
        )
    names = column_names(x)
    x = as_samples(x, dtype=dtype, hold=True)
    x = x.to(device) if device is not None else x
    chart = chart_of(with_cuts(as_support(support, x.shape[1:], names), x), x.shape[1:]).to(x)
    to_unconstrained(x, chart)  # refuses rows outside by the indices that the caller knows
    x = chart.canonical(x)
    c = as_conditions(condition, len(x), labels, x.dtype).to(x.device)
    if sets and (c.ndim != 3 or labels not in (None, False)):
        raise ValueError(
            f"sets=True expects conditions of shape (N, elements, columns) of numbers, got {tuple(c.shape)}; pad sets "
            "of unequal size with rows of NaN"
        )
    conditions = Conditions.of(c, labels=False if labels is None else labels, sets=sets)
    if isinstance(validation, Real) and not isinstance(validation, bool):
        held_out = _held_out(c, conditions, float(validation), torch.Generator().manual_seed(seed)).to(x.device)
        return Pairs(conditions, chart, x[~held_out], c[~held_out], x[held_out], c[held_out])
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise ValueError(
            f"validation expects a fraction or a pair (x, condition) of held-out rows, got {type(validation).__name__}"
        )
    rows = chart.canonical(given_rows(validation[0], x.shape[1:], x.dtype).to(x.device))
    own = as_conditions(validation[1], len(rows), labels, x.dtype)
    own = conditions.check(_as_given(own, conditions), x.dtype, x.device)
    return Pairs(conditions, chart, x, c, rows, own)


def _as_given(c: Tensor, conditions: Conditions) -> Tensor:
    """Conditions as their user gives them: labels as integers."""
    return c.long() if conditions.all_labels else c


def _held_out(c: Tensor, conditions: Conditions, fraction: float, generator: torch.Generator) -> Tensor:
    """Which rows are held out, ``(N,)``: random ones, or all of random conditions where these are few.

    Classes are no conditions to hold out: what is not seen cannot be learnt.
    """
    count = held_out_count(len(c), fraction)
    distinct, which = c.reshape(len(c), -1).nan_to_num(0.0).unique(dim=0, return_inverse=True)
    if not conditions.labels and FEWEST <= len(distinct) < FEW * len(c):
        order = torch.randperm(len(distinct), generator=generator).to(c.device)
        chosen = order[: held_out_count(len(distinct), fraction)]
        return torch.isin(which.reshape(-1), chosen)
    mask = torch.zeros(len(c), dtype=torch.bool)
    mask[torch.randperm(len(c), generator=generator)[:count]] = True
    return mask


def _axes(basis: Basis | str, residuals: Tensor, own_units: bool | None, shape: torch.Size) -> Basis:
    if isinstance(basis, Basis):
        if basis.dim != residuals.shape[1]:
            raise ValueError(
                f"expected a basis of {residuals.shape[1]} axes, one for each column of the data, got {basis.dim}"
            )
        return copy.deepcopy(basis).to(residuals)
    kind = kind_for(basis, residuals.shape[1], shape)
    check_trainable(residuals, full_rank=kind == "pca")
    flat = residuals.std(0)
    fixed = torch.nonzero(flat <= 1e-6 * flat.max()).flatten()
    if len(fixed) and len(fixed) < len(flat) and kind == "pca" and own_units is False:
        raise ValueError(
            f"expected data that vary given the condition, but columns {some(fixed)} are functions of it; drop them"
        )
    own_units = unlike_units(flat) if own_units is None else own_units
    return Basis.choose(residuals, kind, own_units=own_units, event_shape=shape)


def _shift(module: nn.Module | None, pairs: Pairs, inner: Velocity, options: dict[str, Any]) -> Shift:
    """What turns conditions into shifts of a network's embedding."""
    probe = torch.full((1,), 0.5, dtype=torch.double, device=pairs.x.device)
    with torch.no_grad():
        size = inner.embed(probe).shape[-1]
    conditions = pairs.conditions
    if module is None:
        dropout = float(options.get("dropout", 0.0))
        if conditions.sets:
            elements, dim = conditions.shape
            return SetShift(elements, dim, size, dropout=dropout)
        return FeatureShift(conditions.width, size, dropout=dropout)
    if not isinstance(module, nn.Module):
        raise TypeError(f"condition_network expects a torch module, got {type(module).__name__}")
    module = copy.deepcopy(module).to(pairs.x).train()
    with torch.no_grad(), seeded(0):
        out = module(conditions.inputs(pairs.c[:2]))
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"condition_network expects to map conditions (n, {', '.join(map(str, conditions.shape))}) to (n, K), got "
            f"{found} for n = 2"
        )
    return ModuleShift(module, conditions.shape, out.shape[1], size)
