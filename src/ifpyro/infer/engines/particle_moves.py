"""Moving a population of particles at one temperature until it has forgotten where it stood.

A move is a Hamiltonian transition and, as long as such are accepted, an independence jump.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...flow.solver.fidelity import Level
from . import hamiltonian
from .adaptation import SpreadSteps, TrajectoryLength
from .guided_density import Target, Value
from .hamiltonian import Info
from .jumps import MAX_DIM, cross_fitted_proposal, jump, worthwhile_steps
from .metric import Metric

MIN_MOVES = 4
"""Moves made at every temperature: stopping at the first low correlation would pick the lucky ones."""

CORRELATION = 0.1
"""Correlation with the start of a temperature at which its moves stop."""

WORTH_JUMPING = 0.05
"""Acceptance of jumps below which they are dropped: resampling moves mass between modes anyway."""


class Stage(NamedTuple):
    """What one temperature did."""

    beta: float
    """Inverse temperature reached."""
    moves: int
    """Moves made there."""
    step_size: float
    """Leapfrog step at its end, in whitened units: the middle of the particles' steps."""
    num_steps: int
    """Leapfrog steps spent per particle."""
    acceptance: float
    """Mean acceptance of the Hamiltonian moves."""
    jumps: float
    """Mean acceptance of the independence jumps; 0 where they were dropped."""
    correlation: float
    """Correlation of the particles with where they stood before the moves: root mean square over axes, or
    that of the log-likelihood if larger."""
    level: Level
    """Fidelity of the guide."""


class Moved(NamedTuple):
    """The particles after their moves."""

    q: Tensor
    fine: Value
    info: Info
    """Of the last move."""
    stage: Stage


class Mover:
    """Hamiltonian moves whose tuning carries over from one temperature to the next.

    Args:
        target: the density and its guide.
        generator: source of all randomness.
        step_size: first step size, in whitened units.
        max_steps: most leapfrog steps per move.
        max_moves: most moves per temperature.
        groups: the particles are this many equal runs of rows whose jumps are fitted to one another.
    """

    def __init__(
        self,
        target: Target,
        generator: torch.Generator,
        step_size: float,
        max_steps: int,
        max_moves: int,
        groups: int,
    ) -> None:
        self.target, self.generator = target, generator
        self.step, self.length = SpreadSteps(step_size), TrajectoryLength()
        self.max_steps, self.max_moves = max_steps, max_moves
        self.groups, self.jumping = groups, True

    def run(self, q: Tensor, fine: Value, beta: float, metric: Metric) -> Moved:
        """Move particles at ``q`` until they have decorrelated; ``prior * likelihood^beta`` stays
        invariant."""
        self.target.choose_level(q, fine, beta)
        state = hamiltonian.start(self.target, q, fine, beta)
        origin = metric.whiten(q)
        history: list[float] = []
        families = self.target.families
        steps, acceptance, jumps = 0, 0.0, 0.0
        self.jumping &= q.shape[1] <= MAX_DIM
        proposal = cross_fitted_proposal(q, self.groups, self.target) if self.jumping else None
        for move in range(self.max_moves):
            if proposal is not None:
                state, accepted = jump(self.target, state, proposal, self.generator, beta)
                jumps += float(accepted.mean())
                if jumps < WORTH_JUMPING * (move + 1):
                    proposal, self.jumping = None, False  # colder targets are no easier
            most = self.max_steps if proposal is None else worthwhile_steps(jumps / (move + 1), self.max_steps)
            jitter, step_size = self.length.jitter(move), self.step.step_size
            num_steps = self.length.num_steps(step_size, jitter, most)
            before = metric.whiten(state.q)
            state, info = hamiltonian.transition(
                self.target,
                state,
                step_size=self.step.draw(len(q), self.generator, q.dtype),
                num_steps=num_steps,
                metric=metric,
                generator=self.generator,
                beta=beta,
            )
            after = metric.whiten(info.proposal)
            self.length.update(before, after, info.velocity, info.guide_acceptance, jitter, step_size)
            self.step.update(info.guide_acceptance, num_steps)
            steps += num_steps
            acceptance += float(info.acceptance.mean())
            history.append(
                max(
                    _correlation(origin, metric.whiten(state.q), families),
                    _correlation(fine.log_likelihood[:, None], state.fine.log_likelihood[:, None], families),
                )
            )
            if _decorrelated(history, len(q) // families):
                break
        moves = len(history)
        stage = Stage(
            beta, moves, self.step.step_size, steps, acceptance / moves, jumps / moves, history[-1], self.target.level
        )
        return Moved(state.q, state.fine, info, stage)

    @staticmethod
    def stay(q: Tensor, fine: Value) -> Moved:
        """Particles that are draws of the posterior as they stand, after no move at all."""
        lp = fine.tempered(1.0)
        one, zero, no = torch.ones_like(lp), torch.zeros_like(lp), torch.zeros_like(lp, dtype=torch.bool)
        info = Info(one, one, ~no, no, -lp, zero, 0, q, torch.zeros_like(q))
        return Moved(q, fine, info, Stage(1.0, 0, math.nan, 0, 1.0, 0.0, 0.0, "fine"))


def _correlation(origin: Tensor, now: Tensor, families: int) -> float:
    """Root mean square over columns and families of the correlation, over rows, between two populations."""
    a, b = (x.reshape(families, -1, x.shape[1]) for x in (origin, now))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    product = (a * b).mean(1).square()
    return float((product / (a.square().mean(1) * b.square().mean(1)).clamp_min(1e-30)).mean().sqrt())


def _decorrelated(history: list[float], num_particles: int) -> bool:
    """Whether to stop moving: little correlation is left, or three moves in a row hardly lowered it.

    Moving less looks harmless and is not: particles that keep their log-likelihood carry their weights' luck
    from one temperature to the next, and every island then misses the evidence alike, so that their
    spread does not show it. The second rule is for separated modes: no local move removes the correlation
    that says which mode a particle is in.
    """
    if len(history) < MIN_MOVES:
        return False
    if history[-1] < max(CORRELATION, 1.5 * num_particles**-0.5):
        return True
    return len(history) >= 6 and min(history[-3:]) > 0.93 * min(history[:-3])
