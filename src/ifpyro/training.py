r"""Training a flow: regress the velocity on noised samples.

With the symbols of :mod:`ifpyro.schedule`, one step draws data ``x_0``, noise ``n`` and times ``t``, and descends

.. math:: \| F(\cos\theta\,x_0/s + \sin\theta\,n,\; t) - (\sin\theta\,x_0/s - \cos\theta\,n) \|^2 ,

plain mean squared error in the angle (v-prediction; Salimans & Ho 2022). Times are stratified, and denser near the data
end, where the likelihood is decided: an error of ``F`` at angle ``theta`` costs ``cot(theta)`` times its square
in nats. What is kept is the exponential moving average with the lowest validation loss; since the network starts at
zero, the result is never worse there than the Gaussian with the data's mean and covariance.
"""

import copy
import hashlib
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from . import reconstruction
from .basis import Basis
from .flow import InflationaryFlow
from .numerics import choose_grid, latent_power
from .samples import as_samples, check_trainable, split, to_unconstrained
from .schedule import Angles, Schedule
from .storage import read_tensors, write_tensors
from .support import support_to_dict
from .velocity import MLP, Velocity

_WARM_UP = 0.03  # share of the run in which the learning rate rises
_VALIDATION_ROWS = 16_384  # noised rows in one evaluation of the validation loss


@dataclass(frozen=True)
class Recipe:
    """The optimiser's numbers, chosen from the size of the data by :meth:`for_data`.

    Attributes:
        max_steps: steps of the whole schedule of the learning rate.
        batch: rows a step.
        shared: rows that share one time (the time embedding is computed once for them).
        rate: peak learning rate of AdamW.
        weight_decay: of AdamW.
        average: decay of the moving average of the weights.
        patience: steps without a better validation loss after which training stops.
        check_every: steps between two validations.
        time_power: times are ``u^time_power``, ``u`` uniform: denser near the data end.
    """

    max_steps: int = 16_000
    batch: int = 512
    shared: int = 8
    rate: float = 5e-3
    weight_decay: float = 1e-2
    average: float = 0.999
    patience: int = 16_000
    check_every: int = 200
    time_power: float = 1.5

    @classmethod
    def for_data(cls, rows: int, dim: int) -> "Recipe":
        """What worked across tables from 107 x 13 to 200,000 x 2: small tables take smaller, fewer steps.

        Large samples of few dimensions show fine structure, which is learnt at small angles.
        """
        if rows >= 5_000:
            return cls(rate=5e-3, time_power=3.0) if dim <= 8 else cls(rate=2e-3)
        if rows >= 500:
            return cls(max_steps=6_000, batch=256, shared=1, rate=1e-3, patience=1_000, check_every=100)
        return cls(max_steps=4_000, batch=256, shared=1, rate=1e-4, patience=1_000, check_every=50)


def default_network(rows: int, dim: int) -> dict[str, Any]:
    """Options of :class:`~ifpyro.velocity.MLP` for ``rows`` samples of ``dim`` columns."""
    small = dim <= 8
    width = 64 if small else 128 if dim <= 128 else 256
    if rows >= 5_000:
        return {"dim": dim, "width": width, "blocks": 3 if small else 2, "dropout": 0.0}
    if rows >= 500:
        return {"dim": dim, "width": width, "blocks": 3 if small else 2, "dropout": 0.3}
    return {"dim": dim, "width": max(width, 128), "blocks": 1, "dropout": 0.5}


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
        net = _make_network(network, rows, dim).to(x)
        run = _Run(
            net, schedule.angles(basis.scale), basis.to_standard(free_train), basis.to_standard(free_held_out), recipe
        )
        if checkpoint is not None and Path(checkpoint).exists():
            run.restore(checkpoint, seed)
        stopped = run.train(limit, max_seconds, progress, checkpoint, seed)
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


