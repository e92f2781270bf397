r"""Step size and trajectory length, learned from all chains at once during warm-up.

Step size of chains: dual averaging (Nesterov 2009; Hoffman & Gelman 2014, section 3.2) on the *harmonic* mean of the
acceptance probabilities over chains (Hoffman, Radul & Sountsov 2021), which notices the slowest chains. Left
alone it is ruled by the single worst chain: one acceptance of 1e-6 among 64 collapses the step. Each
probability is therefore held above `FLOOR`; what is not a number counts as a rejection.

Step size of particles: the one that accepts most for its cost. At trajectory length ``T`` it maximises

    log E[alpha(step)] - log(T / step + FINE_COST).

Every particle moves with a step of its own, ``step exp(s z)`` with ``z ~ N(0, 1)``, and the slope of the first term in
``log step`` is ``E[alpha z] / (s E[alpha])``; Buchholz, Chopin & Jacob (2021) learn from such a spread too. Particles
that are accepted, or rejected, at any step have no say in it. An aim for a given acceptance would shrink the step for
nothing where some are rejected at any step: where a map all but tears. Chains must leave such places by themselves;
particles are freed by the next resampling.

Trajectory length: gradient ascent on a criterion of the expected change of a statistic ``f`` of the whitened
position over a trajectory of length ``t = u T``, per unit of cost,

    log E[(f(w') - f(w))^2] - log(cost),       cost = t / step + FINE_COST,

with ``f(w) = |w - mean|^2`` (ChEES: Hoffman, Radul & Sountsov 2021, eq. 7) or ``f(w) = (v . (w - mean))^2``
along the leading principal axis ``v`` (SNAPER: Sountsov & Hoffman 2022, eq. 7). Its derivative in ``log T``
is a pure number,

    2 T E[u (f(w') - f(w)) df(w')/dt] / E[(f(w') - f(w))^2] - (T / step) / (T / step + FINE_COST),

with the first term clipped to 2, its value for short trajectories, and chains weighted by their acceptance.
"""

import math

import torch
from torch import Tensor

from ...core.arguments import check_choice

FLOOR = 0.1
"""Least acceptance probability that enters the harmonic mean."""

FINE_COST = 2.0
"""Cost of a fine evaluation and the bookkeeping of one proposal, in guide gradients."""

LEAST_ACCEPTANCE = 0.02
"""Mean acceptance of particles below which their step shrinks, whatever its slope."""

SPREAD = 0.3
"""Standard deviation of the logarithm of the particles' steps."""

SHORT_SHARE, SHORTEST = 0.5, 0.03
"""Share of the particles that make short steps where some are slow, and the shortest step in that of the others."""

GAIN = 0.4
"""How far one move shifts the logarithm of their common step, in units of the slope."""

TRAJECTORY_BOUNDS = (0.1, 30.0)
"""Trajectory lengths considered, in whitened units: a round Gaussian turns around at pi."""


def harmonic_mean(acceptance: Tensor) -> float:
    """Harmonic mean of acceptance probabilities, each held above `FLOOR`; NaN counts as 0."""
    return float(1.0 / acceptance.nan_to_num(0.0, 0.0, 0.0).clamp(FLOOR, 1.0).reciprocal().mean())


def van_der_corput(index: int) -> float:
    """The ``index``-th point (from 1) of the base-2 van der Corput sequence in (0, 1)."""
    value, weight = 0.0, 0.5
    while index:
        value += weight * (index & 1)
        index >>= 1
        weight *= 0.5
    return value


class DualAveraging:
    """Learns the log step size from a stream of acceptance statistics.

    Args:
        step_size: where to start.
        target: the statistic to reach.
    """

    def __init__(self, step_size: float, target: float) -> None:
        self.target = target
        self.restart(step_size)

    def restart(self, step_size: float) -> None:
        """Forget the past and start from ``step_size``."""
        self._anchor = math.log(2.0 * step_size)  # shrink towards bold steps: too short ones waste more
        self._count = 0
        self._error = 0.0
        self._log_average = math.log(step_size)
        self.step_size = step_size

    def update(self, statistic: float) -> None:
        """Take in one acceptance statistic (Hoffman & Gelman 2014, eq. 6; gamma 0.05, t0 10, kappa 0.75)."""
        self._count += 1
        eta = 1.0 / (self._count + 10)
        self._error = (1 - eta) * self._error + eta * (self.target - statistic)
        log_step = self._anchor - math.sqrt(self._count) / 0.05 * self._error
        weight = self._count**-0.75
        self._log_average = weight * log_step + (1 - weight) * self._log_average
        self.step_size = math.exp(log_step)

    @property
    def average(self) -> float:
        """The averaged step size, to freeze after warm-up."""
        return math.exp(self._log_average)


