"""``fit``: from samples to a flow."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from .. import reconstruction
from ..basis import Basis
from ..flow import InflationaryFlow
from ..numerics import choose_grid, latent_power
from ..samples import as_samples, check_trainable, split, to_unconstrained
from ..schedule import Schedule
from ..support import support_to_dict
from ..velocity import Velocity
from . import checkpoint as checkpoints
from .recipe import Recipe, make_network
from .run import Run


def fit(
    x: Any,
    *,
    schedule: Schedule | None = None,
    network: Velocity | dict[str, Any] | None = None,
    validation: float | Any = 0.1,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    support: Constraint | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    own_units: bool | None = None,
    recipe: Recipe | None = None,
    tolerance: float = 1e-3,
    checkpoint: str | Path | None = None,
) -> InflationaryFlow:
    """Train an inflationary flow on samples.

    Ctrl-C ends training early and returns the best flow so far.

    Args:
        x: samples, array or tensor of shape ``(N, *event)``.
        schedule: ``Schedule.details_first()`` by default.
        network: options for the default network (``{"width": 256}``), or any
            :class:`~ifpyro.velocity.Velocity`, which is copied.
        validation: the fraction of rows held out for early stopping, or the held-out rows themselves.
        max_steps: most optimiser steps; the learning rate is annealed over them.
        max_seconds: most seconds of training; whichever limit is nearer drives the annealing.
        support: a torch constraint that all samples obey; training happens in unconstrained space.
        seed: makes the result repeatable; a fresh one is drawn, and reported, by default.
        device: where to train; where ``x`` is, by default.
        progress: show a progress bar.
        own_units: measure every column in its own standard deviation before the axes are found, as a table of unlike
            quantities wants and an image does not; by default where standard deviations differ tenfold or more.
        recipe: the optimiser's numbers; chosen from the size of the data by default.
        tolerance: accepted error of the solver, in standard deviations of the data (see :mod:`ifpyro.numerics`).
        checkpoint: a file that is written about every half minute; if it exists, training resumes from it.

    Returns:
        The flow, with what was measured in ``flow.report``.

    Raises:
        TypeError: if ``x`` is not an array of real numbers.
        ValueError: on samples or options that cannot work; the message says which and what to do.
    """
    _check_limits(max_steps, max_seconds, tolerance)
    x = as_samples(x)
    x = x.to(device) if device is not None else x
    seed = torch.Generator().seed() % 2**31 if seed is None else seed
    schedule = schedule or Schedule.details_first()
    if support is not None:
        support_to_dict(support)  # refuse now what could not be saved after training
        to_unconstrained(x, support)  # and rows outside, by the indices that the caller knows
    train, held_out = split(x, validation, torch.Generator().manual_seed(seed))
    if support is not None:
        free_train = to_unconstrained(train, support)
        free_held_out = to_unconstrained(held_out, support, "validation")
    else:
        free_train, free_held_out = train, held_out
    free_train, free_held_out = free_train.flatten(1), free_held_out.flatten(1)
    check_trainable(free_train)

    rows, dim = free_train.shape
    recipe = recipe or Recipe.for_data(rows, dim)
    limit = max_steps if max_steps is not None else recipe.max_steps
    basis = Basis.from_samples(free_train, own_units=_unlike_units(free_train) if own_units is None else own_units)
    devices = [x.device] if x.device.type == "cuda" else []
    # Layers initialise, and dropout draws, from torch's global stream: borrow it, and give it back as it was.
    with torch.random.fork_rng(devices=devices), _one_thread():
        torch.manual_seed(seed)
        net = make_network(network, rows, dim).to(x)
        run = Run(
            net, schedule.angles(basis.scale), basis.to_standard(free_train), basis.to_standard(free_held_out), recipe
        )
        if checkpoint is not None and Path(checkpoint).exists():
            checkpoints.restore(run, checkpoint, seed)
        save = None if checkpoint is None else partial(checkpoints.save, run, checkpoint, seed)
        stopped = run.train(limit, max_seconds, progress, save)
    flow = InflationaryFlow(
        basis,
        schedule,
        run.best_network(),
        event_shape=x.shape[1:],
        support=support,
        report={
            "training": {
                "rows": rows,
                "validation_rows": len(held_out),
                "steps": run.step,
                "best_step": run.best_step,
                "samples_seen": run.step * recipe.batch,
                "seconds": round(run.seconds, 2),
                "validation_loss": run.best_loss,
                "validation_loss_gaussian": run.gaussian_loss(),
                "history": run.history,
                "stopped": stopped,
                "seed": seed,
            }
        },
    )
    choose_grid(flow, held_out if len(held_out) >= 32 else x[:256], tolerance)
    flow.report["training"]["latents"] = latent_power(flow, train)
    flow.report["reconstruction"] = reconstruction.measure(flow, train, held_out)
    return flow


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread, then restore the setting.

    The matrices of a training step are small: more threads gain little on an idle machine, and on a busy one they wait
    for each other at every operation (2 threads were 40 times slower on two occupied cores).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _unlike_units(x: Tensor) -> bool:
    sd = x.std(0)
    return bool(sd.max() >= 10 * sd.min())


def _check_limits(max_steps: int | None, max_seconds: float | None, tolerance: float) -> None:
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0):
        raise ValueError(f"max_steps expects an integer >= 0 (0 gives a Gaussian), got {max_steps!r}")
    if max_seconds is not None and not (isinstance(max_seconds, int | float) and max_seconds > 0):
        raise ValueError(f"max_seconds expects a positive number of seconds, got {max_seconds!r}")
    if not (isinstance(tolerance, int | float) and tolerance > 0):
        raise ValueError(f"tolerance expects a positive number, got {tolerance!r}")
