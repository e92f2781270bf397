"""The driver of Markov chains: where they start, how long they run, what is kept when something goes
wrong."""

import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...core.arguments import check_count
from ...core.errors import PoolError
from ...core.files import check_writable, try_to_write
from ...core.pool import Pool
from ..model.batched import resolve_density
from ..model.density import BatchedDensity, new_generator
from ..results.draws import Draws
from .distributed import everywhere
from .guided_density import Target
from .jumps import MAX_DIM
from .kernel import Kernel, Stats
from .smc import SMC
from .starts import check_start, possible_prior_draws

ISLANDS = 4
"""Islands of the SMC pass that finds starting points."""

PARTICLES, FEW_PARTICLES = 256, 128
"""Particles of it, and beyond `MAX_DIM` dimensions, where no jumps are fitted to them."""

WARMUP, WARMUP_AFTER_SMC, WARMUP_BY_ROW = 300, 50, 100
"""Transitions of a warm-up; particles hand over step, length, metric and guide, objects need little tuning."""

SAVE_EVERY = 30.0
"""Seconds between two writings of the draws so far."""


class MCMC(Draws):
    """Many chains of one kernel, in one batch and one process.

    Args:
        kernel: `HMC` or `EllipticalSlice`.
        num_samples: draws kept of each chain.
        warmup_steps: transitions before, in which the kernel is tuned; none of them is kept. By default 50 after SMC,
            whose particles hand over what they have learned, 100 where objects are moved one by one, and else 300.
        num_chains: chains, all in one batch.
        init: where chains start: ``"smc"`` (particles of a short SMC pass: mode weights are right from the
            start; where `HMC` moves the objects of a plate one by one, prior draws instead, every object at the
            likeliest of a few), ``"prior"``, or a dictionary of every latent site's values in the user's space,
            each ``(num_chains, *shape)``.
        smc_particles: particles of that pass; at least ``num_chains`` are used. By default 256 in at most 32
            dimensions, where independence jumps are fitted to them, and else 128.
        seed: of all randomness; fresh if ``None``.
        batch_size: most chains evaluated at once (bounds memory).
        batching: how to batch the model (see `BatchedModel`); chosen by itself if ``None``.
        progress: show a progress bar.
        pool: the processes among which the chains are divided, ``Pool.join()`` under ``torchrun``; all of them
            must make and run the same sampler, and the first one holds the draws.
        checkpoint: a file to which the draws so far are written about every half minute and at the end, however it
            comes; `restore` reads it.

    Raises:
        ValueError: for arguments out of range.
        TypeError: if ``kernel`` is not a kernel of this library.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", flow.prior())
        ...     pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)
        ...
        >>> kernel = ifpyro.HMC(model)
        >>> mcmc = ifpyro.MCMC(kernel, 10, warmup_steps=10, num_chains=8, seed=0, progress=False)
        >>> mcmc.run(torch.tensor(0.3)).get_samples(group_by_chain=True)["x"].shape
        torch.Size([8, 10, 2])
    """

    def __init__(
        self,
        kernel: Kernel[Any],
        num_samples: int,
        warmup_steps: int | None = None,
        num_chains: int = 64,
        *,
        init: Literal["smc", "prior"] | Mapping[str, Tensor] = "smc",
        smc_particles: int | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        batching: Literal["plate", "vmap", "loop"] | None = None,
        progress: bool = True,
        pool: Pool | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        if not isinstance(kernel, Kernel):
            hint = "; an SMC runs by itself: SMC(model).run(...)" if isinstance(kernel, SMC) else ""
            raise TypeError(
                f"MCMC expects a kernel, ifpyro.HMC(model) or ifpyro.EllipticalSlice(model), got "
                f"{type(kernel).__module__}.{type(kernel).__name__}{hint}"
            )
        self.kernel = kernel
        self.model = kernel.model
        self.num_samples = check_count("num_samples", num_samples, 1)
        self.num_chains = check_count("num_chains", num_chains, 1)
        if not isinstance(init, Mapping) and init not in ("smc", "prior"):
            raise ValueError(f"init must be 'smc', 'prior' or a dictionary of every latent site's values; got {init!r}")
        self.init = init
        self._default_warmup = warmup_steps is None
        if warmup_steps is None:
            warmup_steps = WARMUP_AFTER_SMC if self.init == "smc" else WARMUP
        self.warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        if smc_particles is not None:
            smc_particles = check_count("smc_particles", smc_particles, 2 * ISLANDS)
        self.smc_particles = smc_particles
        super().__init__(seed=seed, batch_size=batch_size, batching=batching, progress=progress, pool=pool)
        self._checkpoint = None if checkpoint is None else check_writable(checkpoint)

    def run(self, *args: Any, **kwargs: Any) -> "MCMC":
        """Sample the posterior of ``model(*args, **kwargs)``, and warn if it may not be trusted (`diagnostics`).

        Ctrl-C ends the run early and keeps the draws made so far; so does a model that fails on the way,
        which also raises.

        Returns:
            itself.

        Raises:
            ValueError: if the model has no latent site, or no start is possible.
            RuntimeError: if the model fails after the chains have started.
        """
        self.model_args, self.model_kwargs = args, kwargs
        self._positions, self._stats, self.attributes = None, {}, {"seed": self.seed}
        density = resolve_density(
            self.model, args, kwargs, batching=self._batching, batch_size=self._batch_size, seed=self.seed
        )
        self.kernel.check(density)
        with everywhere(density, self._pool) as shared:
            if shared is not None:
                self._run(shared)
        self._report()
        return self

    def _run(self, density: BatchedDensity) -> None:
        began = time.perf_counter()
        self._density, self._running = density, self.kernel.suited_to(density)
        if self._default_warmup and self._running.finds_starts:
            self.warmup_steps = WARMUP_BY_ROW
        generator = new_generator(density, self.seed)
        target = Target(density, self._batch_size, self.kernel.level)
        q, particles = self._starts(target, generator)

        kernel = self._running
        state = kernel.begin(target, q, generator, self.warmup_steps, particles)
        draws: list[Tensor] = []
        stats: list[Stats] = []
        total = self.warmup_steps + self.num_samples
        step = divergences = 0
        saved = time.monotonic()
        try:
            with tqdm(total=total, disable=not self._progress) as bar:
                for step in range(total):
                    warming = step < self.warmup_steps
                    if step == self.warmup_steps:
                        state, divergences = kernel.freeze(state), 0
                    state, now = kernel.warm_up(state, step) if warming else kernel.draw(state)
                    if not warming:
                        draws.append(kernel.positions(state))
                        stats.append(now)
                    if self._checkpoint is not None and time.monotonic() - saved > SAVE_EVERY:
                        self._keep(draws, stats)
                        saved = time.monotonic()
                    if self._progress:
                        divergences += int(now["diverging"].sum())
                        _show(bar, warming, now, divergences)
        except KeyboardInterrupt:
            # Half a draw may be in flight: what counts is what both lists hold.
            done = min(len(draws), len(stats))
            warnings.warn(f"interrupted: {done} of {self.num_samples} draws per chain are kept", stacklevel=2)
        except Exception as error:
            done = min(len(draws), len(stats))
            phase = "warm-up" if step < self.warmup_steps else "sampling"
            what = "another process" if isinstance(error, PoolError) else "the model"
            raise RuntimeError(
                f"{what} failed in {phase}, transition {step + 1} of {total} "
                f"({type(error).__name__}: {error}); the {done} finished draws of each chain are kept: "
                "get_samples()"
            ) from error
        finally:
            self._keep(draws, stats)
            self.attributes["sampling_time"] = time.perf_counter() - began

    def _starts(self, target: Target, generator: torch.Generator) -> tuple[Tensor, SMC | None]:
        """Where the chains start, and the SMC run that found it."""
        if isinstance(self.init, Mapping):
            q = self._from_values(target, self.init)
            check_start(target.fine(q), "given starting points")
            return q, None
        if self.init == "prior" or (self.init == "smc" and self._running.finds_starts):
            return possible_prior_draws(target, self.num_chains, generator), None
        enough = FEW_PARTICLES if target.density.dim > MAX_DIM else PARTICLES
        count = max(self.smc_particles or enough, self.num_chains)
        islands = ISLANDS if target.families == 1 else 2 * target.families
        smc = SMC(
            self.model,
            -(-count // islands) * islands,
            num_islands=islands,
            level=self.kernel.level,
            seed=self.seed,
            batch_size=self._batch_size,
            progress=self._progress,
        )
        smc.run_density(target.density, generator)
        self.attributes["log_evidence"] = smc.log_evidence
        self.attributes["log_evidence_se"] = smc.log_evidence_se
        return smc.pooled(self.num_chains), smc

    def _from_values(self, target: Target, values: Mapping[str, Tensor]) -> Tensor:
        unconstrain = getattr(target.density, "unconstrain", None)
        if unconstrain is None:
            raise TypeError("init as a dictionary needs a Pyro model; a density object takes 'smc' or 'prior'")
        tensors = {name: torch.as_tensor(value) for name, value in values.items()}
        for name, value in tensors.items():
            if value.ndim == 0 or len(value) != self.num_chains:
                raise ValueError(
                    f"init[{name!r}] must hold one value per chain, shape ({self.num_chains}, *shape), "
                    f"got {tuple(value.shape)}"
                )
        return unconstrain(tensors)

    def _keep(self, draws: list[Tensor], stats: list[Stats]) -> None:
        """Store what has been drawn: ``(chains, draws, ...)``."""
        done = min(len(draws), len(stats))
        if done == 0:
            return
        self._positions = torch.stack(draws[:done], 1)
        self._stats = {name: torch.stack([now[name] for now in stats[:done]], 1) for name in stats[0]}
        self.attributes.update(self._running.report())
        self._note_batching()
        self.attributes.update(warmup_steps=self.warmup_steps, divergences=int(self._stats["diverging"].sum()))
        if self._checkpoint is not None:
            try_to_write(partial(self.save, self._checkpoint), "the draws stay in memory")

    def _take_facts(self, tensors: dict[str, Tensor], plain: dict[str, Any], shape: torch.Size) -> None:
        self.num_chains, self.num_samples = shape[0], shape[1]


def _show(bar: Any, warming: bool, stats: Stats, divergences: int) -> None:
    bar.set_description("warm-up" if warming else "sample", refresh=False)
    acceptance, step_size = float(stats["acceptance_rate"].mean()), float(stats["step_size"].mean())
    bar.set_postfix_str(f"accept={acceptance:.2f} step={step_size:.2g} divergences={divergences}", refresh=False)
    bar.update()
