r"""One Hamiltonian Monte Carlo transition for a batch of chains: the guide proposes, the fine density
accepts.

From ``(q, p)`` with ``p ~ N(0, I)`` the leapfrog map under the guide's gradient leads to ``(q', p')``,
accepted with

    alpha = min(1, exp(log pi(q') - |p'|^2/2 - log pi(q) + |p|^2/2)),

``pi`` being the fine (tempered) density at *both* ends. The leapfrog map is volume preserving and reversible
for any field, so the fine density is invariant exactly (Neal 2011, section 5.5.1; Christen & Fox 2005 for the
two-level idea).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .guided_density import Guide, Target, Value
from .integrator import leapfrog
from .metric import Metric

DIVERGENCE = 1000.0
"""Energy error from which a trajectory counts as divergent (Stan's convention)."""


class State(NamedTuple):
    """What a batch of chains carries from one transition to the next."""

    q: Tensor
    """Unconstrained positions, ``(n, dim)``."""
    fine: Value
    """The fine density at ``q``."""
    guide: Guide
    """The guide's value and gradient at ``q``, at the inverse temperature in force."""


class Info(NamedTuple):
    """What diagnostics and adaptation need of one transition. All of shape ``(n,)`` unless stated."""

    acceptance: Tensor
    """Probability of accepting the proposal; 0 where the trajectory failed."""
    guide_acceptance: Tensor
    """The same if the guide decided: leapfrog error alone. Step sizes adapt to this one, since no step size
    can mend a gap between guide and fine density (and trying to collapses the step)."""
    accepted: Tensor
    """Whether it was accepted."""
    diverging: Tensor
    """Whether the energy error passed `DIVERGENCE` or was not finite."""
    energy: Tensor
    """Hamiltonian of the state left behind: minus log-density plus kinetic energy."""
    gap: Tensor
    """Fine minus guide potential at the state left behind."""
    num_steps: int
    """Gradients spent per chain."""
    proposal: Tensor
    """End of the trajectory, ``(n, dim)``."""
    velocity: Tensor
    """Whitened momentum at the end of the trajectory, ``(n, dim)``."""


def start(target: Target, q: Tensor, fine: Value | None = None, beta: float = 1.0) -> State:
    """The state of chains standing at ``q``."""
    fine = target.fine(q) if fine is None else fine
    return State(q, fine, target.guide(q, beta))


def fidelity_gap(state: State, beta: float = 1.0) -> Tensor:
    """Fine minus guide potential, ``(n,)``."""
    return state.guide.value.tempered(beta) - state.fine.tempered(beta)


def transition(
    target: Target,
    state: State,
    *,
    step_size: float | Tensor,
    num_steps: int,
    metric: Metric,
    generator: torch.Generator,
    beta: float = 1.0,
) -> tuple[State, Info]:
    """One transition that leaves ``prior * likelihood^beta`` invariant, at fine fidelity.

    Args:
        target: the density and its guide.
        state: the chains, ``n`` of them.
        step_size: leapfrog step in whitened units; or one for each chain, ``(n, 1)``, drawn without regard to where the
            chain stands.
        num_steps: leapfrog steps, at least 1, the same for every chain.
        metric: the map from whitened coordinates to ``q``.
        generator: source of all randomness, on the device of ``q``.
        beta: inverse temperature.
    """
    q = state.q
    p = torch.randn(q.shape, generator=generator, device=q.device, dtype=q.dtype)
    end = leapfrog(lambda x: target.guide(x, beta), q, p, state.guide, step_size, num_steps, metric)
    fine = end.guide.value if target.one_level else target.fine(end.position)

    log_old, log_new = state.fine.tempered(beta), fine.tempered(beta)
    energy_old = 0.5 * p.square().sum(-1) - log_old
    energy_new = 0.5 * end.momentum.square().sum(-1) - log_new
    error = energy_new - energy_old
    failed = end.failed | ~(error < torch.inf)  # also true where the error is not a number
    # An error of minus infinity would leave an impossible state: always accept. Plus infinity (density) is a
    # bug.
    failed = failed | (log_new == torch.inf)
    acceptance = torch.where(failed, torch.zeros_like(error), (-error).clamp(max=0.0).exp())
    guide_error = error + (log_new - end.guide.value.tempered(beta)) - (log_old - state.guide.value.tempered(beta))
    guide_acceptance = torch.where(end.failed, torch.zeros_like(error), (-guide_error).clamp(max=0.0).exp())
    uniform = torch.rand(len(q), generator=generator, device=q.device, dtype=q.dtype)
    accepted = uniform < acceptance

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accepted if new.ndim == 1 else accepted[:, None], new, old)

    def choose_value(new: Value, old: Value) -> Value:
        return Value(choose(new.log_prior, old.log_prior), choose(new.log_likelihood, old.log_likelihood))

    state = State(
        choose(end.position, q),
        choose_value(fine, state.fine),
        Guide(choose_value(end.guide.value, state.guide.value), choose(end.guide.gradient, state.guide.gradient)),
    )
    info = Info(
        acceptance=acceptance,
        guide_acceptance=guide_acceptance.nan_to_num(0.0),
        accepted=accepted,
        diverging=failed | (error > DIVERGENCE),
        energy=torch.where(accepted, energy_new, energy_old),
        gap=fidelity_gap(state, beta),
        num_steps=num_steps,
        proposal=end.position,
        velocity=end.momentum,
    )
    return state, info
