r"""Independence jumps: Metropolis-Hastings proposals that do not care where the chain stands.

The proposal is a frozen mixture, fitted to reference draws (other islands' particles, or warm-up draws):

    g(q) = w p(q) + (1 - w)/M sum_m N(q; r_m, h^2 C_m),

the model's own prior ``p`` (sampled exactly; it guards the tails) beside one Gaussian around all reference draws, or,
where that predicts them better, one around each of many, whose shape ``C_m`` comes from its nearest neighbours. A jump
is accepted with ``min(1, pi(q') g(q) / (pi(q) g(q')))``, so the posterior stays invariant whatever the mixture looks
like (Tierney 1994, section 2.3.3). In a few dimensions such jumps are nearly independent draws and carry chains between
separated modes and along pieces too thin for any step size; in many they are hardly ever accepted, and the samplers
then drop them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .guided_density import Guide, Target, Value, pad_rows
from .hamiltonian import State
from .metric import metric_from_draws

PRIOR_WEIGHT = 0.1
BANDWIDTHS = (0.15, 0.25, 0.4, 0.6, 0.9, 1.2)
"""Widths of the kernels tried, in those of their neighbourhoods."""

WIDTHS = (1.0, 1.0, 1.0, 1.6)
"""Gaussians around the draws as a whole, in standard deviations; the widest guards the tails."""

MAX_REFERENCES, MAX_COMPONENTS = 512, 512
"""Most draws a proposal is fitted to, and most kernels around them: its density costs as much as it has kernels."""

MAX_DIM = 32
"""Most dimensions in which jumps are tried: beyond, fitting them costs more than they ever bring."""

LEAST_JUMPS = 0.01
"""Acceptance of jumps below which samplers drop them."""

JUMP_COST = 4.0
"""Cost of one jump (a fine evaluation, and the guide where it is accepted), in guide gradients."""


class Mixture(NamedTuple):
    """A mixture of Gaussians of equal weight in whitened coordinates ``z = S^{-1} (q - centre)``."""

    centre: Tensor
    """``(dim,)``"""
    scale: Tensor
    """``S``, ``(dim, dim)``"""
    location: Tensor
    """``(M, dim)``"""
    factor: Tensor
    """Cholesky factors of the components' covariances, ``(M, dim, dim)``."""


