r"""Tempered sequential Monte Carlo: from exact prior draws to the posterior, with the evidence on the way.

Particles pass through ``pi_k(q) ~ prior(q) likelihood(q)^beta_k`` for ``0 = beta_0 < ... < beta_K = 1``. Each
stage reweights by ``likelihood^(beta_{k+1} - beta_k)``, resamples, and moves every particle by Hamiltonian
Monte Carlo, and by independence jumps as long as these are accepted, which leave ``pi_{k+1}`` invariant (Del
Moral, Doucet & Jasra 2006, section 3; Buchholz, Chopin & Jacob 2021 for HMC moves; South, Pettitt & Drovandi
2019 for independence jumps). What the moves have visited is what the next stage weighs, not only where they ended (Dau
& Chopin 2022). The evidence is estimated by the product of mean incremental weights,

    log Z = sum_k log( 1/N sum_i likelihood(q_i)^(beta_{k+1} - beta_k) ).

The first population is larger than the others where that pays: prior draws need no gradients, and if enough of
them carry weight, importance sampling is all there is to do (`ifpyro.infer.engines.prior_draws`).

The particles live in *islands* that resample on their own and share only tuning (temperatures, metric, step
size): they serve as chains for R-hat, and the spread of their evidences stands beside the standard error.
"""

import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...core.arguments import check_count, check_fraction, check_level
from ...core.files import check_writable, try_to_write
from ...core.pool import Pool
from ...flow.solver.fidelity import Level
from ..model.batched import check_model, resolve_density
from ..model.density import BatchedDensity, new_generator
from ..results.diagnostics import pareto_k
from ..results.draws import Draws
from .distributed import everywhere
from .guided_density import LOOSE, Target, Value
from .metric import cross_fitted_metric
from .particle_moves import Moved, Mover, Stage
from .prior_draws import prior_population, suffices, usable
from .smc_state import SMCState, level_from_plain, level_to_plain, stage_from_plain, stage_to_plain, state_of
from .started import StartedDensity
from .tempering import Genealogy, along_a_curve, next_temperature, systematic_resample

SAVE_EVERY = 30.0
"""Seconds between two writings of the particles."""

FAR = 1e-7
"""First inverse temperature below which the user is warned."""


class Tuning(NamedTuple):
    """What a kernel started from the particles wants to know."""

    step_size: float
    length: float
    level: Level


