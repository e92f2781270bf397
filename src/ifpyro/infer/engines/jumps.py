r"""Independence jumps: Metropolis-Hastings proposals that do not care where the chain stands.

The proposal is a frozen mixture, fitted to reference draws (other islands' particles, or warm-up draws):

    g(q) = w p(q) + (1 - w)/M sum_m N(q; r_m, h^2 C_m),

the model's own prior ``p`` (sampled exactly; it guards the tails) beside one Gaussian per reference draw
whose shape ``C_m`` comes from its nearest neighbours. A jump is accepted with ``min(1, pi(q') g(q) / (pi(q)
g(q')))``, so the posterior stays invariant whatever the mixture looks like (Tierney 1994, section 2.3.3). In
a few dimensions such jumps are nearly independent draws and carry chains between separated modes and along
pieces too thin for any step size; in many they are hardly ever accepted, and the samplers then drop them.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .guided_density import Guide, Target, Value, pad_rows
from .hamiltonian import State

PRIOR_WEIGHT = 0.1
BANDWIDTHS = (0.15, 0.25, 0.4, 0.6, 0.9, 1.2)
MAX_COMPONENTS = 512

MAX_DIM = 32
"""Most dimensions in which jumps are tried: beyond, fitting them costs more than they ever bring."""

LEAST_JUMPS = 0.01
"""Acceptance of jumps below which samplers drop them."""

JUMP_COST = 4.0
"""Cost of one jump (a fine evaluation, and the guide where it is accepted), in guide gradients."""


class Proposal(Protocol):
    """What `jump` needs: draws, and their density."""

    def log_density(self, q: Tensor, log_prior: Tensor) -> Tensor:
        """``log g(q)``, shape ``(n,)``, given the model's log-prior at ``q``."""
        ...

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """``num`` draws, ``(num, dim)``."""
        ...


class IndependenceProposal:
    """The mixture ``g``.

    Args:
        reference: draws to fit, ``(M, dim)``; at most `MAX_COMPONENTS` of them are used.
        target: the model, for exact prior draws.
    """

    def __init__(self, reference: Tensor, target: Target) -> None:
        self._target = target
        reference = torch.unique(reference, dim=0)  # resampled copies add nothing but ties
        if len(reference) > MAX_COMPONENTS:
            keep = torch.linspace(0, len(reference) - 1, MAX_COMPONENTS, device=reference.device).long()
            reference = reference[keep]
        num, dim = reference.shape
        spread = reference.std(0).clamp_min(1e-12) if num > 1 else torch.ones_like(reference[0])
        distance = torch.cdist(reference / spread, reference / spread)
        neighbours = min(num, max(2 * dim + 2, 12))
        near = reference[distance.topk(neighbours, largest=False).indices]  # (M, k, dim)
        offset = near - reference[:, None]
        covariance = torch.einsum("mki,mkj->mij", offset, offset) / neighbours
        variance = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-8 * spread.square())
        keep_part = neighbours / (neighbours + dim)
        covariance = keep_part * covariance
        covariance.diagonal(dim1=-2, dim2=-1).copy_(variance * (1 + 1e-6))
        self.reference = reference
        self._factor = torch.linalg.cholesky(covariance)
        inverse = torch.linalg.solve_triangular(
            self._factor,
            torch.eye(dim, dtype=reference.dtype, device=reference.device).expand_as(covariance),
            upper=False,
        )
        # |L_m^{-1} (q - r_m)|^2 for all pairs is one matrix product: stack the inverses, subtract their
        # centres.
        self._inverse = inverse.reshape(num * dim, dim)
        self._centre = (inverse @ reference[:, :, None]).reshape(num * dim)
        self._log_det = self._factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.bandwidth = self._best_bandwidth()

    def _squared_distance(self, q: Tensor) -> Tensor:
        num, dim = self.reference.shape
        return (q @ self._inverse.T - self._centre).reshape(len(q), num, dim).square().sum(-1)

    def _log_kernels(self, squared: Tensor, bandwidth: float) -> Tensor:
        dim = self.reference.shape[1]
        constant = dim * (math.log(bandwidth) + 0.5 * math.log(2 * math.pi))
        return -0.5 * squared / bandwidth**2 - self._log_det - constant

    def _best_bandwidth(self) -> float:
        """The bandwidth of the highest leave-one-out log-likelihood."""
        squared = self._squared_distance(self.reference)
        scores = []
        for bandwidth in BANDWIDTHS:
            log_kernels = self._log_kernels(squared, bandwidth)
            log_kernels.fill_diagonal_(-torch.inf)
            scores.append(float(log_kernels.logsumexp(1).mean()))
        return BANDWIDTHS[max(range(len(scores)), key=scores.__getitem__)]

    def log_density(self, q: Tensor, log_prior: Tensor) -> Tensor:
        """``log g(q)``, shape ``(n,)``, given the model's log-prior at ``q``."""
        log_mixture = self._log_kernels(self._squared_distance(q), self.bandwidth).logsumexp(1)
        log_mixture = log_mixture + math.log((1 - PRIOR_WEIGHT) / len(self.reference))
        return torch.logaddexp(log_mixture, log_prior + math.log(PRIOR_WEIGHT))

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """``num`` draws from the mixture, ``(num, dim)``."""
        reference = self.reference
        options: dict[str, Any] = {"generator": generator, "device": reference.device}
        index = torch.randint(len(reference), (num,), **options)
        noise = torch.randn(num, reference.shape[1], dtype=reference.dtype, **options)
        local = reference[index] + self.bandwidth * (self._factor[index] @ noise[:, :, None])[:, :, 0]
        from_prior = torch.rand(num, **options) < PRIOR_WEIGHT
        return torch.where(from_prior[:, None], self._target.density.sample_prior(num, generator), local)