class IndependenceProposal:
    """The mixture ``g``, or one for each of several equal runs of consecutive rows.

    Args:
        reference: draws to fit, ``(M, dim)``; or one such tensor for each run.
        target: the model, for exact prior draws.
    """

    def __init__(self, reference: Tensor | Sequence[Tensor], target: Target) -> None:
        self._target = target
        fitted = [fit_mixture(draws) for draws in ([reference] if isinstance(reference, Tensor) else reference)]
        first = fitted[0].location
        self._count = torch.tensor([len(mixture.location) for mixture in fitted], device=first.device)
        most = int(self._count.max())

        def stack(parts: list[Tensor], fill: float = 0.0) -> Tensor:
            return torch.stack([torch.cat([p, p.new_full((most - len(p), *p.shape[1:]), fill)]) for p in parts])

        self._centre = torch.stack([mixture.centre for mixture in fitted])[:, None]
        self._scale = torch.stack([mixture.scale for mixture in fitted])
        self._location = stack([mixture.location for mixture in fitted])
        self._factor = stack([mixture.factor for mixture in fitted])
        # |L_m^{-1} (z - r_m)|^2 for all pairs is one matrix product: stack the inverses, subtract their centres.
        inverse = [_inverse(mixture.factor) for mixture in fitted]
        self._inverse = stack(inverse).flatten(1, 2)
        centres = [(i @ m.location[:, :, None])[..., 0] for i, m in zip(inverse, fitted, strict=True)]
        self._offset = stack(centres).flatten(1)
        log_det = [_log_det(mixture.factor) for mixture in fitted]
        # What pads a run of few components has no density.
        self._log_det = stack(log_det, torch.inf) + _log_det(self._scale)[:, None]

    def log_density(self, q: Tensor, log_prior: Tensor) -> Tensor:
        """``log g(q)``, shape ``(n,)``, given the model's log-prior at ``q``; ``n`` is a multiple of the runs."""
        groups, most, dim = self._location.shape
        z = _whiten(q.reshape(groups, -1, dim), self._centre, self._scale)
        squared = (z @ self._inverse.mT - self._offset[:, None]).reshape(groups, -1, most, dim).square_().sum(-1)
        log_kernels = squared.mul_(-0.5).sub_((self._log_det + 0.5 * dim * math.log(2 * math.pi))[:, None])
        mixture = log_kernels.logsumexp(-1) + math.log(1 - PRIOR_WEIGHT) - self._count.to(q).log()[:, None]
        return torch.logaddexp(mixture.flatten(), log_prior + math.log(PRIOR_WEIGHT))

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """``num`` draws, ``(num, dim)``; ``num`` is a multiple of the runs."""
        groups, _, dim = self._location.shape
        options: dict[str, Any] = {"generator": generator, "device": self._location.device}
        uniform = torch.rand(groups, num // groups, dtype=torch.float64, **options)
        index = (uniform * self._count[:, None]).long()
        noise = torch.randn(groups, num // groups, dim, 1, dtype=self._location.dtype, **options)
        run = torch.arange(groups, device=index.device)[:, None]
        z = self._location[run, index] + (self._factor[run, index] @ noise)[..., 0]
        local = (self._centre + z @ self._scale.mT).reshape(num, dim)
        from_prior = torch.rand(num, **options) < PRIOR_WEIGHT
        return torch.where(from_prior[:, None], self._target.density.sample_prior(num, generator), local)


def fit_mixture(draws: Tensor) -> Mixture:
    """The mixture that predicts draws best, each left out in turn: one Gaussian with a wider one around it, or a kernel
    for each of at most `MAX_COMPONENTS` draws.

    Everything happens in coordinates in which the draws are round as a whole: a ridge then is as easy as a ball.

    Args:
        draws: ``(M, dim)``; at most `MAX_REFERENCES` of them are used.
    """
    draws = torch.unique(draws, dim=0)  # resampled copies add nothing but ties
    draws = _thin(draws, MAX_REFERENCES)
    num, dim = draws.shape
    scale = metric_from_draws(draws).scale
    scale = scale.diag() if scale.ndim == 1 else scale
    centre = draws.double().mean(0).to(draws.dtype)
    z = _whiten(draws, centre, scale)
    widths = z.new_tensor(WIDTHS)
    whole = widths[:, None, None] * torch.eye(dim).to(z)
    round_one = -0.5 * z.square().sum(1)[:, None] / widths.square() - dim * widths.log()
    # The draws themselves decided on mean and covariance, and flatter them by so much.
    best = float(round_one.logsumexp(1).mean()) - math.log(len(WIDTHS)) - 0.5 * dim * (dim + 3) / num
    location, factor = torch.zeros_like(whole[..., 0]), whole
    if num > dim + 1:
        chosen = _thin(torch.arange(num, device=z.device), MAX_COMPONENTS)
        local = _local_factor(z, chosen)
        squared = (z @ _inverse(local).flatten(0, 1).mT).reshape(num, len(chosen), dim)
        squared = (squared - (_inverse(local) @ z[chosen][:, :, None])[..., 0]).square().sum(-1)
        own = torch.zeros_like(squared).index_put((chosen, torch.arange(len(chosen), device=z.device)), z.new_ones(()))
        squared = torch.where(own > 0, torch.inf, squared)
        for bandwidth in BANDWIDTHS:
            kernels = -0.5 * squared / bandwidth**2 - _log_det(local) - dim * math.log(bandwidth)
            score = float((kernels.logsumexp(1) - (len(chosen) - own.sum(1)).log()).mean())
            if score > best:
                best, location, factor = score, z[chosen], bandwidth * local
    return Mixture(centre, scale, location, factor)


def _local_factor(z: Tensor, chosen: Tensor) -> Tensor:
    """Cholesky factors of the covariances of the nearest neighbours of the draws ``z[chosen]`` among all."""
    num, dim = z.shape
    neighbours = min(num, max(2 * dim + 2, 12))
    near = z[torch.cdist(z[chosen], z).topk(neighbours, largest=False).indices]  # (M, k, dim)
    offset = near - z[chosen][:, None]
    covariance = torch.einsum("mki,mkj->mij", offset, offset) / neighbours
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-8)
    covariance = neighbours / (neighbours + dim) * covariance
    covariance.diagonal(dim1=-2, dim2=-1).copy_(variance * (1 + 1e-6))
    return torch.linalg.cholesky(covariance)


def _thin(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]


def _whiten(q: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """``S^{-1} (q - centre)``, in double precision on the way: along a narrow ridge the terms all but cancel."""
    away = (q.double() - centre.double()).mT
    return torch.linalg.solve_triangular(scale.double(), away, upper=False).mT.to(q.dtype)


def _inverse(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def _log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def cross_fitted_proposal(q: Tensor, groups: int, target: Target) -> IndependenceProposal:
    """For each group of consecutive draws the proposal fitted to *the others*.

    A proposal with a kernel around the very particle that it moves offers that particle its own place again;
    see also `ifpyro.infer.engines.metric.cross_fitted_metric`.

    Args:
        q: equally weighted draws, ``(n, dim)``, ``n`` a multiple of ``groups``.
        groups: how many groups, at least 2 in each of the target's families, whose others are its own.
        target: the model.
    """
    others = []
    for family in q.chunk(target.families):
        parts = family.chunk(groups // target.families)
        others += [torch.cat([*parts[:group], *parts[group + 1 :]]) for group in range(len(parts))]
    return IndependenceProposal(others, target)


def worthwhile_steps(acceptance: float, most: int) -> int:
    """Most leapfrog steps that pay beside jumps: these make an independent draw for ``JUMP_COST /
    acceptance`` gradients, and a trajectory need not cost more."""
    return min(most, math.ceil(JUMP_COST / max(acceptance, LEAST_JUMPS)))


def jump(
    target: Target, state: State, proposal: IndependenceProposal, generator: torch.Generator, beta: float = 1.0
) -> tuple[State, Tensor]:
    """One independence jump of every chain; the fine density at inverse temperature ``beta`` is invariant.

    Returns:
        the new state and the acceptance probabilities ``(n,)``.
    """
    q = proposal.sample(len(state.q), generator)
    fine = target.fine(q)
    log_ratio = (
        fine.tempered(beta)
        - state.fine.tempered(beta)
        + proposal.log_density(state.q, state.fine.log_prior)
        - proposal.log_density(q, fine.log_prior)
    )
    acceptance = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0)
    uniform = torch.rand(len(q), generator=generator, device=q.device, dtype=q.dtype)
    accepted = uniform < acceptance
    if not bool(accepted.any()):
        return state, acceptance

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accepted if new.ndim == 1 else accepted[:, None], new, old)

    # Only the chains that jumped need the guide at their new place.
    count = int(accepted.sum())
    if target.families > 1:  # rows know their data by their place
        new = target.guide(torch.where(accepted[:, None], q, state.q), beta)
        guide = Guide(Value(*(term[accepted] for term in new.value)), new.gradient[accepted])
    else:
        guide = target.guide(pad_rows(q[accepted], len(q)), beta)
    value = Value(state.guide.value.log_prior.clone(), state.guide.value.log_likelihood.clone())
    gradient = state.guide.gradient.clone()
    value.log_prior[accepted] = guide.value.log_prior[:count]
    value.log_likelihood[accepted] = guide.value.log_likelihood[:count]
    gradient[accepted] = guide.gradient[:count]
    fine = Value(choose(fine.log_prior, state.fine.log_prior), choose(fine.log_likelihood, state.fine.log_likelihood))
    return State(choose(q, state.q), fine, Guide(value, gradient)), acceptance
