r"""Hierarchies: every object of a plate is moved and accepted by itself, and the rest of the model in between.

Steps that are accepted for all objects at once shrink with their number. Given everything outside the plate the objects
are independent (`ifpyro.infer.model.rows`), so one transition of a chain is

1. for the latent of *each* object, whose prior is ``N(0, I)``, on the object's own terms: a jump to near a draw that
   the warm-up found for it, which crosses between its modes, an elliptical slice (Murray, Adams & MacKay 2010), which
   has nothing to tune, and a jump again. These run on the guide's cheap decodes; one fine decode decides, object by
   object (delayed acceptance: Christen & Fox 2005);
2. Hamiltonian moves of everything else, with what the flows have decoded held fixed: no flow is solved for them.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flow.solver.fidelity import Level, at, fidelity
from ..model.density import BatchedDensity
from ..model.rows import PlateRows
from . import hamiltonian
from .adaptation import DualAveraging, harmonic_mean
from .guided_density import LADDER, Target
from .kernel import SHORT, Kernel, Stats
from .metric import Metric, metric_from_draws
from .smc import SMC

MAX_SHRINKS = 8
"""Shrinks after which an object stays where it is: a few objects would keep all the others waiting. A point is reached
with the same number of shrinks as it is left with, so that this, too, is reversible."""

GLOBAL_MOVES = 3
"""Hamiltonian moves of what is outside the plate, a transition."""

TRAJECTORY = 1.5
"""Their mean length, in whitened units."""

MOST_STEPS = 16
"""Most leapfrog steps of one of them."""

CENTRES = 64
"""Draws of an object that its jumps go out from."""

NARROW = 0.6
"""Width of a kernel, in units of the rule of thumb for one Gaussian: objects may have several modes."""

FROM_PRIOR = 0.05
"""Share of jumps to draws of the prior, so that no place is out of reach."""

LEAST_JUMPS = 0.02
"""Acceptance below which jumps are given up at the end of the warm-up."""

CANDIDATES = 24
"""Prior draws of every object among which it finds its start."""

AGREEMENT, EVERYWHERE = 0.9, 0.6
"""Acceptance between chains that the guide must reach, for all objects together and for each of them."""

LAGS = (1, 2, 3, 5, 8)
"""How far apart in the batch the chains are that are compared."""

WINDOWS = (0.1, 0.2, 0.4, 0.7)
"""Fractions of the warm-up at which metric and guide are renewed."""


class RowState(NamedTuple):
    """What the chains carry."""

    q: Tensor
    """``(chains, dim)``"""
    fine: dict[str, Tensor]
    """What the flows make of it."""
    guide: dict[str, Tensor]
    """What the guide makes of it."""


class _Here(NamedTuple):
    """Objects as the guide sees them."""

    z: Tensor
    """``(chains, N, d)``"""
    decoded: dict[str, Tensor]
    terms: Tensor
    """``(chains, N)``"""


class RowProposal:
    """For every object a kernel density of draws of its latent, with a share of the prior: where it may jump to.

    Args:
        draws: ``(m, N, d)``.
        seed: Of the choice among them.
    """

    def __init__(self, draws: Tensor, seed: int = 0) -> None:
        picked = torch.randperm(len(draws), generator=torch.Generator().manual_seed(seed))[:CENTRES]
        self.centres = draws[picked.to(draws.device)]
        m, _, d = self.centres.shape
        self.width = draws.std(0).clamp(min=1e-3) * NARROW * m ** (-1 / (d + 4))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Proposals ``(n, N, d)``."""
        m, num, _ = self.centres.shape
        options: dict[str, Any] = {"generator": generator, "device": self.centres.device}
        index = torch.randint(m, (n, num), **options)
        centre = self.centres[index, torch.arange(num, device=index.device)]
        noise = torch.randn(centre.shape, dtype=centre.dtype, **options)
        prior = torch.rand(n, num, 1, **options) < FROM_PRIOR
        return torch.where(prior, noise, centre + self.width * noise)

    def log_density(self, z: Tensor) -> Tensor:
        """Log-density at ``(n, N, d)``, shape ``(n, N)``."""
        m = len(self.centres)
        away = (z[:, None] - self.centres) / self.width  # (n, m, N, d)
        kernel = _log_normal(away).logsumexp(1) - math.log(m) - self.width.log().sum(-1)
        prior = _log_normal(z) + math.log(FROM_PRIOR)
        return torch.logaddexp(kernel + math.log1p(-FROM_PRIOR), prior)


