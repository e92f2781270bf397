"""``fit``: from samples to a flow."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn

from ..core.arguments import check_device, check_seed, check_type, is_integer, is_number
from ..core.files import check_writable
from ..core.pool import Pool
from ..core.randomness import seeded
from ..data.arrays import check_dtype
from ..data.samples import as_samples, column_names
from ..data.sources import open_source
from ..flow import reconstruction
from ..flow.axes.basis import Basis
from ..flow.axes.schedule import Schedule
from ..flow.conditional import ConditionalFlow
from ..flow.flow import InflationaryFlow
from ..flow.networks.velocity import Velocity
from ..flow.solver.grid import Grid
from ..flow.tuning import MOST_REFINEMENTS, MOST_STEPS, choose_grid, latent_power
from . import checkpoint as checkpoints
from .conditional import fit_conditional
from .in_memory import Data, InMemory
from .loop import Run, one_thread
from .options import FitOptions
from .recipe import Recipe, make_network
from .streamed import Streamed


@overload
def fit(x: Any, *, condition: None = None, **options: Unpack[FitOptions]) -> InflationaryFlow: ...


@overload
def fit(x: Any, *, condition: Any, **options: Unpack[FitOptions]) -> ConditionalFlow: ...


@torch.inference_mode(False)  # inside such a block nothing can be trained
def fit(
    x: Any,
    *,
    condition: Any = None,
    labels: bool | Sequence[int] | None = None,
    sets: bool = False,
    condition_network: nn.Module | None = None,
    schedule: Schedule | None = None,
    network: Velocity | dict[str, Any] | None = None,
    validation: float | Any = 0.1,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    support: Any = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    own_units: bool | None = None,
    recipe: Recipe | None = None,
    tolerance: float = 1e-3,
    checkpoint: str | Path | None = None,
    pool: Pool | None = None,
    basis: Basis | str = "auto",
) -> InflationaryFlow | ConditionalFlow:
    """Train an inflationary flow on samples, or on samples and the conditions they belong to.

    Ctrl-C ends training early and returns the best flow so far; after the training it ends the measurements that choose
    the solver's steps, and returns the flow with steps enough for most.

    Args:
        x: samples, array or tensor of shape ``(N, *event)``; or data that need not fit into memory: a memory-mapped
            array, any ``torch.utils.data`` data set or data loader (of an item that is a tuple, such as (image, label),
            the first entry counts), or an array stored in zarr or HDF5. Of these only chunks are ever loaded, and the
            axes are found in one pass. What decodes slowly is best given as a ``DataLoader`` with workers.
        condition: what each sample is to depend on: ``(N, *shape)`` numbers, with NaN for what is missing; the flow is
            then conditional. Samples must be in memory. An untrained conditional flow is linear regression on the
            conditions, with the covariance of its residuals.
        labels: True if the conditions are integers that name classes, the columns that do if only some, False for
            integers that are numbers. Integers are refused by default, because they could be either.
        sets: whether a condition is a set, ``(elements, columns)``, whose order means nothing; absent elements are rows
            of NaN.
        condition_network: any torch module from standardised conditions ``(n, *shape)`` to ``(n, K)``; a perceptron,
            and for sets one of every element, by default.
        schedule: ``Schedule.details_first()`` by default; of narrow conditional distributions with less noise at its
            start.
        network: options for the default network (``{"width": 256}``), or any
            :class:`~ifpyro.flow.networks.velocity.Velocity`, which is copied.
        validation: the fraction of rows held out for early stopping, or the held-out rows themselves. Rows of a stream
            are told apart by their content: where it changes from pass to pass (augmentation, fresh dequantisation
            noise), give held-out rows. With conditions, a pair ``(x, condition)``; of a fraction whole conditions are
            held out where few are distinct.
        max_steps: most optimiser steps; the learning rate is annealed over them.
        max_seconds: most seconds of training; whichever limit is nearer drives the annealing.
        support: what all samples obey: a torch or Pyro constraint; one of the names ``"real"``, ``"positive"``,
            ``"nonnegative"``, ``"unit"``, ``"simplex"``, ``"circular"``; a list with one of these for every column; or
            a dictionary of them by the column's name or index. Training happens in unconstrained space. For circles of
            another period than ``2 pi`` see :func:`ifpyro.circular`.
        seed: makes the result repeatable; a fresh one is drawn, and reported, by default.
        device: where to train; where ``x`` is, by default.
        dtype: of the flow, ``torch.float32`` or ``torch.float64``; a model that it stands in wants the same. By default
            that of a tensor, or of an array of single precision; for all other data (NumPy's double precision and
            integers, tables) torch's default dtype, but double precision where single precision cannot hold a column,
            such as Julian dates (see :mod:`ifpyro.data.arrays`). The seed decides the result: torch's default dtype,
            apart from that choice, does not.
        progress: show a progress bar.
        own_units: measure every column in its own standard deviation before the axes are found, as a table of unlike
            quantities wants and an image does not; by default where standard deviations differ tenfold or more.
        recipe: the optimiser's numbers; chosen from the size of the data by default.
        tolerance: accepted error of the solver, in standard deviations of the data (see :mod:`ifpyro.flow.tuning`).
        checkpoint: a file that is written about every half minute; if it exists, training resumes from it, provided
            that data, seed, schedule, recipe, network and axes are those of the training that wrote it; the limits may
            be others. Several processes must all see it.
        pool: the processes that train together, ``Pool.join()`` under ``torchrun`` or ``accelerate launch``: all call
            ``fit`` with the same arguments, all get the flow, and the result is that of one process up to rounding
            (and dropout). ``batch`` of the recipe counts the rows of all. Every process needs the data, of which it
            reads its share, but of a stream all.
        basis: the axes: ``"pca"`` (all eigenvectors of the covariance), ``"separable"`` (of images and other arrays:
            products of eigenvectors along each dimension, nearly as good and far cheaper), ``"low_rank"`` (the leading
            eigenvectors, and one scale for the rest), ``"identity"`` (the columns themselves, one scale), or a
            :class:`~ifpyro.flow.axes.basis.Basis`. By default ``pca`` up to 1,024 columns; beyond, ``separable`` for
            events of at least two dimensions, ``low_rank`` for vectors up to 16,384 columns.

    Returns:
        The flow, with what was measured in ``flow.report``; with conditions an :class:`~ifpyro.ConditionalFlow`.

    Raises:
        TypeError: if ``x`` is not an array of real numbers.
        ValueError: on samples or options that cannot work; the message says which and what to do.
        PoolError: if another process has died.

    Example:
        >>> samples = ifpyro.datasets.moons().sample(500, seed=0)
        >>> flow = ifpyro.fit(samples, max_steps=50, seed=0, progress=False)  # 6,000 steps without the limit
        >>> flow.event_shape, flow.report["training"]["steps"]
        (torch.Size([2]), 50)
    """
    _check_limits(max_steps, max_seconds, tolerance)
    check_type("schedule", schedule, (Schedule, NoneType), "a Schedule, such as Schedule.preserving(), or None")
    check_type("recipe", recipe, (Recipe, NoneType), "a Recipe, such as Recipe(rate=1e-3), or None")
    check_type("pool", pool, (Pool, NoneType), "a Pool, such as Pool.join(), or None")
    check_type("own_units", own_units, (bool, NoneType), "True, False or None")
    device = check_device(device)
    if checkpoint is not None:
        check_writable(checkpoint)
    x, validation = (v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in (x, validation))
    pool = Pool() if pool is None else pool
    progress = progress and pool.rank == 0
    check_dtype(dtype)
    fresh = torch.Generator().seed() % 2**31 if seed is None else check_seed(seed)
    seed = int(pool.share_bytes(str(fresh).encode()))
    if condition is None and (labels is not None or sets or condition_network is not None):
        raise ValueError(
            "labels, sets and condition_network describe a condition, but none was given: fit(x, condition=c)"
        )
    if condition is not None:
        return fit_conditional(
            x,
            condition,
            labels=labels,
            sets=sets,
            condition_network=condition_network,
            schedule=schedule,
            network=network,
            validation=validation,
            max_steps=max_steps,
            max_seconds=max_seconds,
            support=support,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=progress,
            own_units=own_units,
            recipe=recipe,
            tolerance=tolerance,
            checkpoint=checkpoint,
            pool=pool,
            basis=basis,
        )
    schedule = schedule or Schedule.details_first()
    kind = basis if isinstance(basis, str) else "identity"  # a given basis needs no covariances
    data = _open(x, validation, support, seed, device, dtype, pool, progress, kind)

    axes = _given(basis, data) if isinstance(basis, Basis) else data.basis(own_units, basis)
    schedule.check_axes(axes.principal, axes.dim)
    recipe = recipe or Recipe.for_data(data.count, axes.dim)
    limit = max_steps if max_steps is not None else recipe.max_steps
    # Layers initialise, and dropout draws, from torch's global stream: borrow it, and give it back as it was.
    with seeded(seed), one_thread():
        torch.manual_seed(seed)  # devices of other kinds too
        angles = schedule.angles(axes.scale)
        net = make_network(network, data.count, axes, angles)
        run = Run(
            net,
            angles,
            data.rows(axes),
            data.held_out_rows(axes),
            recipe,
            data.count,
            data.fingerprint(),
            pool,
        )
        stopped = checkpoints.train(run, checkpoint, schedule, seed, limit, max_seconds, progress)
    flow = InflationaryFlow(
        axes,
        schedule,
        run.best_network(),
        event_shape=data.event_shape,
        support=data.chart.support,
        report={"training": run.report(stopped, seed)},
    )
    try:
        choose_grid(flow, data.held_out if len(data.held_out) >= 32 else data.first, tolerance)
        flow.report["training"]["latents"] = latent_power(flow, data.kept)
        if flow.basis.principal:
            flow.report["reconstruction"] = reconstruction.measure(flow, data.kept, data.held_out)
    except KeyboardInterrupt:
        if pool.size > 1:
            raise
        told = _left_untuned(flow)
        warnings.warn(f"interrupted after the training, while the flow was measured: {told}", stacklevel=2)
    return flow


def _left_untuned(flow: InflationaryFlow) -> str:
    """See that a flow is solved well although nobody has measured how finely it must be; says how."""
    if "numerics" in flow.report:
        return "its solver is tuned; flow.report lacks the reconstruction errors or the power of the latents"
    flow.grid, flow.coarse_steps, flow.refinements = Grid(MOST_STEPS), MOST_STEPS // 2, MOST_REFINEMENTS
    return (
        f"it is solved in {MOST_STEPS} even steps, more than most flows need; tune it with "
        "ifpyro.flow.tuning.choose_grid(flow, held_out_rows, tolerance)"
    )


def _given(basis: Basis, data: Data) -> Basis:
    columns = data.chart.free_shape.numel()
    if basis.dim != columns:
        raise ValueError(f"expected a basis of {columns} axes, one for each column of the data, got {basis.dim}")
    return copy.deepcopy(basis).to(data.kept)


def _open(
    x: Any,
    validation: Any,
    support: Any,
    seed: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    pool: Pool,
    progress: bool,
    kind: str,
) -> Data:
    source = open_source(x, seed, dtype)
    if source is not None:
        return Streamed(source, validation, support, seed, device, pool, progress, kind)
    names = column_names(x)
    x = as_samples(x, dtype=dtype, hold=True)
    x = x.to(device) if device is not None else x
    return InMemory(x, validation, support, torch.Generator().manual_seed(seed), names)


def _check_limits(max_steps: int | None, max_seconds: float | None, tolerance: float) -> None:
    if max_steps is not None and not is_integer(max_steps, 0):
        raise ValueError(f"max_steps expects an integer >= 0 (0 gives a Gaussian), got {max_steps!r}")
    if max_seconds is not None and not (is_number(max_seconds) and max_seconds > 0):
        raise ValueError(f"max_seconds expects a positive number of seconds, got {max_seconds!r}")
    if not (is_number(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance expects a positive number, got {tolerance!r}")
