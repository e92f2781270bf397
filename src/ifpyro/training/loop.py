"""The loop: descend, average, validate, and know when to stop.

Several processes train as one: all of them draw the same random numbers for the whole batch, each evaluates its part
of it, and gradients are averaged, so that the result is that of one process up to rounding (and dropout, which every
process draws for itself).
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.files import try_to_write
from ..core.pool import Pool
from ..core.randomness import seeded
from ..core.signals import Asked, interrupt_noted
from ..flow.axes.schedule import Angles
from ..flow.networks.conditional import ConditionalVelocity
from ..flow.networks.velocity import Velocity
from .loss import noised_rows, velocity_loss
from .optimiser import make_optimisers
from .recipe import Recipe
from .rows import Rows

SAVE_EVERY = 30.0
"""Seconds between two checkpoints."""

_WARM_UP = 0.03  # share of the run in which the learning rate rises


class Best(NamedTuple):
    """The averaged network with the lowest validation loss so far; replaced as a whole."""

    loss: float
    step: int
    weights: dict[str, Tensor]


@dataclass
class Run:
    """The state of one training: everything that a checkpoint must hold."""

    net: Velocity
    angles: Angles
    rows: Rows
    held_out: Tensor
    recipe: Recipe
    count: int
    fingerprint: str
    pool: Pool = field(default_factory=Pool)
    conditions: int = 0  # trailing columns of the rows, of which the network's shift is made
    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        with torch.no_grad():
            for tensor in self.net.state_dict().values():
                tensor.copy_(self.pool.share(tensor))
        self.optimisers = make_optimisers(self.net, recipe)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self._weights: list[Tensor] = list(self.net.parameters())
        self._averages: list[Tensor] = list(self.average.parameters())
        self.best = Best(math.inf, 0, {name: value.clone() for name, value in self.net.state_dict().items()})
        self.validation = noised_rows(self.held_out, self.angles, recipe.time_power, self.dim)
        self._stop: float | bool = False
        self._asked: Asked | bool = False  # whether Ctrl-C has come
        self._clock = 0.0  # of this process; ``seconds`` is what all go by
        self.resume_at: dict[str, Tensor] | None = self.place()  # None in the middle of an update

    def train(
        self,
        max_steps: int,
        max_seconds: float | None,
        progress: bool,
        save: Callable[[], None] | None,
    ) -> str:
        """Descend until a limit, the end of patience, or Ctrl-C; says which.

        ``save`` writes a checkpoint; it is called about every half minute and at the end.
        """
        with interrupt_noted() as asked:
            self._asked = asked
            bar = tqdm(total=max_steps, initial=self.step, disable=not progress, desc="fit", unit="step")
            try:
                stopped = self._steps(max_steps, max_seconds, bar, save)
            except KeyboardInterrupt:
                if self.pool.size > 1:  # the others may be waiting for anything
                    raise
                if not self.history:
                    raise  # not even the Gaussian has been looked at
                stopped = "interrupted"
            finally:
                bar.close()
            # Saved as an uninterrupted run would have passed here: before a validation that it would not have made,
            # and not at all from the middle of an update, when the last checkpoint is the better one.
            if save is not None and self.resume_at is not None:
                try_to_write(save, "the training is not lost")
            if self.step and self.history[-1][0] != self.step and stopped != "diverged":
                self._validate()
        return stopped

    def _steps(self, max_steps: int, max_seconds: float | None, bar: Any, save: Callable[[], None] | None) -> str:
        before, start, saved = self.seconds, time.monotonic(), time.monotonic()
        if not self.history or (self.step % self.recipe.check_every == 0 and self.history[-1][0] != self.step):
            self._validate()
        while self.step < max_steps:
            share = (self.step + 1) / max_steps
            if max_seconds is not None:
                share = max(share, self.seconds / max_seconds)
                if self.seconds >= max_seconds:
                    return "max_seconds"
            if not self._descend(share):
                warnings.warn(
                    f"the training loss became NaN or infinite at step {self.step}; the best flow so far is "
                    "returned. Lower the rate: fit(..., recipe=Recipe(rate=...))",
                    stacklevel=4,
                )
                return "diverged"
            self.step += 1
            self.resume_at = self.place()
            self._clock = before + time.monotonic() - start
            if self.pool.size == 1:
                self.seconds = self._clock
            bar.update()
            if self.step % self.recipe.check_every == 0 or self.step == max_steps:
                self._validate()
                bar.set_postfix(loss=f"{self.history[-1][1]:.4f}", best=f"{self.best.loss:.4f}")
                if self.step - self.best.step > self.recipe.patience:
                    return "patience"
                if save is not None and time.monotonic() - saved > SAVE_EVERY:
                    try_to_write(save, "training goes on")
                    saved = time.monotonic()
            if self.pool.size == 1:
                self._stop = self.pool.interrupted or bool(self._asked)
            if self._stop and self.step < max_steps:
                return "interrupted"
        return "max_steps"

    @property
    def dim(self) -> int:
        """Axes ``D``."""
        return self.rows.dim - self.conditions

    def embed(self, net: Velocity, t: Tensor, data: Tensor) -> Tensor:
        """The embedding of times, shifted by the conditions that rows bring along."""
        embedding = net.embed(t)
        if isinstance(net, ConditionalVelocity):
            embedding = embedding + net.shift(data[..., self.dim :])
        return embedding

    def best_network(self) -> Velocity:
        """The averaged network with the lowest validation loss."""
        self.net.load_state_dict(self.best.weights)
        return self.net

    def _descend(self, share: float) -> bool:
        recipe, rows = self.recipe, self.rows
        annealed = min(1.0, share / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = annealed * group["peak"]
        # As many times for every process: then the mean of their gradients is the gradient.
        size = self.pool.size
        times = -(-max(1, recipe.batch // recipe.shared) // size) * size
        mine = self.pool.mine(times)
        data = rows.draw((recipe.shared, times), mine)
        strata = torch.arange(times, device=rows.device, dtype=torch.double)
        t = (((strata + torch.rand(times, dtype=torch.float32, device=rows.device)) / times) ** recipe.time_power)[mine]
        theta = self.angles(t).to(data)
        # In single precision always: the same seed then draws the same, whatever the data's or torch's default dtype.
        noise = torch.randn(recipe.shared, times, self.dim, dtype=torch.float32, device=rows.device)[:, mine].to(data)
        with self._own_randomness():
            loss = velocity_loss(self.net, data[..., : self.dim], noise, theta, self.embed(self.net, t, data))
        self.net.zero_grad()
        loss.backward()
        if not self._agree(loss.detach()):
            return False
        self.resume_at = None
        for optimiser in self.optimisers:
            optimiser.step()
        self._follow()
        return True

    def _follow(self) -> None:
        """Move the average, which forgets its start quickly: its decay rises as ``(2 + n) / (11 + n)`` to the final."""
        decay = min(self.recipe.average, (2 + self.step) / (11 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
            for average, buffer in zip(self.average.buffers(), self.net.buffers(), strict=True):
                average.copy_(buffer)

    def _agree(self, loss: Tensor) -> bool:
        """Average the gradients of all processes; whether their loss is finite. They also agree on the time, which is
        that of the first, and on whether to stop."""
        if self.pool.size == 1:
            return bool(loss.isfinite())
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        clock = self._clock if self.pool.rank == 0 else 0.0
        others = torch.stack(
            [loss, loss.new_tensor(clock), loss.new_tensor(float(self.pool.interrupted or bool(self._asked)))]
        )
        sums = self.pool.sum(torch.cat([*(g.flatten() for g in gradients), others]))
        for gradient, part in zip(gradients, sums[:-3].split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / self.pool.size)
        total, self.seconds, self._stop = sums[-3:].tolist()
        return math.isfinite(total)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Dropout of this process alone, which leaves the random stream that all share where it was."""
        if self.pool.size == 1:
            yield
            return
        own = torch.initial_seed() + (self.step + 1) * self.pool.size + self.pool.rank
        with seeded(own):
            torch.manual_seed(own)  # devices of other kinds too
            yield

    def place(self) -> dict[str, Tensor]:
        """Where the random streams and the data stand, as a checkpoint keeps it."""
        state = {"rng": torch.get_rng_state(), "position": torch.tensor(self.rows.position(), dtype=torch.long)}
        if self.rows.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.rows.device)
        return state

    def gaussian_loss(self) -> float:
        """The validation loss of the Gaussian with the data's mean and covariance, whose velocity is zero."""
        rows, noise, _, theta = self.validation
        return float((theta.sin() * rows[:, : self.dim] - theta.cos() * noise).square().mean())

    def report(self, stopped: str, seed: int) -> dict[str, Any]:
        """What a flow remembers of its training."""
        return {
            "rows": self.count,
            "validation_rows": len(self.held_out),
            "steps": self.step,
            "best_step": self.best.step,
            "samples_seen": self.step * self.recipe.batch,
            "seconds": round(self.seconds, 2),
            "validation_loss": self.best.loss,
            "validation_loss_gaussian": self.gaussian_loss(),
            "history": self.history,
            "stopped": stopped,
            "seed": seed,
            "processes": self.pool.size,
        }

    def _validate(self) -> None:
        network = self.average.eval()
        rows, noise, t, theta = self.validation
        mine = self.pool.mine(len(rows))
        with torch.no_grad():
            embedding = self.embed(network, t[mine], rows[mine])
            own = velocity_loss(network, rows[mine, : self.dim], noise[mine], theta[mine], embedding)
        [loss] = self.pool.totals([float(own) * ((mine.stop - mine.start) / len(rows))])
        if loss < self.best.loss:
            self.best = Best(loss, self.step, {name: value.clone() for name, value in network.state_dict().items()})
        self.history.append((self.step, loss))


@contextmanager
def one_thread() -> Iterator[None]:
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