class _Rest:
    """The density of what is outside the plate, everything inside held fixed: what Hamiltonian moves need."""

    gaussian_prior: bool = False

    def __init__(self, rows: PlateRows) -> None:
        self.rows, self.dim = rows, len(rows.rest)
        self.state: RowState | None = None

    def place(self, rest: Tensor) -> Tensor:
        """The whole ``q`` with another rest, ``(n, dim)``."""
        assert self.state is not None
        q = self.state.q.clone()
        q[:, self.rows.rest.to(q.device)] = rest
        return q

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        assert self.state is not None
        return self.rows.totals(self.place(q), self.state.fine)

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Nothing asks for it."""
        raise NotImplementedError

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """Nothing asks for them."""
        raise NotImplementedError


class ByRow(Kernel[RowState]):
    """The kernel. `HMC` uses it by itself for a model with a plate of at least eight flows whose rows are independent.

    Args:
        model: the Pyro model.
        target_accept: harmonic-mean acceptance at which the step of the Hamiltonian moves aims.
        level: fidelity of the slices; by default the cheapest that agrees with the fine decode.
    """

    finds_starts = True

    def __init__(self, model: Any, *, target_accept: float = 0.8, level: Level | None = None) -> None:
        super().__init__(model, level)
        self.target_accept = target_accept

    def begin(
        self, target: Target, q: Tensor, generator: torch.Generator, warmup_steps: int, particles: SMC | None
    ) -> RowState:
        """See `Kernel.begin`. From prior draws, every object first moves to the likeliest of a few draws of its own."""
        rows = getattr(target.density, "rows", None)
        assert isinstance(rows, PlateRows)
        self._rows, self._generator, self._level = rows, generator, self.level or LADDER[3]
        if particles is None:
            q = self._resampled(q)
        state = self._placed(q)
        self._rest = _Rest(rows)
        self._target = Target(self._rest, target.batch_size)
        self._target.one_level = True
        spread = q[:, rows.rest.to(q.device)].std(0) if len(q) > 1 else q.new_ones(len(rows.rest))
        self._metric = Metric(spread.clamp(min=1e-6).to(q.dtype))
        self._step = DualAveraging(0.5, self.target_accept)
        self._window: list[Tensor] = []
        self._proposal: RowProposal | None = None
        self._jumps: list[float] = []
        self._index = 0
        self._window_ends = {round(share * warmup_steps) for share in WINDOWS} if warmup_steps >= SHORT else set()
        return state

    def warm_up(self, state: RowState, step: int) -> tuple[RowState, Stats]:
        """See `Kernel.warm_up`."""
        if step in self._window_ends:
            state = self._renewed(state)
        state, stats = self._transition(state, adapt=True)
        self._window.append(state.q)
        return state, stats

    def freeze(self, state: RowState) -> RowState:
        """See `Kernel.freeze`."""
        self._step.step_size = self._step.average
        if self._jumps and sum(self._jumps) < LEAST_JUMPS * len(self._jumps):
            self._proposal = None
        self._window, self._jumps = [], []
        return state

    def draw(self, state: RowState) -> tuple[RowState, Stats]:
        """See `Kernel.draw`."""
        return self._transition(state, adapt=False)

    def positions(self, state: RowState) -> Tensor:
        """See `Kernel.positions`."""
        return state.q

    def report(self) -> dict[str, Any]:
        """The plate, its guide, and the step of the other moves."""
        return {
            "inference_method": "hmc by row",
            "plate": self._rows.plate,
            "guide_level": str(self._level),
            "step_size": self._step.step_size,
            "jump_acceptance": sum(self._jumps) / len(self._jumps) if self._jumps else 0.0,
        }

    # -- the two kinds of moves -----------------------------------------------------------------------------------

    def _transition(self, state: RowState, adapt: bool) -> tuple[RowState, Stats]:
        state, acceptance, shrinks, gap = self._move_objects(state)
        info, lp = None, None
        if self._rest.dim:
            for _ in range(GLOBAL_MOVES):
                state, info, lp = self._move_rest(state, adapt)
        if lp is None:
            lp = sum(self._rows.totals(state.q, state.fine), torch.zeros_like(acceptance))
        return state, {
            "lp": lp,
            "energy": -lp if info is None else info.energy,
            "acceptance_rate": acceptance if info is None else torch.minimum(acceptance, info.acceptance),
            "diverging": torch.zeros_like(lp, dtype=torch.bool) if info is None else info.diverging,
            "step_size": torch.full_like(lp, self._step.step_size),
            "n_steps": shrinks,
            "fidelity_gap": gap,
        }

    def _move_objects(self, state: RowState) -> tuple[RowState, Tensor, Tensor, Tensor]:
        """Jump, slice and jump again on the guide, then one fine decision, object by object.

        Returns:
            The state, and of every chain the mean acceptance, the slices' shrinks and the guide's gap.
        """
        rows, q = self._rows, state.q
        with torch.no_grad():
            z, terms = rows.latents(q), self._terms(q, state.fine)
            start = here = _Here(z, state.guide, self._terms(q, state.guide))
            here = self._jump(q, here)
            here, shrinks = self._slice(q, here)
            here = self._jump(q, here)  # there and back alike: the three together are reversible
            moved = rows.with_latents(q, here.z)
            with fidelity("fine"):
                fine = rows.decode(moved)
            after = self._terms(moved, fine)
            acceptance = ((after - here.terms) - (terms - start.terms)).clamp(max=0.0).exp().nan_to_num(0.0)
            accepted = self._uniform(acceptance) < acceptance
            new = RowState(
                rows.with_latents(q, torch.where(accepted.unsqueeze(-1), here.z, z)),
                rows.choose(accepted, fine, state.fine),
                rows.choose(accepted, here.decoded, state.guide),
            )
            gap = torch.where(accepted, here.terms - after, start.terms - terms).sum(1)
        return new, acceptance.mean(1), shrinks.sum(1), gap

    def _jump(self, q: Tensor, here: "_Here") -> "_Here":
        """An independence jump of every object, by the guide."""
        if self._proposal is None:
            return here
        z = self._proposal.sample(len(q), self._generator)
        moved = self._rows.with_latents(q, z)
        with at(self._level):
            decoded = self._rows.decode(moved)
        terms = self._terms(moved, decoded)
        ratio = terms - here.terms + _log_normal(z) - _log_normal(here.z)
        ratio = ratio + self._proposal.log_density(here.z) - self._proposal.log_density(z)
        accepted = self._uniform(ratio).log() < ratio.nan_to_num(-torch.inf)
        self._jumps.append(float(accepted.float().mean()))
        return _Here(
            torch.where(accepted.unsqueeze(-1), z, here.z),
            self._rows.choose(accepted, decoded, here.decoded),
            torch.where(accepted, terms, here.terms),
        )

    def _slice(self, q: Tensor, here: "_Here") -> tuple["_Here", Tensor]:
        """An elliptical slice of every object, by the guide."""
        rows, z = self._rows, here.z
        nu = torch.randn(z.shape, generator=self._generator, device=q.device, dtype=q.dtype)
        level = here.terms + self._uniform(here.terms).log()
        theta = 2 * math.pi * self._uniform(level)
        low, high = theta - 2 * math.pi, theta.clone()
        active = torch.ones_like(level, dtype=torch.bool)
        shrinks = torch.zeros_like(level, dtype=torch.long)
        for _ in range(MAX_SHRINKS):
            angle = theta.unsqueeze(-1)
            point = torch.where(active.unsqueeze(-1), z * angle.cos() + nu * angle.sin(), here.z)
            moved = rows.with_latents(q, point)
            with at(self._level):
                decoded = rows.decode_rows(moved, active, here.decoded)
            terms = self._terms(moved, decoded)
            shrinks += active
            above = active & (terms > level)
            here = _Here(
                torch.where(above.unsqueeze(-1), point, here.z),
                rows.choose(above, decoded, here.decoded),
                torch.where(above, terms, here.terms),
            )
            active = active & ~above
            if not bool(active.any()):
                break
            low = torch.where(active & (theta < 0), theta, low)
            high = torch.where(active & (theta >= 0), theta, high)
            theta = torch.where(active, low + self._uniform(level) * (high - low), theta)
        return here, shrinks

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self._generator, device=like.device, dtype=like.dtype)

    def _move_rest(self, state: RowState, adapt: bool) -> tuple[RowState, hamiltonian.Info, Tensor]:
        """One Hamiltonian move of everything outside the plate."""
        self._rest.state = state
        rest = state.q[:, self._rows.rest.to(state.q.device)]
        self._index += 1
        jitter = 0.5 + (self._index * 0.6180339887) % 1.0  # between a half and one and a half, quasi-random
        steps = max(1, min(MOST_STEPS, math.ceil(jitter * TRAJECTORY / self._step.step_size)))
        guide = self._target.guide(rest)
        moved, info = hamiltonian.transition(
            self._target,
            hamiltonian.State(rest, guide.value, guide),
            step_size=self._step.step_size,
            num_steps=steps,
            metric=self._metric,
            generator=self._generator,
        )
        if adapt:
            self._step.update(harmonic_mean(info.acceptance))
        return state._replace(q=self._rest.place(moved.q)), info, moved.fine.tempered(1.0)

    # -- starts and tuning ----------------------------------------------------------------------------------------

    def _terms(self, q: Tensor, decoded: dict[str, Tensor]) -> Tensor:
        """Terms of every object, what is not a number counted as impossible."""
        return self._rows.terms(q, decoded).nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def _placed(self, q: Tensor) -> RowState:
        with torch.no_grad():
            with fidelity("fine"):
                fine = self._rows.decode(q)
            with at(self._level):
                guide = self._rows.decode(q)
        return RowState(q, fine, guide)

    def _resampled(self, q: Tensor) -> Tensor:
        """Every object at one of a few prior draws, taken with the weight of its terms."""
        rows = self._rows
        options: dict[str, Any] = {"generator": self._generator, "device": q.device, "dtype": q.dtype}
        with torch.no_grad(), at(self._level):
            best, chosen = None, rows.latents(q)
            for k in range(CANDIDATES):
                z = rows.latents(q) if k == 0 else torch.randn(chosen.shape, **options)
                moved = rows.with_latents(q, z)
                terms = self._terms(moved, rows.decode(moved))
                keys = terms - torch.empty_like(terms).exponential_(generator=self._generator).log()  # Gumbel's trick
                if best is None:
                    best, chosen = keys, z
                    continue
                better = keys > best
                best, chosen = torch.where(better, keys, best), torch.where(better.unsqueeze(-1), z, chosen)
        return rows.with_latents(q, chosen)

    def _renewed(self, state: RowState) -> RowState:
        """Metric from the draws of the window that ends here, and the cheapest guide that agrees object by object."""
        draws = torch.cat(self._window) if self._window else state.q[:0]
        self._window, self._jumps = [], []
        if len(draws) >= CENTRES:
            self._proposal = RowProposal(self._rows.latents(draws))
        if self._rest.dim and len(draws) >= 10:
            self._metric = metric_from_draws(draws[:, self._rows.rest.to(draws.device)])
            self._step.restart(self._step.average)
        if self.level is not None:
            return state
        fine = self._terms(state.q, state.fine)
        for level in LADDER:
            self._level = level
            guide = state.fine if level == "fine" else self._placed(state.q).guide
            gap = self._terms(state.q, guide) - fine
            pairs = torch.stack([gap - gap.roll(k, 0) for k in LAGS]).clamp(max=0).exp().nan_to_num(0.0)
            objects = pairs.mean((0, 1))
            agrees = float(objects.mean()) >= AGREEMENT and float(objects.min()) >= EVERYWHERE
            if level == "fine" or agrees:
                break
        return state._replace(guide=guide)


def has_rows(density: BatchedDensity) -> bool:
    """Whether a density has a plate whose rows can be moved one by one."""
    return isinstance(getattr(density, "rows", None), PlateRows)


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
