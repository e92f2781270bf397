r"""The first population of tempered SMC: many prior draws, evaluated once and without gradients.

Where prior draws carry weight, importance sampling from the prior beats every move: it costs one evaluation a draw. A
*pilot* of as many prior draws as there are particles estimates the effective fraction of the importance weights ``w_i
= likelihood(q_i)``, hence how many draws have an effective sample size of `SUFFICIENT` times the particles. If so many
are allowed, the population is so many *fresh* draws, and the particles are resampled from it without a move. If not,
it is `START` fresh draws per particle, and tempering starts at the inverse temperature at which their effective sample
size equals the number of particles.

The pilot is thrown away: a number of draws that depended on the draws themselves would bias the evidence. Whether to
stop or to go on may depend on them: given the population, the evidence that SMC goes on to estimate has expectation
``mean_i w_i`` (Del Moral 2004, section 7.4.1), which is also the estimate of who stops.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .guided_density import Target, Value
from .starts import check_start
from .tempering import effective_fraction

SUFFICIENT = 1.25
"""Effective draws per particle from which the particles are resampled and left alone. Systematic resampling then hardly
repeats a draw, and the particles are worth as many independent ones."""

TRUSTED = 0.7
"""Shape of the tail of importance weights up to which they are to be trusted (Vehtari et al. 2024)."""

MARGIN = 1.2
"""How many more draws are taken than the pilot asks for, which only estimates."""

START = 4
"""Draws per particle where not enough are allowed: four save one temperature, for about what it costs; more save less
than they cost."""


class Population(NamedTuple):
    """Prior draws of all islands, ``per_particle`` for every particle; those of an island are consecutive rows."""

    q: Tensor
    fine: Value
    per_particle: int


def prior_population(
    target: Target, num: int, islands: int, most_per_particle: int, generator: torch.Generator
) -> Population:
    """At most ``most_per_particle * num`` prior draws and their fine densities, ``num`` at a time.

    Args:
        target: the density.
        num: number of particles, a multiple of ``islands``.
        islands: samplers that share nothing but tuning.
        most_per_particle: 1 for as many draws as particles, and no pilot.
        generator: source of all randomness.

    Raises:
        ValueError: if the model is impossible, or not a number, at every one of the first ``num`` draws.
    """
    q = target.density.sample_prior(num, generator)
    fine = target.fine(q)
    check_start(fine, "prior draws")
    if most_per_particle == 1:
        return Population(q, fine, 1)
    fraction = float(effective_fraction(usable(fine.log_likelihood).reshape(target.families, -1)).min())
    count = math.ceil(MARGIN * SUFFICIENT / max(fraction, 1e-9))
    if count > most_per_particle:
        count = min(START, most_per_particle)
    parts = []
    for _ in range(count):
        q = target.density.sample_prior(num, generator)
        parts.append((q, *target.fine(q)))
    # Rows know their data set by their place, so every part has rows of every island: bring an island's together.
    columns = zip(*parts, strict=True)
    q, log_prior, log_likelihood = (
        torch.stack([x.reshape(islands, -1, *x.shape[1:]) for x in column], 1).flatten(0, 2) for column in columns
    )
    return Population(q, Value(log_prior, log_likelihood), count)


def suffices(log_weight: Tensor, per_island: int, families: int, pareto_k: float) -> bool:
    """Whether ``per_island`` particles resampled from each island's importance weights need no move: in every family
    the effective draws are `SUFFICIENT` times as many, and no few weights rule.

    Args:
        log_weight: ``(islands, draws)``, unnormalised.
        per_island: particles of each island.
        families: equal runs of islands with different targets.
        pareto_k: of the weights; not a number where they have no tail.
    """
    effective = effective_fraction(log_weight).reshape(families, -1).mean(1) * log_weight.shape[1]
    return bool((effective >= SUFFICIENT * per_island).all()) and not pareto_k > TRUSTED


def usable(log_likelihood: Tensor) -> Tensor:
    """With what is not a number counted as impossible."""
    return log_likelihood.nan_to_num(-torch.inf, torch.inf, -torch.inf)