@dataclass
class _Run:
    """The state of one training: everything that a checkpoint must hold."""

    net: Velocity
    angles: Angles
    train_rows: Tensor
    held_out: Tensor
    recipe: Recipe
    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
        )
        self.average = AveragedModel(self.net, multi_avg_fn=_warming_average(recipe.average))
        self.average.update_parameters(self.net)
        self.best = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.validation = _noised_rows(self.held_out, self.angles, recipe.time_power)
        self.fingerprint = hashlib.sha256(self.train_rows.cpu().numpy().tobytes()).hexdigest()[:16]
        self._resume_at: dict[str, Tensor] | None = self._random_state()  # None in the middle of an update

    def train(
        self,
        max_steps: int,
        max_seconds: float | None,
        progress: bool,
        checkpoint: str | Path | None,
        seed: int,
    ) -> str:
        """Descend until a limit, the end of patience, or Ctrl-C; says which."""
        before, start, saved = self.seconds, time.monotonic(), time.monotonic()
        bar = tqdm(total=max_steps, initial=self.step, disable=not progress, desc="fit", unit="step")
        if not self.history or (self.step % self.recipe.check_every == 0 and self.history[-1][0] != self.step):
            self._validate()
        stopped = "max_steps"
        try:
            while self.step < max_steps:
                share = (self.step + 1) / max_steps
                if max_seconds is not None:
                    share = max(share, self.seconds / max_seconds)
                    if self.seconds >= max_seconds:
                        stopped = "max_seconds"
                        break
                if not self._descend(share):
                    stopped = "diverged"
                    warnings.warn(
                        f"the training loss became NaN or infinite at step {self.step}; the best flow so far is "
                        "returned. Lower the rate: fit(..., recipe=Recipe(rate=...))",
                        stacklevel=3,
                    )
                    break
                self.step += 1
                self._resume_at = self._random_state()
                self.seconds = before + time.monotonic() - start
                bar.update()
                if self.step % self.recipe.check_every == 0 or self.step == max_steps:
                    self._validate()
                    bar.set_postfix(loss=f"{self.history[-1][1]:.4f}", best=f"{self.best_loss:.4f}")
                    if self.step - self.best_step > self.recipe.patience:
                        stopped = "patience"
                        break
                    if checkpoint is not None and time.monotonic() - saved > 30:
                        self.save(checkpoint, seed)
                        saved = time.monotonic()
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            bar.close()
        # Saved as an uninterrupted run would have passed here: before a validation that it would not have made, and
        # not at all from the middle of an update, when the last checkpoint is the better one.
        if checkpoint is not None and self._resume_at is not None:
            self.save(checkpoint, seed)
        if self.step and self.history[-1][0] != self.step and stopped != "diverged":
            self._validate()
        return stopped

    def best_network(self) -> Velocity:
        """The averaged network with the lowest validation loss."""
        self.net.load_state_dict(self.best)
        return self.net

    def save(self, path: str | Path, seed: int) -> None:
        """Write the whole state to a checkpoint."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in state.items()}
        tensors |= self._resume_at or self._random_state()
        header = {
            "seed": seed,
            "shape": list(self.train_rows.shape),
            "data": self.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "history": self.history,
        }
        write_tensors(path, tensors, "checkpoint", header)

    def restore(self, path: str | Path, seed: int) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: if it belongs to other data, another network or another seed.
        """
        tensors, header = read_tensors(path, "checkpoint")
        expected = {"seed": seed, "shape": list(self.train_rows.shape), "data": self.fingerprint}
        found = {name: header.get(name) for name in expected}
        if found != expected:
            raise ValueError(
                f"the checkpoint {path} belongs to another training: expected {expected}, found {found}; pass its seed "
                "and data, or another file name"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.net.load_state_dict(part("net."))
            self.average.load_state_dict(part("average."))
        except RuntimeError as error:
            raise ValueError(f"the checkpoint {path} belongs to another network: {error}") from error
        self.best = {k: v.to(self.train_rows.device) for k, v in part("best.").items()}
        optimiser = self.optimiser.state_dict()
        for name, value in part("adam.").items():
            index, key = name.split(".")
            optimiser["state"].setdefault(int(index), {})[key] = value
        self.optimiser.load_state_dict(optimiser)
        torch.set_rng_state(tensors["rng"])
        if "rng_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng_cuda"], self.train_rows.device)
        self._resume_at = self._random_state()
        self.step, self.seconds = header["step"], header["seconds"]
        self.best_loss, self.best_step = header["best_loss"], header["best_step"]
        self.history = [(int(step), float(loss)) for step, loss in header["history"]]

    def _descend(self, share: float) -> bool:
        recipe, rows = self.recipe, self.train_rows
        rate = recipe.rate * min(1.0, share / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        times = max(1, recipe.batch // recipe.shared)
        index = torch.randint(len(rows), (recipe.shared, times), device=rows.device)
        strata = torch.arange(times, device=rows.device, dtype=torch.double)
        t = ((strata + torch.rand(times, device=rows.device)) / times) ** recipe.time_power
        theta = self.angles(t).to(rows)
        noise = torch.randn(*index.shape, rows.shape[1], dtype=rows.dtype, device=rows.device)
        loss = _loss(self.net, rows[index], noise, theta, self.net.embed(t))
        if not bool(loss.isfinite()):
            return False
        self.optimiser.zero_grad()
        loss.backward()
        self._resume_at = None
        self.optimiser.step()
        self.average.update_parameters(self.net)
        return True

    def _random_state(self) -> dict[str, Tensor]:
        state = {"rng": torch.get_rng_state()}
        if self.train_rows.is_cuda:
            state["rng_cuda"] = torch.cuda.get_rng_state(self.train_rows.device)
        return state

    def gaussian_loss(self) -> float:
        """The validation loss of the Gaussian with the data's mean and covariance, whose velocity is zero."""
        rows, noise, _, theta = self.validation
        return float((theta.sin() * rows - theta.cos() * noise).square().mean())

    def _validate(self) -> None:
        network = cast(Velocity, self.average.module).eval()
        rows, noise, t, theta = self.validation
        with torch.no_grad():
            loss = float(_loss(network, rows, noise, theta, network.embed(t)))
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = {name: value.clone() for name, value in network.state_dict().items()}
        self.history.append((self.step, loss))


def _loss(network: Velocity, rows: Tensor, noise: Tensor, theta: Tensor, embedding: Tensor) -> Tensor:
    cos, sin = theta.cos(), theta.sin()
    return (network(cos * rows + sin * noise, embedding) - (sin * rows - cos * noise)).square().mean()


def _noised_rows(rows: Tensor, angles: Angles, time_power: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Held-out rows with noise and times that stay the same, so that two losses differ by their networks alone."""
    generator = torch.Generator().manual_seed(0)
    repeats = max(1, _VALIDATION_ROWS // len(rows))
    index = torch.arange(len(rows)).repeat(repeats)[: max(_VALIDATION_ROWS, repeats)]
    strata = torch.randperm(len(index), generator=generator)
    t = ((strata + torch.rand(len(index), generator=generator, dtype=torch.double)) / len(index)) ** time_power
    noise = torch.randn(len(index), rows.shape[1], generator=generator, dtype=rows.dtype)
    t = t.to(rows.device)
    return rows[index.to(rows.device)], noise.to(rows.device), t, angles(t).to(rows)


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


def _warming_average(decay: float) -> Any:
    """Moving average that forgets its start quickly: the decay rises as ``(1 + n) / (10 + n)`` to its final value."""

    def update(averaged: Any, current: Any, count: Tensor) -> None:
        n = float(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, count)

    return update


def _make_network(network: Velocity | dict[str, Any] | None, rows: int, dim: int) -> Velocity:
    if network is None or isinstance(network, dict):
        options = {**default_network(rows, dim), **(network or {})}
        try:
            return MLP(**options)
        except TypeError as error:
            raise ValueError(f"network expects options of MLP {sorted(default_network(rows, dim))}: {error}") from error
    if not isinstance(network, Velocity):
        raise TypeError(f"network expects an ifpyro.velocity.Velocity or options for MLP, got {type(network).__name__}")
    network = copy.deepcopy(network).requires_grad_(True).train()
    like = next(network.parameters())
    with torch.no_grad():
        out = network(like.new_zeros(2, dim), network.embed(torch.full((2,), 0.5, dtype=torch.double)))
    if out.shape != (2, dim):
        raise ValueError(f"network expects to map (n, {dim}) to (n, {dim}), got {tuple(out.shape)} for n = 2")
    return network


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
