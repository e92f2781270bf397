"""Hamiltonian Monte Carlo for many chains in one batch, tuned across chains.

During warm-up all chains share one step size (dual averaging on the guide's harmonic-mean acceptance), one
mean trajectory length (ChEES or SNAPER) and one metric (pooled over chains); then the kernel is frozen.
Gradients come from the cheapest guide that agrees with the fine density, and the fine density decides
(`ifpyro.infer.engines.hamiltonian`).

Gradient moves do not cross between separated modes. Two things see to mode weights: chains start from SMC
particles, and each transition adds one independence jump (`ifpyro.infer.engines.jumps`) as long as jumps are
accepted at all. In many dimensions they are not: then each chain stays in the mode where it started, R-hat
says so, and the weights are those of the SMC particles.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.arguments import check_choice, check_count, check_fraction, check_positive
from ...flow.solver.fidelity import Level
from ..model.density import BatchedDensity
from . import hamiltonian
from .adaptation import DualAveraging, TrajectoryLength, harmonic_mean
from .by_row import ByRow, has_rows
from .guided_density import Target
from .hamiltonian import Info, State
from .jumps import LEAST_JUMPS, MAX_DIM, IndependenceProposal, jump, worthwhile_steps
from .kernel import SHORT, Kernel, Stats
from .metric import Metric, grouped_metric, metric_from_draws, prior_metric
from .smc import SMC

WINDOWS = (0.15, 0.35, 0.65)
"""Fractions of the warm-up at which metric and guide are renewed; the rest tunes the step alone."""


class HMC(Kernel[State]):
    """The kernel.

    Args:
        model: the Pyro model; discrete latents that `pyro.infer.config_enumerate` has marked are summed out.
        step_size: leapfrog step in whitened units; tuned if ``None``.
        trajectory_length: mean trajectory length in whitened units; tuned if ``None``.
        criterion: what tunes it: ``"snaper"`` (1 to 1.5 times the ESS per gradient where we measured)
            or ``"chees"``.
        metric: ``"diagonal"``, ``"dense"``, or ``"auto"``: dense where there are draws enough to estimate it.
        target_accept: harmonic-mean acceptance of the guide at which the step size aims.
        max_steps: most leapfrog steps in one trajectory.
        jumps: whether to add independence jumps (in at most `MAX_DIM` dimensions).
        level: fidelity of the gradients: ``"coarse"``, ``"fine"`` or a number of solver steps; by default the
            cheapest that agrees with the fine density.
        rows: whether the objects of a plate with a flow prior each are moved and accepted one by one where they are
            independent given the rest (`ifpyro.infer.engines.by_row`): then the cost of an object does not grow with
            their number. Step, trajectory, metric and jumps are then those of that kernel.

    Raises:
        ValueError: for arguments out of range.
        TypeError: if ``model`` is not callable.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)
        ...
        >>> kernel = ifpyro.HMC(model, metric="diagonal")
        >>> mcmc = ifpyro.MCMC(kernel, 100, warmup_steps=50, num_chains=16, init="prior", seed=0, progress=False)
        >>> x = mcmc.run(torch.tensor([2.0, -2.0])).get_samples()["x"]
        >>> (x.mean(0) - torch.tensor([1.0, -1.0])).abs().max() < 0.2  # half-way between prior and data
        tensor(True)
    """

    def __init__(
        self,
        model: Any,
        *,
        step_size: float | None = None,
        trajectory_length: float | None = None,
        criterion: str = "snaper",
        metric: str = "auto",
        target_accept: float = 0.65,
        max_steps: int = 128,
        jumps: bool = True,
        level: Level | None = None,
        rows: bool = True,
    ) -> None:
        super().__init__(model, level)
        check_choice("rows", rows, (True, False))
        self.rows = rows
        self.step_size = None if step_size is None else check_positive("step_size", step_size)
        self.trajectory_length = (
            None if trajectory_length is None else check_positive("trajectory_length", trajectory_length)
        )
        check_choice("criterion", criterion, ("chees", "snaper"))
        check_choice("metric", metric, ("auto", "diagonal", "dense"))
        check_choice("jumps", jumps, (True, False))
        self.criterion, self.metric, self.jumps = criterion, metric, jumps
        self.target_accept = check_fraction("target_accept", target_accept)
        self.max_steps = check_count("max_steps", max_steps, 1)

    def suited_to(self, density: BatchedDensity) -> Kernel[Any]:
        """See `Kernel.suited_to`."""
        return ByRow(self.model, level=self.level) if self.rows and has_rows(density) else self

    def begin(
        self, target: Target, q: Tensor, generator: torch.Generator, warmup_steps: int, particles: SMC | None
    ) -> State:
        """See `Kernel.begin`. Step, length and metric start from those of the particles if there are any."""
        self._target, self._generator = target, generator
        step_size, length = q.shape[1] ** -0.25, 1.5
        self._proposal: IndependenceProposal | None = None
        if particles is None:
            self._metric = Metric(prior_metric(target.density, len(q), generator).scale.to(q.dtype))
        else:
            step_size, length = particles.tuning.step_size, particles.tuning.length
            cloud = particles.pooled(particles.num_particles).chunk(target.families)
            self._metric = self._fit_metric(cloud)
            if self._may_jump(q):
                self._proposal = self._fit_proposal(cloud)
        self._step = DualAveraging(self.step_size or step_size, self.target_accept)
        self._length = TrajectoryLength(self.trajectory_length or length, self.criterion)
        self._window: list[Tensor] = []
        self._jump_acceptance: list[Tensor] = []
        self._index = 0
        self._most_steps = self.max_steps
        self._window_ends = {round(fraction * warmup_steps) for fraction in WINDOWS} if warmup_steps >= SHORT else set()
        self._last_window = max(self._window_ends, default=0)
        return hamiltonian.start(target, q, self.settle(target, q, warmup_steps, particles))

    def warm_up(self, state: State, step: int) -> tuple[State, Stats]:
        """See `Kernel.warm_up`."""
        if step in self._window_ends:
            state = self._renew(state, last=step == self._last_window)
        jitter = self._length.jitter(self._index)
        before, step_size = self._metric.whiten(state.q), self._step.step_size
        state, info, stats = self._transition(state, jitter)
        self._most_steps = self._worthwhile_steps()
        if self.step_size is None:
            self._step.update(harmonic_mean(info.guide_acceptance))
        if self.trajectory_length is None:
            after = self._metric.whiten(info.proposal)
            self._length.update(before, after, info.velocity, info.guide_acceptance, jitter, step_size)
        self._window.append(state.q)
        return state, stats

    def freeze(self, state: State) -> State:
        """See `Kernel.freeze`."""
        if self.step_size is None:
            self._step.step_size = self._step.average
        if self.trajectory_length is None:
            self._length.freeze()
        if self._jump_acceptance and float(torch.stack(self._jump_acceptance).mean()) < LEAST_JUMPS:
            self._proposal, self._most_steps = None, self.max_steps
        self._window, self._jump_acceptance = [], []
        return state

    def draw(self, state: State) -> tuple[State, Stats]:
        """See `Kernel.draw`."""
        state, _, stats = self._transition(state, self._length.jitter(self._index))
        return state, stats

    def positions(self, state: State) -> Tensor:
        """See `Kernel.positions`."""
        return state.q

    def report(self) -> dict[str, Any]:
        """Step size, mean trajectory length, metric, guide and the acceptance of jumps (0 where dropped)."""
        jumps = self._jump_acceptance
        return {
            "inference_method": "hmc",
            "step_size": self._step.step_size,
            "trajectory_length": self._length.length,
            "metric": "diagonal" if self._metric.scale.ndim == 1 else "dense",
            "guide_level": str(self._target.level),
            "jump_acceptance": float(torch.stack(jumps).mean()) if jumps else 0.0,
        }

    def _transition(self, state: State, jitter: float) -> tuple[State, Info, Stats]:
        step_size = self._step.step_size
        self._index += 1
        state, info = hamiltonian.transition(
            self._target,
            state,
            step_size=step_size,
            num_steps=self._length.num_steps(step_size, jitter, self._most_steps),
            metric=self._metric,
            generator=self._generator,
        )
        lp, energy, gap = state.fine.tempered(1.0), info.energy, info.gap
        if self._proposal is not None:
            kinetic = energy + lp
            state, acceptance = jump(self._target, state, self._proposal, self._generator)
            self._jump_acceptance.append(acceptance.mean())
            lp, gap = state.fine.tempered(1.0), hamiltonian.fidelity_gap(state)
            energy = kinetic - lp
        stats = {
            "lp": lp,
            "energy": energy,
            "acceptance_rate": info.acceptance,
            "diverging": info.diverging,
            "step_size": torch.full_like(lp, step_size),
            "n_steps": torch.full_like(lp, info.num_steps, dtype=torch.long),
            "fidelity_gap": gap,
        }
        return state, info, stats

    def _worthwhile_steps(self) -> int:
        """Most leapfrog steps that pay."""
        if self._proposal is None or not self._jump_acceptance or self.trajectory_length is not None:
            return self._most_steps
        return worthwhile_steps(float(torch.stack(self._jump_acceptance).mean()), self.max_steps)

    def _renew(self, state: State, last: bool) -> State:
        """Metric, guide and jumps from the draws of the window that ends here."""
        draws = [torch.cat(q) for q in zip(*(q.chunk(self._target.families) for q in self._window), strict=True)]
        self._window = []
        if draws and len(draws[0]) >= 10:
            self._metric = self._fit_metric(draws)
            if self.step_size is None:
                self._step.restart(self._step.average)
        if last:
            self._jump_acceptance = []
            if self._may_jump(state.q) and self._proposal is None:
                self._proposal = self._fit_proposal(draws)
        if self._target.choose_level(state.q, state.fine):
            state = hamiltonian.start(self._target, state.q, state.fine)
        return state

    def _may_jump(self, q: Tensor) -> bool:
        return self.jumps and q.shape[1] <= MAX_DIM

    def _fit_proposal(self, draws: Sequence[Tensor]) -> IndependenceProposal:
        return IndependenceProposal(draws, self._target)

    def _fit_metric(self, draws: Sequence[Tensor]) -> Metric:
        dense = {"auto": None, "dense": True, "diagonal": False}[self.metric]
        return grouped_metric(draws, dense=dense) if len(draws) > 1 else metric_from_draws(draws[0], dense=dense)
