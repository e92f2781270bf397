r"""Elliptical slice sampling for many chains in one batch (Murray, Adams & MacKay 2010, figure 2).

For a prior ``q ~ N(0, I)``: draw ``nu ~ N(0, I)`` and a level ``log y = log L(q) + log u``, and look on the
ellipse

    q(theta) = q cos(theta) + nu sin(theta)

for a point above the level, shrinking the bracket around ``theta = 0`` after each miss. No gradient, nothing
to tune.

With a coarse guide the slice runs on the *guide's* likelihood, and one fine evaluation decides at the end:

    alpha = min(1, [L(q') / L_guide(q')] / [L(q) / L_guide(q)]),

delayed acceptance (Christen & Fox 2005): the slice is reversible for the guide's posterior, so the fine one
is invariant.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flow.solver.fidelity import Level
from ..model.density import BatchedDensity
from .guided_density import Target, Value, pad_rows
from .kernel import SHORT, Kernel, Stats
from .smc import SMC

MAX_SHRINKS = 200
"""Shrinks after which a chain stays where it is (the bracket is then far below rounding)."""


class SliceState(NamedTuple):
    """What the chains carry."""

    q: Tensor
    """``(chains, dim)``"""
    fine: Value
    """Fine density at ``q``."""
    guide: Value
    """Guide's density at ``q``."""


class EllipticalSlice(Kernel[SliceState]):
    """The kernel.

    Args:
        model: a Pyro model whose latent sites have flow priors or standard normal ones.
        level: fidelity of the slice: ``"coarse"``, ``"fine"`` or a number of solver steps; by default the
            cheapest that agrees with the fine density.

    Raises:
        TypeError: if ``model`` is not callable.
        ValueError: when run, if the unconstrained prior is not exactly ``N(0, I)``.

    Example:
        >>> def model(y):
        ...     x = pyro.sample("x", flow.prior())
        ...     pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=y)
        ...
        >>> kernel = ifpyro.EllipticalSlice(model)
        >>> mcmc = ifpyro.MCMC(kernel, 25, warmup_steps=0, num_chains=8, init="prior", seed=0, progress=False)
        >>> mcmc.run(torch.tensor(0.3)).positions().shape
        torch.Size([8, 25, 2])
    """

    def __init__(self, model: Any, *, level: Level | None = None) -> None:
        super().__init__(model, level)

    def check(self, density: BatchedDensity) -> None:
        """See `Kernel.check`."""
        if not density.gaussian_prior:
            raise ValueError(
                "EllipticalSlice expects every latent site to have a flow prior or a standard normal one; "
                "this model has another prior: use HMC or SMC"
            )
        if getattr(density, "families", 1) > 1:  # its chains are evaluated in changing subsets
            raise ValueError("EllipticalSlice takes one data set at a time; HMC and SMC take many")

    def begin(
        self, target: Target, q: Tensor, generator: torch.Generator, warmup_steps: int, particles: SMC | None
    ) -> SliceState:
        """See `Kernel.begin`."""
        self._target, self._generator = target, generator
        self._half = warmup_steps // 2 if warmup_steps >= SHORT else -1
        return self._place(q, self.settle(target, q, warmup_steps, particles))

    def warm_up(self, state: SliceState, step: int) -> tuple[SliceState, Stats]:
        """See `Kernel.warm_up`. Nothing is tuned but the guide, half-way."""
        if step == self._half and self._target.choose_level(state.q, state.fine):
            state = self._place(state.q, state.fine)
        return self.draw(state)

    def freeze(self, state: SliceState) -> SliceState:
        """See `Kernel.freeze`."""
        return state

    def draw(self, state: SliceState) -> tuple[SliceState, Stats]:
        """See `Kernel.draw`."""
        target, generator, q = self._target, self._generator, state.q
        options: dict[str, Any] = {"generator": generator, "device": q.device, "dtype": q.dtype}
        nu = torch.randn(q.shape, **options)
        level = _likelihood(state.guide) + torch.rand(len(q), **options).log()
        theta = 2 * math.pi * torch.rand(len(q), **options)
        low, high = theta - 2 * math.pi, theta.clone()
        proposal = q.clone()
        guide = Value(state.guide.log_prior.clone(), state.guide.log_likelihood.clone())
        active = torch.arange(len(q), device=q.device)
        shrinks = torch.zeros(len(q), dtype=torch.long, device=q.device)
        for _ in range(MAX_SHRINKS):
            angle = theta[active, None]
            point = q[active] * angle.cos() + nu[active] * angle.sin()
            value = target.guide_value(pad_rows(point, len(q)))
            value = Value(value.log_prior[: len(point)], value.log_likelihood[: len(point)])
            shrinks[active] += 1
            above = _likelihood(value) > level[active]
            found = active[above]
            proposal[found] = point[above]
            guide.log_prior[found] = value.log_prior[above]
            guide.log_likelihood[found] = value.log_likelihood[above]
            active = active[~above]
            if len(active) == 0:
                break
            low[active] = torch.where(theta[active] < 0, theta[active], low[active])
            high[active] = torch.where(theta[active] < 0, high[active], theta[active])
            uniform = torch.rand(len(active), **options)
            theta[active] = low[active] + uniform * (high[active] - low[active])

        fine = guide if target.one_level else target.fine(proposal)
        gap_old = _likelihood(state.fine) - _likelihood(state.guide)
        log_ratio = _likelihood(fine) - _likelihood(guide) - gap_old
        acceptance = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0)
        accepted = torch.rand(len(q), **options) < acceptance
        state = SliceState(
            torch.where(accepted[:, None], proposal, q),
            _choose(accepted, fine, state.fine),
            _choose(accepted, guide, state.guide),
        )
        lp = state.fine.tempered(1.0)
        stats = {
            "lp": lp,
            "energy": -lp,
            "acceptance_rate": acceptance,
            "diverging": torch.zeros_like(accepted),
            "step_size": theta.abs(),
            "n_steps": shrinks,
            "fidelity_gap": state.guide.tempered(1.0) - lp,
        }
        return state, stats

    def positions(self, state: SliceState) -> Tensor:
        """See `Kernel.positions`."""
        return state.q

    def report(self) -> dict[str, Any]:
        """The guide's fidelity."""
        return {"inference_method": "elliptical_slice", "guide_level": str(self._target.level)}

    def _place(self, q: Tensor, fine: Value) -> SliceState:
        return SliceState(q, fine, fine if self._target.one_level else self._target.guide_value(q))


def _likelihood(value: Value) -> Tensor:
    return value.log_likelihood.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _choose(accepted: Tensor, new: Value, old: Value) -> Value:
    return Value(
        torch.where(accepted, new.log_prior, old.log_prior),
        torch.where(accepted, new.log_likelihood, old.log_likelihood),
    )