class GroupedProposal:
    """Equal runs of consecutive rows, each with a proposal of its own; all are evaluated together.

    Args:
        references: the draws to fit for each run, ``(M, dim)``.
        target: the model, for exact prior draws.
    """

    def __init__(self, references: Sequence[Tensor], target: Target) -> None:
        self._target = target
        fitted = [IndependenceProposal(draws, target) for draws in references]
        dim = references[0].shape[1]
        self._count = torch.tensor([len(proposal.reference) for proposal in fitted], device=references[0].device)
        most = int(self._count.max())

        def stack(parts: list[Tensor], fill: float = 0.0) -> Tensor:
            return torch.stack([torch.cat([p, p.new_full((most - len(p), *p.shape[1:]), fill)]) for p in parts])

        self._reference = stack([p.reference for p in fitted])
        self._factor = stack([p._factor for p in fitted])
        self._inverse = stack([p._inverse.reshape(-1, dim, dim) for p in fitted]).flatten(1, 2)
        self._centre = stack([p._centre.reshape(-1, dim) for p in fitted]).flatten(1)
        # What pads a run of few components has no density.
        self._log_det = stack([p._log_det for p in fitted], torch.inf)
        self._bandwidth = torch.tensor([p.bandwidth for p in fitted]).to(self._reference)

    def log_density(self, q: Tensor, log_prior: Tensor) -> Tensor:
        """See `Proposal.log_density`; ``n`` is a multiple of the number of groups."""
        groups, most, dim = self._reference.shape
        whitened = q.reshape(groups, -1, dim) @ self._inverse.mT - self._centre[:, None]
        squared = whitened.reshape(groups, -1, most, dim).square().sum(-1)
        constant = self._log_det + dim * (self._bandwidth.log() + 0.5 * math.log(2 * math.pi))[:, None]
        log_kernels = -0.5 * squared / self._bandwidth[:, None, None].square() - constant[:, None]
        mixture = log_kernels.logsumexp(-1) + math.log(1 - PRIOR_WEIGHT) - self._count.to(q).log()[:, None]
        return torch.logaddexp(mixture.flatten(), log_prior + math.log(PRIOR_WEIGHT))

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """See `Proposal.sample`; ``num`` is a multiple of the number of groups."""
        groups, _, dim = self._reference.shape
        options: dict[str, Any] = {"generator": generator, "device": self._reference.device}
        uniform = torch.rand(groups, num // groups, dtype=torch.float64, **options)
        index = (uniform * self._count[:, None]).long()
        noise = torch.randn(groups, num // groups, dim, 1, dtype=self._reference.dtype, **options)
        run = torch.arange(groups, device=index.device)[:, None]
        step = self._bandwidth[:, None, None] * (self._factor[run, index] @ noise)[..., 0]
        local = (self._reference[run, index] + step).reshape(num, dim)
        from_prior = torch.rand(num, **options) < PRIOR_WEIGHT
        return torch.where(from_prior[:, None], self._target.density.sample_prior(num, generator), local)


def cross_fitted_proposal(q: Tensor, groups: int, target: Target) -> GroupedProposal:
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
    return GroupedProposal(others, target)


def worthwhile_steps(acceptance: float, most: int) -> int:
    """Most leapfrog steps that pay beside jumps: these make an independent draw for ``JUMP_COST /
    acceptance`` gradients, and a trajectory need not cost more."""
    return min(most, math.ceil(JUMP_COST / max(acceptance, LEAST_JUMPS)))


def jump(
    target: Target, state: State, proposal: Proposal, generator: torch.Generator, beta: float = 1.0
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