class SpreadSteps:
    """Learns the step that accepts most for its cost from particles that each move with a step of their own.

    Args:
        step_size: where to start.
    """

    def __init__(self, step_size: float) -> None:
        self.step_size = step_size

    def draw(self, num: int, generator: torch.Generator, dtype: torch.dtype, *, short: bool = False) -> Tensor:
        """The steps of ``num`` particles, ``(num, 1)``.

        Args:
            num: how many.
            generator: source of the randomness.
            dtype: of the steps.
            short: whether half of them, drawn anew each time, are to be shorter by up to `SHORTEST`: for particles in
                a place much narrower than the rest. They have no say in the common step.
        """
        options = {"generator": generator, "device": generator.device, "dtype": dtype}
        self._z = torch.randn(num, 1, **options)  # type: ignore[call-overload]
        self._usual = torch.ones_like(self._z[:, 0], dtype=torch.bool)
        log_step = SPREAD * self._z
        if short:
            uniform, depth = torch.rand(2, num, 1, **options)  # type: ignore[call-overload]
            self._usual = uniform[:, 0] >= SHORT_SHARE
            log_step = torch.where(self._usual[:, None], log_step, math.log(SHORTEST) * depth)
        return self.step_size * log_step.exp()

    def update(self, acceptance: Tensor, num_steps: int) -> None:
        """Take in the acceptance probabilities ``(num,)`` of a move of so many leapfrog steps with the steps drawn
        last."""
        acceptance, z = acceptance[self._usual], self._z[self._usual, 0]
        z = z - z.mean()  # a constant acceptance has no slope
        mean = float(acceptance.mean())
        slope = float((acceptance * z).mean()) / (SPREAD * mean) if mean > LEAST_ACCEPTANCE else -2.0
        ascent = max(-2.0, slope) + num_steps / (num_steps + FINE_COST)
        self.step_size *= math.exp(GAIN * ascent)


class TrajectoryLength:
    """Learns the mean trajectory length and draws jittered ones.

    Args:
        length: where to start, in whitened units.
        criterion: ``"chees"`` or ``"snaper"``.
    """

    def __init__(self, length: float = 1.5, criterion: str = "snaper") -> None:
        check_choice("criterion", criterion, ("chees", "snaper"))
        self.length = length
        self.criterion = criterion
        self._count = 0
        self._log_average = math.log(length)
        self._direction: Tensor | None = None

    def state(self) -> tuple[list[float], Tensor | None]:
        """All that it has learned: numbers, and the principal axis; see `resume`."""
        return [self.length, self._count, self._log_average], self._direction

    def resume(self, numbers: list[float], direction: Tensor | None) -> None:
        """Go on from a `state`."""
        length, count, log_average = numbers
        self.length, self._count, self._log_average = float(length), int(count), float(log_average)
        self._direction = direction

    def jitter(self, index: int) -> float:
        """Factor ``u`` in (0, 2), mean 1, quasi-random: consecutive trajectories cover short and long."""
        return 2.0 * van_der_corput(index + 1)

    def num_steps(self, step_size: float, jitter: float, most: int) -> int:
        """Leapfrog steps of a trajectory of length ``jitter * length``, at least 1 and at most ``most``."""
        return max(1, min(most, math.ceil(jitter * self.length / step_size)))

    def update(
        self,
        before: Tensor,
        after: Tensor,
        velocity: Tensor,
        acceptance: Tensor,
        jitter: float,
        step_size: float,
    ) -> None:
        """Take in one transition of all chains.

        Args:
            before: whitened positions at the start, ``(n, dim)``.
            after: whitened positions proposed, ``(n, dim)``.
            velocity: whitened velocities there, ``(n, dim)``.
            acceptance: acceptance probabilities, ``(n,)``.
            jitter: the factor ``u`` of this trajectory.
            step_size: the step size of this trajectory.
        """
        usable = after.isfinite().all(-1) & velocity.isfinite().all(-1) & (acceptance > 0.01)
        if len(before) < 2 or int(usable.sum()) < 2:
            return
        before, after, velocity = before[usable], after[usable], velocity[usable]
        weight = acceptance[usable] / acceptance[usable].sum()
        mean_before, mean_after = before.mean(0), weight @ after
        x, y, v = before - mean_before, after - mean_after, velocity
        if self.criterion == "snaper":
            axis = self._principal(x)
            x, y, v = (z @ axis[:, None] for z in (x, y, v))
        change = y.square().sum(-1) - x.square().sum(-1)
        size = float((weight * change.square()).sum())
        if not size > 0:
            return
        slope = 4.0 * jitter * self.length * float((weight * change * (y * v).sum(-1)).sum()) / size
        steps = self.length / step_size
        # Beyond the first turn the slope swings by plus or minus the length itself, with mean zero. A short
        # trajectory has slope 2, the most that means anything: clip there, so that the cost decides in the
        # rest.
        ascent = max(-2.0, min(2.0, slope)) - steps / (steps + FINE_COST)
        self._count += 1
        log_length = math.log(self.length) + 0.5 * (self._count + 5) ** -0.5 * ascent
        low, high = TRAJECTORY_BOUNDS
        self.length = math.exp(max(math.log(low), min(math.log(high), log_length)))
        weight_average = (self._count + 1) ** -0.75
        self._log_average += weight_average * (math.log(self.length) - self._log_average)

    def _principal(self, x: Tensor) -> Tensor:
        """One step of the power method towards the leading principal axis, warm-started (deterministic)."""
        if self._direction is None:
            self._direction = torch.ones_like(x[0])
        axis = x.T @ (x @ self._direction)
        self._direction = axis / axis.norm().clamp_min(1e-30)
        return self._direction

    def freeze(self) -> None:
        """Use the averaged length from now on."""
        self.length = math.exp(self._log_average)
