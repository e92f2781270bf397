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
from .hamiltonian import Info, State
from .jumps import MAX_DIM, cross_fitted_proposal, jump, worthwhile_steps
from .metric import Metric
from .prior_draws import Population, usable
from .tempering import next_temperature

REFIT = 3
"""Moves after which jumps are fitted anew, to where the particles have come."""

PATIENT = (2, 4)
"""Moves after which half of the particles, drawn anew each time, try short steps, since some may be in a narrow place:
with jumps, and without, which is in many dimensions, where all steps cost alike and short ones bring little."""

MIN_MOVES = 4
"""Moves made at every temperature: stopping at the first low correlation would pick the lucky ones."""

DRIFT = 1.5
"""Standard errors by which the weight to come may differ between the later and the earlier half of the moves."""

SETTLED = 6
"""Moves from which the first third of the states is left out of the particles."""

REDUNDANCY = (0.3, 0.4)
"""Variance of the means over chains, in that of single states, at which moves stop: with jumps, and without."""

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
    redundancy: float
    """Variance of the means over chains in that of single states: of position, log-likelihood or next weight, the
    largest."""
    level: Level
    """Fidelity of the guide."""


class Moved(NamedTuple):
    """The particles after their moves."""

    q: Tensor
    fine: Value
    pool: Population
    """All states that the moves have visited, those of a particle in a row."""
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
        centre = q.mean(0)  # the groups' metrics differ: far from the origin their coordinates have nothing in common
        trail = Trail(metric.whiten(q - centre), fine.log_likelihood, self.target.families, beta)
        visited: list[State] = []
        steps, acceptance, jumps = 0, 0.0, 0.0
        self.jumping &= q.shape[1] <= MAX_DIM
        proposal = cross_fitted_proposal(q, self.groups, self.target) if self.jumping else None
        for move in range(self.max_moves):
            if proposal is not None and move and move % REFIT == 0:
                proposal = cross_fitted_proposal(state.q, self.groups, self.target)
            if proposal is not None:
                state, accepted = jump(self.target, state, proposal, self.generator, beta)
                jumps += float(accepted.mean())
                if jumps < WORTH_JUMPING * (move + 1):
                    proposal, self.jumping = None, False  # colder targets are no easier
            most = self.max_steps if proposal is None else worthwhile_steps(jumps / (move + 1), self.max_steps)
            jitter, step_size = self.length.jitter(move), self.step.step_size
            num_steps = self.length.num_steps(step_size, jitter, most)
            before = metric.whiten(state.q - centre)
            state, info = hamiltonian.transition(
                self.target,
                state,
                step_size=self.step.draw(len(q), self.generator, q.dtype, short=move >= PATIENT[proposal is None]),
                num_steps=num_steps,
                metric=metric,
                generator=self.generator,
                beta=beta,
            )
            after = metric.whiten(info.proposal - centre)
            self.length.update(before, after, info.velocity, info.guide_acceptance, jitter, step_size)
            self.step.update(info.guide_acceptance, num_steps)
            steps += num_steps
            acceptance += float(info.acceptance.mean())
            visited.append(state)
            trail.add(metric.whiten(state.q - centre), state.fine.log_likelihood)
            if trail.suffices(REDUNDANCY[proposal is None]):
                break
        moves = len(visited)
        if moves >= SETTLED:
            visited = visited[moves // 3 :]
        stage = Stage(
            beta,
            moves,
            self.step.step_size,
            steps,
            acceptance / moves,
            jumps / moves,
            trail.history[-1],
            self.target.level,
        )
        pool = Population(
            torch.stack([each.q for each in visited], 1).flatten(0, 1),
            Value(
                torch.stack([each.fine.log_prior for each in visited], 1).flatten(),
                torch.stack([each.fine.log_likelihood for each in visited], 1).flatten(),
            ),
            len(visited),
        )
        return Moved(state.q, state.fine, pool, info, stage)

    @staticmethod
    def stay(q: Tensor, fine: Value) -> Moved:
        """Particles that are draws of the posterior as they stand, after no move at all."""
        lp = fine.tempered(1.0)
        one, zero, no = torch.ones_like(lp), torch.zeros_like(lp), torch.zeros_like(lp, dtype=torch.bool)
        info = Info(one, one, ~no, no, -lp, zero, 0, q, torch.zeros_like(q))
        return Moved(q, fine, Population(q, fine, 1), info, Stage(1.0, 0, math.nan, 0, 1.0, 0.0, 0.0, "fine"))


class Trail:
    """What the particles' moves have visited so far, and whether it is enough.

    Every state of every move is a particle (Dau & Chopin 2022). They are enough where the mean over a chain varies
    little from chain to chain, beside single states: of the position, of the log-likelihood, and of the weight that is
    to come, which looks at the few particles that matter next. Particles that hardly move keep the means of their
    chains apart, be they few, if they are those that matter.
    """

    def __init__(self, w: Tensor, log_likelihood: Tensor, families: int, beta: float) -> None:
        self.families, self.beta = families, beta
        self.history: list[float] = []
        self._w: list[Tensor] = []
        self._log_likelihood: list[Tensor] = []
        self._drift = 0.0

    def add(self, w: Tensor, log_likelihood: Tensor) -> None:
        """Take in whitened positions ``(n, dim)`` and log-likelihoods ``(n,)`` after one more move."""
        self._w.append(w)
        self._log_likelihood.append(log_likelihood)
        if len(self._w) < MIN_MOVES:
            self.history.append(1.0)
            return
        likelihood = usable(torch.stack(self._log_likelihood, 1)).double()
        shape = (self.families, -1, likelihood.shape[1])
        found = [_redundancy(torch.stack(self._w, 1).double().reshape(*shape, w.shape[-1]))]
        rank = likelihood.reshape(self.families, -1).argsort(1).argsort(1).double()
        found.append(_redundancy(rank.reshape(*shape, 1)))
        if self.beta < 1.0:
            after = next_temperature(likelihood.reshape(self.families, -1), self.beta, 0.5, self.families)
            weight = torch.softmax((after - self.beta) * likelihood.reshape(self.families, -1), 1)
            found.append(_redundancy(weight.reshape(*shape, 1)))
            self._drift = _drift(weight.reshape(self.families, -1, likelihood.shape[1]))
        self.history.append(max(found))

    def suffices(self, enough: float) -> bool:
        """Whether to stop moving: chains are worth several draws each, or three moves in a row hardly gained; and the
        weight to come does not drift, as it does while particles are still finding where it is largest.

        The second rule is for separated modes: no local move removes what says which mode a particle is in.
        """
        history = self.history
        if len(history) < MIN_MOVES or self._drift > DRIFT:
            return False
        stuck = len(history) >= MIN_MOVES + 3 and min(history[-3:]) > 0.93 * min(history[:-3])
        return stuck or history[-1] < enough


def _drift(values: Tensor) -> float:
    """By how many standard errors the later half of the chains' states, ``(families, chains, states)``, differs on
    average from the earlier half; the worst family."""
    early, late = values.tensor_split(2, 2)
    difference = late.mean(2) - early.mean(2)
    error = (difference.var(1) / difference.shape[1]).sqrt().clamp_min(1e-300)
    return float((difference.mean(1) / error).abs().max())


def _redundancy(values: Tensor) -> float:
    """Variance of chains' means over that of single states, ``(families, chains, states, columns)``: one over the
    number of states where these are independent, and 1 where chains stand still. Mean over columns, worst family."""
    means = values.mean(2)
    between = (means - means.mean(1, keepdim=True)).square().mean(1)
    total = (values - values.mean((1, 2), keepdim=True)).square().mean((1, 2)).clamp_min(1e-300)
    return float((between / total).mean(1).max())
