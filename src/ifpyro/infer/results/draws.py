"""What a finished run holds: draws of every named site, statistics per draw, and ArviZ's diagnostics of
them."""

import secrets
import warnings
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...core.arguments import check_choice, check_count, check_seed
from ...core.errors import ConvergenceWarning
from ...core.files import read_tensors, reading, write_tensors
from ...core.pool import Pool
from ...flow.solver.fidelity import fidelity
from ..model.batched import resolve_density
from ..model.density import BatchedDensity
from ..model.sites import Call, flow_transforms
from .convergence import Verdict, judge

D = TypeVar("D", bound="Draws")

SITE_ROWS = 4096
"""Draws turned into sites at a time, where no batch size is set."""

WITNESSES = 64
"""Draws from a file whose log-density must be what it was."""


class Draws:
    """Base of `MCMC` and `SMC`: everything that does not depend on how the draws were made."""

    model: Any
    """The Pyro model, or density, that was run."""
    model_args: tuple[Any, ...]
    """Positional arguments of the last run."""
    model_kwargs: dict[str, Any]
    """Keyword arguments of the last run."""
    attributes: dict[str, Any]
    """Scalar facts about the run (seed, batching, temperatures, evidence, ...), for the ``attrs`` of an ArviZ group."""

    _density: BatchedDensity | None = None
    _positions: Tensor | None = None
    _stats: dict[str, Tensor]
    _judged: tuple[Tensor, Verdict] | None = None

    def __init__(
        self,
        *,
        seed: int | None,
        batch_size: int | None,
        batching: Literal["plate", "vmap", "loop"] | None,
        progress: bool,
        pool: Pool | None = None,
    ) -> None:
        self.seed = secrets.randbits(31) if seed is None else check_seed(seed)
        self._batch_size = None if batch_size is None else check_count("batch_size", batch_size, 1)
        check_choice("batching", batching, ("plate", "vmap", "loop", None))
        self._batching = batching
        self._progress = progress
        self._pool = pool
        self._stats = {}
        self.attributes = {}

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Draws of every named site in the user's space.

        Args:
            group_by_chain: keep chains apart: ``(chains, draws, *shape)`` instead of ``(chains * draws,
                *shape)``.

        Raises:
            RuntimeError: if there are no draws, or the model fails when it is run at them.
        """
        positions = self.positions()
        chains, draws, dim = positions.shape
        sites = self._sites(positions.reshape(chains * draws, dim))
        if not group_by_chain:
            return sites
        return {name: value.reshape(chains, draws, *value.shape[1:]) for name, value in sites.items()}

    def positions(self) -> Tensor:
        """The unconstrained draws themselves, ``(chains, draws, dim)``.

        Raises:
            RuntimeError: if there are no draws.
        """
        if self._pool is not None and self._pool.rank and self._positions is None:
            raise RuntimeError(
                f"this is process {self._pool.rank}: the draws of all processes are in the first one; use them where "
                "pool.rank == 0"
            )
        if self._positions is None or self._positions.shape[1] == 0:
            raise RuntimeError(f"{type(self).__name__} holds no draws: call run(...) first, and let it finish warm-up")
        return self._positions

    def sample_stats(self) -> dict[str, Tensor]:
        """Statistics of every draw, each ``(chains, draws)``: ``lp, energy, acceptance_rate, diverging,
        step_size, n_steps, fidelity_gap`` and, for `SMC`, ``log_weight``.

        Raises:
            RuntimeError: if there are no draws.
        """
        self.positions()
        return dict(self._stats)

    def save(self, path: str | Path) -> None:
        """Write the draws and their statistics to a file, atomically; see `restore`.

        Raises:
            RuntimeError: if there are no draws.
        """
        tensors = {"positions": self.positions()} | {f"stats.{name}": value for name, value in self._stats.items()}
        more, facts = self._facts()
        header = {
            "sampler": type(self).__name__,
            "seed": self.seed,
            "attributes": self.attributes,
            "sites": list(getattr(self._density, "latents", ())),
            "facts": facts,
        }
        write_tensors(path, tensors | {f"facts.{name}": value for name, value in more.items()}, "draws", header)

    def restore(self: D, path: str | Path, *args: Any, **kwargs: Any) -> D:
        """Hold the draws of a file, of this model with these arguments, as if they had just been made.

        Returns:
            itself.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or its draws are of another sampler, another model, or other data: at the
                draws, the model's log-density must be what it was.
        """
        tensors, header = read_tensors(path, "draws")
        density = resolve_density(
            self.model, args, kwargs, batching=self._batching, batch_size=self._batch_size, seed=self.seed
        )
        with reading(path, "draws"):
            q, log_density = self._witnesses(path, tensors, header, density)
        with torch.no_grad(), fidelity("fine"):
            log_prior, log_likelihood = density(q)
        check_same_density((log_prior + log_likelihood).cpu(), log_density, f"the draws in {path}")
        with reading(path, "draws"):
            stats = {name.removeprefix("stats."): value for name, value in tensors.items() if name.startswith("stats.")}
            facts = {name.removeprefix("facts."): value for name, value in tensors.items() if name.startswith("facts.")}
            positions, attributes = tensors["positions"].to(q.device), dict(header["attributes"])
            seed = int(header["seed"])
            self._take_facts(facts, header.get("facts", {}), positions.shape)
        self.model_args, self.model_kwargs, self._density = args, kwargs, density
        self._positions, self._stats, self.seed, self.attributes = positions, stats, seed, attributes
        return self

    def _facts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What else a run found: tensors, and plain data."""
        return {}, {}

    def _take_facts(self, tensors: dict[str, Tensor], plain: dict[str, Any], shape: torch.Size) -> None:
        """Take over what `_facts` gave to a file with draws of this shape."""

    def _witnesses(
        self, path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any], density: BatchedDensity
    ) -> tuple[Tensor, Tensor]:
        """Some draws of a file, and the log-densities they were kept with.

        Raises:
            ValueError: if the file is damaged, or its draws are of another sampler or of other sites.
        """
        positions, sampler = tensors["positions"], header.get("sampler", type(self).__name__)
        if sampler != type(self).__name__:
            raise ValueError(
                f"the draws in {path} were made by {sampler}, not by {type(self).__name__}; restore them into one"
            )
        sites, found = header.get("sites", []), list(getattr(density, "latents", ()))
        if sites and sites != found:
            raise ValueError(f"the draws in {path} are of the sites {sites}, this model has {found}")
        if positions.ndim != 3 or positions.shape[-1] != density.dim:
            raise ValueError(
                f"the draws in {path} have {positions.shape[-1]} dimensions, this model has {density.dim}; restore "
                "them into the model and with the arguments that they were drawn from"
            )
        for name, value in tensors.items():
            if name.startswith("stats.") and value.shape != positions.shape[:2]:
                raise ValueError(
                    f"{path} is damaged: {name} has shape {tuple(value.shape)} for {tuple(positions.shape)}"
                )
        flat, log_density = positions.flatten(0, 1), tensors["stats.lp"].flatten()
        if not bool(flat.isfinite().all()):
            raise ValueError(f"{path} is damaged: some draws are not finite")
        pick = torch.arange(0, len(flat), max(1, len(flat) // WITNESSES))[:WITNESSES]
        return flat[pick].to(getattr(density, "device", "cpu")), log_density[pick]

    def diagnostics(self) -> Any:
        """Everything that was checked when the run ended, as a pandas ``DataFrame``.

        One row for each check: ``R-hat``, ``bulk ESS`` and ``tail ESS`` of the worst among all quantities (every entry
        of every site, and ``lp``), ``divergences``, ``acceptance``, ``guide gap``, ``Pareto k``, ``island evidences``,
        ``round trip of`` every flow site. Columns: ``quantity`` (which is worst), ``value``, ``limit``, ``passed`` and
        ``advice``. The figures of every quantity are in `summary`.

        Raises:
            RuntimeError: if there are no draws.
        """
        return self._verdict().table()

    @property
    def converged(self) -> bool:
        """Whether the run passed every check of `diagnostics`; if not, a `ifpyro.ConvergenceWarning` said so.

        Raises:
            RuntimeError: if there are no draws.
        """
        return self._verdict().converged

    def summary(self, **options: Any) -> Any:
        """ArviZ's summary table: mean, sd, interval, Monte Carlo error, ESS and R-hat of every site.

        Args:
            options: passed to ``arviz.summary``.

        Raises:
            RuntimeError: if there are no draws.

        Example:
            >>> def model(y):
            ...     x = pyro.sample("x", flow.prior())
            ...     pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)
            ...
            >>> smc = ifpyro.SMC(model, num_particles=256, seed=0, progress=False).run(torch.tensor(0.3))
            >>> list(smc.summary().index)
            ['x_base[0]', 'x_base[1]', 'x[0]', 'x[1]']
        """
        from . import arviz as bridge  # takes seconds to import

        return bridge.arviz.summary(bridge.to_arviz(self.get_samples(group_by_chain=True)), **options)

    def _verdict(self) -> Verdict:
        """The checks of the draws that there are now."""
        positions = self.positions()
        if self._judged is None or self._judged[0] is not positions:
            try:
                sites = self.get_samples(group_by_chain=True)
            except RuntimeError:  # `get_samples` says why; the unconstrained draws can still be judged
                sites = {"q": positions}
            maps = flow_transforms(Call(self.model, self.model_args, self.model_kwargs), self.seed)
            maps = {name: transform for name, transform in maps.items() if f"{name}_base" in sites}
            facts = {"method": self.attributes.get("inference_method", ""), "pareto_k": self.attributes.get("pareto_k")}
            verdict = judge(sites, self._stats, transforms=maps, **facts)
            self._judged = positions, verdict
        return self._judged[1]

    def _report(self) -> None:
        """Warn, from the caller's caller, unless the run that has just ended passes every check."""
        if self._positions is None or getattr(self._density, "families", 1) > 1:
            return  # nothing was drawn in this process, or rows belong to different posteriors
        verdict = self._verdict()
        self.attributes["converged"] = verdict.converged
        if not verdict.converged:
            self.attributes["convergence"] = text = verdict.message(type(self).__name__)
            warnings.warn(f"{text}. All figures: diagnostics()", ConvergenceWarning, stacklevel=3)

    def _note_batching(self) -> None:
        """Report how the model was evaluated, in `attributes`; a density that is no Pyro model does not say."""
        if (batching := getattr(self._density, "batching", None)) is not None:
            self.attributes["batching"] = batching

    def _sites(self, q: Tensor) -> dict[str, Tensor]:
        assert self._density is not None
        try:
            with torch.no_grad(), fidelity("fine"):
                parts = [self._density.sites(chunk) for chunk in q.split(self._batch_size or SITE_ROWS)]
        except Exception as error:
            raise RuntimeError(
                "sites are computed by running the model at the draws, and the model failed there "
                f"({type(error).__name__}: {error}); the unconstrained draws are kept: positions()"
            ) from error
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_same_density(now: Tensor, before: Tensor, what: str) -> None:
    """Refuse draws whose log-density is not what it was when they were made: they are of another model or other data.

    Args:
        now: the log-density that a model gives them, ``(n,)``.
        before: the one they were kept with, ``(n,)``.
        what: the draws, for the message.

    Raises:
        ValueError: if the two differ by more than rounding for more than a tenth of the draws.
    """
    relative = 1e-7 if now.dtype == torch.float64 else 1e-4
    near = (now - before.to(now)).abs() <= relative * (1 + before.to(now).abs())
    same = near | (now == before.to(now)) | now.isnan()
    if float(same.double().mean()) < 0.9:
        worst = int((now - before.to(now)).abs().nan_to_num(0.0).argmax())
        raise ValueError(
            f"{what} are of another model or of other data: the log-density was {float(before[worst]):.6g} and is now "
            f"{float(now[worst]):.6g}; pass the model and the arguments that they were drawn from"
        )