class SMC(Draws):
    """Tempered SMC over a Pyro model.

    Args:
        model: the Pyro model; discrete latents that `pyro.infer.config_enumerate` has marked are summed out.
        num_particles: particles in all, split evenly among the islands.
        num_islands: independent samplers in one batch; the standard error of the evidence has ``num_islands -
            1`` degrees of freedom.
        ess_threshold: effective fraction of the particles that each temperature step keeps.
        prior_draws: most prior draws per particle, evaluated once and without gradients, for importance sampling. If
            so many promise an effective sample size of the particles, these are resampled from them, unmoved; if
            not, tempering starts from a few per particle. 1: no attempt, as many prior draws as particles.
        max_moves: most Hamiltonian moves per temperature; fewer are made where the mean over the moves of a particle is
            worth a few independent draws, and the weight to come no longer drifts.
        max_steps: most leapfrog steps per move.
        level: fidelity of the gradients, by default the cheapest that agrees with the fine density.
        seed: of all randomness; fresh if ``None``.
        batch_size: most particles evaluated at once (bounds memory).
        batching: how to batch the model (see `BatchedModel`); chosen by itself if ``None``.
        progress: show a progress bar with temperature and evidence.
        pool: the processes among which the particles are divided, ``Pool.join()`` under ``torchrun``; all of them must
            make and run the same sampler, and the first one holds the draws.
        start: a flow to start from instead of the prior, over the model's unconstrained vector or over the value of its
            only latent site, such as a conditional flow at the data (``flow.given(y)``). Posterior and evidence are the
            same; where the flow is near the posterior, far fewer evaluations lead there.
        defensive: share of the first particles that do not come from ``start`` itself: half from its widened latent,
            half from the prior.
        checkpoint: a file to which the particles are written about every half minute, at Ctrl-C and at the end. If it
            exists, `run` goes on from it, and ends with what it would have found uninterrupted.

    What tempering cannot do: find a mode that no particle has met. A mode much narrower than another, far from it, and
    small in the tempered posteriors until the last temperatures, is missed by every particle, and neither the standard
    error nor R-hat can tell. Where such modes are suspected, draw more (``num_particles``, ``prior_draws``: a mode that
    holds one in a million of the prior's mass needs millions of draws to be met), give the model a prior that puts more
    mass there, or start chains from points in every mode: ``MCMC(HMC(model), ..., init={site: values})``, whose chains
    stay in the modes they start in, so that their shares, unlike their shapes, are yours.

    After `run`: `log_evidence` (log of the mean evidence over islands), `log_evidence_se` (its standard
    error: from the errors of families of particles with one ancestor (`ifpyro.infer.engines.tempering.Genealogy`), or
    from the spread over islands, whichever is larger), `island_log_evidence` ``(num_islands,)``, `stages`, and
    `pareto_k` where prior draws carried enough weight for a single importance sampling step (above 0.7 it is not to be
    trusted, and the particles are moved: Vehtari et al. 2024; with many data sets, the largest).

    Raises:
        ValueError: for arguments out of range.
        TypeError: if ``model`` is not callable.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", flow.prior())
        ...     pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)
        ...
        >>> smc = ifpyro.SMC(model, num_particles=512, seed=0, progress=False).run(torch.tensor(0.3))
        >>> smc.get_samples()["x"].shape
        torch.Size([512, 2])
        >>> exact = -1.5233  # y = 0.3 comes from two normals at -1 and 1 of variance 0.45
        >>> abs(smc.log_evidence - exact) < 4 * smc.log_evidence_se
        True
    """

    log_evidence: float
    log_evidence_se: float
    island_log_evidence: Tensor
    stages: list[Stage]
    pareto_k: float | None
    tuning: Tuning

    def __init__(
        self,
        model: Any,
        num_particles: int = 512,
        *,
        num_islands: int = 4,
        ess_threshold: float = 0.5,
        prior_draws: int = 16,
        max_moves: int = 20,
        max_steps: int = 64,
        level: Level | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        batching: Literal["plate", "vmap", "loop"] | None = None,
        progress: bool = True,
        pool: Pool | None = None,
        checkpoint: str | Path | None = None,
        start: Any = None,
        defensive: float = 0.1,
    ) -> None:
        check_model(model, "SMC")
        self.model = model
        self.num_particles = check_count("num_particles", num_particles, 2)
        self.num_islands = check_count("num_islands", num_islands, 1)
        num_particles, num_islands = self.num_particles, self.num_islands
        if num_particles % num_islands or num_particles < 2 * num_islands:
            raise ValueError(
                "num_particles must be a multiple of num_islands with at least 2 each, "
                f"got {num_particles} particles for {num_islands} islands"
            )
        if num_islands == 1 and num_particles % 2:
            raise ValueError(
                "a lone island is tuned half from half and needs an even number of particles, "
                f"got num_particles={num_particles}"
            )
        self.ess_threshold = check_fraction("ess_threshold", ess_threshold)
        self.prior_draws = check_count("prior_draws", prior_draws, 1)
        self.max_moves = check_count("max_moves", max_moves, 1)
        self.max_steps = check_count("max_steps", max_steps, 1)
        check_level(level)
        self.level = level
        self._start, self._defensive = start, defensive
        super().__init__(seed=seed, batch_size=batch_size, batching=batching, progress=progress, pool=pool)
        self._checkpoint = None if checkpoint is None else check_writable(checkpoint)
        self._state: SMCState | None = None
        self._alone = True  # and not the start of chains

    def run(self, *args: Any, **kwargs: Any) -> "SMC":
        """Sample the posterior of ``model(*args, **kwargs)``, and warn if it may not be trusted (`diagnostics`).

        Ctrl-C ends the run with a ``KeyboardInterrupt``: its particles are no draws of the posterior yet. `resume` goes
        on from the last temperature that was finished.

        Returns:
            itself.

        Raises:
            ValueError: if the model has no latent, is impossible or not a number at every prior draw, or the checkpoint
                is of another sampler, model or data.
            RuntimeError: if the model fails on the way.
        """
        self._forget()
        self.model_args, self.model_kwargs = args, kwargs
        density = resolve_density(
            self.model, args, kwargs, batching=self._batching, batch_size=self._batch_size, seed=self.seed
        )
        if self._start is not None:
            density = StartedDensity(density, self._start, self._defensive)
        with everywhere(density, self._pool) as shared:
            if shared is not None:
                self.run_density(shared)
        self._report()
        return self

    def resume(self) -> "SMC":
        """Go on where Ctrl-C, or a failing model, ended the last run of this sampler in one process.

        Returns:
            itself.

        Raises:
            RuntimeError: if there is nothing to go on from.
        """
        if self._state is None or self._density is None or (self._pool is not None and self._pool.size > 1):
            raise RuntimeError(
                "there is no interrupted run to go on from: call run(...); a run of another process is gone on from "
                "by SMC(..., checkpoint=PATH).run(...)"
            )
        self.run_density(self._density)
        self._report()
        return self

    def _forget(self) -> None:
        """Drop what an earlier run found: a run that fails must not leave the evidence of another."""
        self._positions, self._stats, self.attributes, self._state, self._density = None, {}, {}, None, None
        for name in ("log_evidence", "log_evidence_se", "island_log_evidence", "stages", "pareto_k", "tuning"):
            self.__dict__.pop(name, None)

    def _options(self) -> dict[str, Any]:
        """What decides the particles, beside model and data."""
        names = ("num_particles", "num_islands", "ess_threshold", "prior_draws", "max_moves", "max_steps", "seed")
        return {**{name: getattr(self, name) for name in names}, "level": level_to_plain(self.level)}

    def _keep(self, state: SMCState, saved: float, left: str | None = None) -> float:
        """Remember where the sampler stands, and write it down now and then (``left``: now); when that was last."""
        self._state = state
        if self._checkpoint is None or (left is None and time.monotonic() - saved < SAVE_EVERY):
            return saved
        try_to_write(partial(state.save, self._checkpoint, self._options()), left or "sampling goes on")
        return time.monotonic()

    def run_density(self, density: BatchedDensity, generator: torch.Generator | None = None) -> "SMC":
        """Sample the posterior of a batched density; with many data sets (`ifpyro.infer.model.many`) all their
        posteriors, each with islands of its own, and evidences are then those of `island_log_evidence` only."""
        state = self._state
        self._forget()
        self._density, self._alone = density, generator is None
        generator = new_generator(density, self.seed) if generator is None else generator
        target = Target(density, self._batch_size, self.level, LOOSE)
        islands, per_island, families = self.num_islands, self.num_particles // self.num_islands, target.families
        if islands % families:
            raise ValueError(f"num_islands must be a multiple of the {families} data sets, got {islands}")
        if state is None and self._checkpoint is not None and self._checkpoint.exists():
            state = SMCState.load(self._checkpoint, self._options(), target)
        groups = max(islands, 2 * families)  # a lone island is tuned half from half
        mover = Mover(target, generator, density.dim**-0.25, self.max_steps, self.max_moves, groups)
        self.stages, self.pareto_k = [], None
        beta = 0.0
        if state is None:
            pool = prior_population(target, self.num_particles, islands, self.prior_draws, generator)
            prior_draws, states = len(pool.q), 1  # prior draws have nothing in common
            log_evidence = torch.zeros(islands, dtype=torch.float64, device=pool.q.device)
            genealogy = Genealogy.start(islands, prior_draws // islands, pool.q.device)
        else:
            state.resume(mover)
            moved, beta, genealogy, prior_draws = state.moved, state.beta, state.genealogy, state.prior_draws
            pool, states, log_evidence = moved.pool, moved.pool.per_particle, state.log_evidence.clone()
            self.stages, self.pareto_k, self._state = list(state.stages), state.pareto_k, state
        saved = time.monotonic()
        bar = tqdm(total=1.0, desc="SMC", disable=not self._progress, bar_format="{desc} {elapsed} {postfix}")
        with bar:
            while beta < 1.0:
                rows = len(pool.q) // islands
                log_likelihood = usable(pool.fine.log_likelihood).reshape(islands, rows)
                _check_islands(log_likelihood)
                enough = per_island / rows if beta == 0.0 else 1.0
                beta_next = next_temperature(log_likelihood, beta, self.ess_threshold, families, enough)
                log_weight = (beta_next - beta) * log_likelihood.double()
                log_evidence += log_weight.logsumexp(1) - math.log(rows)
                genealogy = genealogy.weigh(log_weight)
                if beta == 0.0 and beta_next == 1.0:
                    shapes = [pareto_k(row) for row in log_weight.reshape(families, -1)]
                    self.pareto_k = max((k for k in shapes if not math.isnan(k)), default=math.nan)
                if beta == 0.0 and beta_next < FAR:
                    warnings.warn(
                        f"the first inverse temperature is {beta_next:.1g}, many will follow: the data are far from "
                        "the prior's draws, or the likelihood is very narrow. Are data and prior in the same units?",
                        stacklevel=3,
                    )
                weight = torch.softmax(log_weight, 1).flatten().to(pool.q.dtype)
                metric = cross_fitted_metric(pool.q, weight, groups, families, states)
                order = along_a_curve(pool.q.reshape(islands, rows, -1))
                index = systematic_resample(log_weight.gather(1, order), generator, per_island)
                index = order.gather(1, index).sort(1).values  # draws in a row stay unrelated
                genealogy = genealogy.resample(index // states)
                index = (index + rows * torch.arange(islands, device=index.device)[:, None]).flatten()
                beta, q = beta_next, pool.q[index]
                fine = Value(pool.fine.log_prior[index], pool.fine.log_likelihood[index])
                if self.pareto_k is not None and suffices(log_weight, per_island, families, self.pareto_k):
                    moved = mover.stay(q, fine)
                    self.stages.append(moved.stage)
                    break
                try:
                    moved = mover.run(q, fine, beta, metric)
                except KeyboardInterrupt:
                    warnings.warn(f"interrupted: {self._where()}", stacklevel=3)
                    raise
                except Exception as error:
                    raise RuntimeError(
                        f"the model failed while particles moved at inverse temperature {beta:.3g} "
                        f"({type(error).__name__}: {error}); {self._where()}"
                    ) from error
                pool, states, stage = moved.pool, moved.pool.per_particle, moved.stage
                self.stages.append(stage)
                now = state_of(mover, moved, log_evidence, genealogy, prior_draws, self.stages, self.pareto_k)
                saved = self._keep(now, saved, "the draws are not lost" if beta == 1.0 else None)
                bar.set_postfix_str(
                    f"beta={beta:.3g} logZ={float(_log_mean(log_evidence)):.2f} step={stage.step_size:.2g} "
                    f"accept={stage.acceptance:.2f} moves={stage.moves}"
                )
        self.tuning = Tuning(mover.step.step_size, mover.length.length, moved.stage.level)
        self._finish(moved, log_evidence, genealogy.variance(), prior_draws)
        self._state = None
        return self

    def _where(self) -> str:
        """How to go on from where a run has ended; the particles are written down if there is a checkpoint."""
        if self._state is None or not self._alone:
            return "there are no posterior draws before the inverse temperature reaches 1"
        told = f"the particles stand at inverse temperature {self._state.beta:.3g}, and resume() goes on from there"
        if self._checkpoint is not None:
            self._keep(self._state, 0.0, "they stay in memory")
            told += f"; so does run(...) of another process with checkpoint={str(self._checkpoint)!r}"
        return told

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Equally weighted draws of every named site in the user's space.

        Args:
            group_by_chain: ``False``: the pooled estimate, ``(num_particles, *shape)``: islands enter by
                their evidence (systematic resampling). ``True``: islands as they are, ``(num_islands,
                particles each, *shape)``; their weights are `sample_stats` ``()["log_weight"]``.

        Raises:
            RuntimeError: if there are no draws.
        """
        if group_by_chain:
            return super().get_samples(group_by_chain=True)
        return self._sites(self.pooled(self.num_particles))

    def pooled(self, num: int) -> Tensor:
        """``num`` equally weighted unconstrained draws from all islands, ``(num, dim)``; the same ones at
        every call. From a density of many data sets, equal shares of them, one after the other."""
        positions = self.positions()
        families = getattr(self._density, "families", 1)
        generator = torch.Generator(device=positions.device).manual_seed(self.seed)
        weight = self._stats["log_weight"].reshape(families, -1)
        index = systematic_resample(weight, generator, num // families)
        index = index + weight.shape[1] * torch.arange(families, device=index.device)[:, None]
        return positions.reshape(-1, positions.shape[-1])[index.flatten()]

    def _facts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        plain = {
            "log_evidence": self.log_evidence,
            "log_evidence_se": self.log_evidence_se,
            "pareto_k": self.pareto_k,
            "stages": [stage_to_plain(stage) for stage in self.stages],
            "tuning": [*self.tuning[:-1], level_to_plain(self.tuning.level)],
        }
        return {"island_log_evidence": self.island_log_evidence}, plain

    def _take_facts(self, tensors: dict[str, Tensor], plain: dict[str, Any], shape: torch.Size) -> None:
        evidence, se = float(plain["log_evidence"]), float(plain["log_evidence_se"])
        stages = [stage_from_plain(stage) for stage in plain["stages"]]
        step_size, length, level = plain["tuning"]
        self._forget()
        self.island_log_evidence, self.log_evidence, self.log_evidence_se = (
            tensors["island_log_evidence"],
            evidence,
            se,
        )
        self.stages, self.pareto_k = stages, plain["pareto_k"]
        self.tuning = Tuning(step_size, length, level_from_plain(level))
        self.num_islands, self.num_particles = shape[0], shape[0] * shape[1]

    def _finish(self, moved: Moved, log_evidence: Tensor, variance: Tensor, prior_draws: int) -> None:
        islands = self.num_islands
        shape = (islands, self.num_particles // islands)
        self.island_log_evidence = log_evidence
        self.log_evidence = float(_log_mean(log_evidence))
        ratio = (log_evidence - self.log_evidence).exp()
        spread = float(ratio.std() / math.sqrt(islands)) if islands > 1 else 0.0
        self.log_evidence_se = max(spread, float((ratio.square() @ variance).sqrt()) / islands)
        info = moved.info
        self._positions = moved.q.reshape(*shape, -1)
        lp = moved.fine.tempered(1.0)
        self._stats = {
            "lp": lp,
            "energy": info.energy,
            "acceptance_rate": info.acceptance,
            "diverging": info.diverging,
            "step_size": torch.full_like(lp, moved.stage.step_size),
            "n_steps": torch.full_like(lp, info.num_steps, dtype=torch.long),
            "fidelity_gap": info.gap,
            "log_weight": (log_evidence - self.log_evidence).to(lp.dtype).repeat_interleave(shape[1]),
        }
        self._stats = {name: value.reshape(shape) for name, value in self._stats.items()}
        self.attributes = {
            "inference_method": "smc",
            "prior_draws": prior_draws,
            "seed": self.seed,
            "log_evidence": self.log_evidence,
            "log_evidence_se": self.log_evidence_se,
            "temperatures": [stage.beta for stage in self.stages],
            "guide_level": str(self.tuning.level),
        }
        self._note_batching()
        if self.pareto_k is not None:
            self.attributes["pareto_k"] = self.pareto_k


def _log_mean(log_values: Tensor) -> Tensor:
    return log_values.logsumexp(0) - math.log(len(log_values))


def _check_islands(log_likelihood: Tensor) -> None:
    dead = ~(log_likelihood > -torch.inf).any(1)
    if bool(dead.any()):
        raise ValueError(
            f"in {int(dead.sum())} of {len(dead)} islands no particle has a positive likelihood: the data "
            "are nearly impossible under the prior; use more particles, fewer islands, or a wider likelihood"
        )
