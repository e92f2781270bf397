"""Many amortised posteriors made exact in one batch."""

import math
import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..flow.given import GivenFlow
from ..flow.solver.fidelity import fidelity
from ..infer.engines.prior_draws import TRUSTED, usable
from ..infer.engines.smc import SMC
from ..infer.engines.started import StartedDensity
from ..infer.engines.tempering import effective_fraction, systematic_resample
from ..infer.model.many import ManyDataSets
from ..infer.results.diagnostics import pareto_k
from .simulations import Joint

SUFFICIENT = 0.2
"""Effective fraction of a data set's weighted draws from which it is not tempered."""


@dataclass(frozen=True)
class Refined:
    """Exact posteriors of ``S`` data sets.

    Attributes:
        positions: Equally weighted unconstrained draws, ``(S, particles, dim)``.
        log_evidence: ``(S,)``
        log_evidence_se: Standard errors, ``(S,)``.
        pareto_k: Shape of the tail of each data set's importance weights, ``(S,)``: above 0.7 they were not trusted.
        moved: Which data sets were tempered, ``(S,)``.
        evaluations: Evaluations of the model's density, in all.
    """

    joint: Joint
    positions: Tensor
    log_evidence: Tensor
    log_evidence_se: Tensor
    pareto_k: Tensor
    moved: Tensor
    evaluations: int

    def get_samples(self) -> dict[str, Tensor]:
        """Draws of every latent site by name, ``(S, particles, *shape)``."""
        sets, particles, dim = self.positions.shape
        sites = self.joint.base.sites(self.positions.reshape(-1, dim))
        return {name: value.reshape(sets, particles, *value.shape[1:]) for name, value in sites.items()}


def refine_many(
    joint: Joint,
    data: dict[str, Tensor],
    flow: GivenFlow,
    num_particles: int,
    *,
    seed: int | None = None,
    defensive: float = 0.1,
    num_islands: int = 4,
    **options: Any,
) -> Refined:
    """Weigh the draws of all data sets at once, and temper those whose weights are not to be trusted."""
    seed = secrets.randbits(31) if seed is None else seed
    generator = torch.Generator(joint.base.device).manual_seed(seed)
    many = ManyDataSets(joint.model, joint.args, joint.kwargs, data, seed=seed)
    sets = many.families
    density = StartedDensity(many, flow, defensive)
    with torch.no_grad(), fidelity("fine"):
        q = density.sample_prior(sets * num_particles, generator)
        weights = usable(density(q)[1]).double().reshape(sets, num_particles)
    shapes = torch.tensor([pareto_k(row) for row in weights], dtype=torch.double)
    fraction = effective_fraction(weights)
    evidence = weights.logsumexp(1) - math.log(num_particles)
    error = ((1 / fraction - 1) / num_particles).clamp(min=0).sqrt()
    index = systematic_resample(weights, generator)
    positions = q.reshape(sets, num_particles, -1).gather(1, index[..., None].expand(-1, -1, q.shape[1])).clone()
    moved = (shapes > TRUSTED) | (fraction < SUFFICIENT)
    evaluations = sets * num_particles
    chosen = torch.nonzero(moved).flatten()
    if len(chosen):
        part = ManyDataSets(
            joint.model, joint.args, joint.kwargs, {name: value[chosen] for name, value in data.items()}, seed=seed
        )
        counted = _Counted(StartedDensity(part, flow.of_rows(chosen), defensive))
        settings = {"progress": False, "prior_draws": 1, **options}
        smc = SMC(part, num_particles * len(chosen), num_islands=num_islands * len(chosen), seed=seed, **settings)
        smc.run_density(counted)
        positions[chosen] = smc.pooled(num_particles * len(chosen)).reshape(len(chosen), num_particles, -1)
        islands = smc.island_log_evidence.reshape(len(chosen), num_islands)
        evidence[chosen] = islands.logsumexp(1) - math.log(num_islands)
        ratio = (islands - evidence[chosen, None]).exp()
        error[chosen] = ratio.std(1) / num_islands**0.5
        evaluations += counted.evaluations
    return Refined(joint, positions, evidence, error, shapes, moved, evaluations)


class _Counted:
    """A density that counts the rows at which it is evaluated."""

    def __init__(self, density: StartedDensity) -> None:
        self._density, self.evaluations = density, 0
        self.dim, self.gaussian_prior, self.families = density.dim, False, density.families
        self.device, self.dtype, self.batching = density.device, density.dtype, density.batching

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += len(q)
        return self._density(q)

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """See `BatchedDensity.sample_prior`."""
        return self._density.sample_prior(num, generator)

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """See `BatchedDensity.sites`."""
        return self._density.sites(q)
