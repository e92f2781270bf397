"""Weights, temperatures and resampling of a sequential Monte Carlo sampler, island by island."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CURVED = 3
"""Coordinates that order particles. With more, the order would separate none of them finely."""

HEAVY = 0.5
"""Shape of the tail of weights from which their variance, and with it an effective sample size, means nothing."""


def effective_fraction(log_weight: Tensor) -> Tensor:
    """Effective sample size over the number of particles, ``(sum w)^2 / (N sum w^2)``, along the last axis.

    Zero where every weight is zero.
    """
    top = log_weight.amax(-1, keepdim=True)
    weight = (log_weight - torch.where(top.isfinite(), top, torch.zeros_like(top))).exp()
    total, squares = weight.sum(-1), weight.square().sum(-1)
    return torch.where(squares > 0, total.square() / (squares * log_weight.shape[-1]).clamp_min(1e-38), 0.0)


def next_temperature(
    log_likelihood: Tensor, beta: float, threshold: float, families: int = 1, enough: float = 1.0
) -> float:
    """The largest inverse temperature at which the particles still carry weight.

    Bisection for ``ESS((beta' - beta) log L) / N = threshold``, averaged over islands (Jasra et al. 2011,
    section 3.3; the particles enter with equal weights, so the conditional and the plain effective sample
    size agree).

    Args:
        log_likelihood: ``(islands, particles)``; minus infinity marks particles the likelihood excludes.
        beta: current inverse temperature.
        threshold: effective fraction to keep, in (0, 1), *of the particles that the likelihood allows*: those
            excluded are lost at any temperature above zero.
        families: equal runs of islands with different targets: each of them keeps this fraction.
        enough: effective fraction, of all particles, that need not be exceeded: where there are more than needed.
    """
    allowed = (log_likelihood > -torch.inf).double().reshape(families, -1).mean(1)
    least = (threshold * allowed).clamp_max(enough)

    def keeps(candidate: float) -> bool:
        fraction = effective_fraction((candidate - beta) * log_likelihood.double()).reshape(families, -1).mean(1)
        return bool((fraction >= least).all())

    if keeps(1.0):
        return beta + _light((1.0 - beta) * log_likelihood, families, enough) * (1.0 - beta)
    # Find the scale first: early steps can be as small as 1e-10 under a narrow likelihood.
    low = high = 1.0 - beta
    while not keeps(beta + low):
        low, high = low / 4, low
        if beta + low == beta:  # no representable step keeps enough weight: take the least there is
            return min(1.0, beta + high)
    for _ in range(25):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(beta + middle) else (low, middle)
    return min(1.0, beta + low * _light(low * log_likelihood, families, enough))


def _light(log_weight: Tensor, families: int, enough: float) -> float:
    """The largest power of the weights, at most 1, whose tail is light: the shape of a Pareto tail, here Hill's
    estimate, is proportional to the power."""
    if enough < 1.0:
        return 1.0
    rows = log_weight.double().reshape(families, -1)
    possible = int((rows > -torch.inf).sum(1).min())
    tail = min(possible // 5, math.ceil(3 * possible**0.5))
    if tail < 5:
        return 1.0
    top = rows.topk(tail + 1, 1).values
    shape = float((top[:, :-1] - top[:, -1:]).mean(1).max())
    return min(1.0, HEAVY / shape) if shape > 0 else 1.0


def along_a_curve(q: Tensor) -> Tensor:
    """An order of every island's particles in which neighbours lie close together: Morton's curve.

    Systematic resampling in such an order takes as many particles from every region as its weight asks, to within one,
    so that resampling adds little noise in few dimensions (Gerber, Chopin & Whiteley 2019, with Hilbert's curve). The
    curve runs through the ranks of the first `CURVED` coordinates, their bits in turn.

    Args:
        q: particles, ``(islands, particles, dim)``.

    Returns:
        indices within each island, ``(islands, particles)``.
    """
    rank = q[..., :CURVED].argsort(1).argsort(1)
    axes, bits = rank.shape[-1], (q.shape[1] - 1).bit_length()
    shift = torch.arange(axes, device=q.device)
    key = torch.zeros_like(rank[..., 0])
    for bit in range(bits):
        key = key | ((rank >> bit & 1) << (bit * axes + shift)).sum(-1)
    return key.argsort(1)


def systematic_resample(log_weight: Tensor, generator: torch.Generator, num: int | None = None) -> Tensor:
    """Systematic resampling of every island on its own (Kitagawa 1996).

    Args:
        log_weight: ``(islands, particles)``, unnormalised.
        generator: one uniform number per island is drawn from it.
        num: how many to draw per island; as many as there are by default.

    Returns:
        indices within each island, ``(islands, num)``: particle ``i`` appears ``floor`` or ``ceil`` of
        ``num W_i`` times.
    """
    islands, particles = log_weight.shape
    num = particles if num is None else num
    weight = torch.softmax(log_weight.double(), -1)
    offset = torch.rand(islands, 1, generator=generator, device=log_weight.device, dtype=torch.float64)
    grid = (torch.arange(num, device=log_weight.device, dtype=torch.float64) + offset) / num
    edges = weight.cumsum(-1)
    edges = edges / edges[:, -1:]
    return torch.searchsorted(edges, grid, right=True).clamp_max(particles - 1)


class Genealogy(NamedTuple):
    """The variance of the evidence of every island, from who descends from whom.

    To first order the evidence errs by the mean over chains, summed over temperatures, of ``W - 1``, where ``W`` is a
    chain's mean weight in that of its island. Chains of one ancestor share its luck as long as moves have not made them
    forget it: the errors are summed over each family of a first ancestor, and the families, which are independent, give
    the variance, whether or not moves forget (Lee & Whiteley 2018 take the same families, and their shares).
    """

    ancestor: Tensor
    """First ancestor of every chain, ``(islands, chains)``."""
    error: Tensor
    """Summed errors of the family of every first ancestor, ``(islands, ancestors)``."""

    @classmethod
    def start(cls, islands: int, ancestors: int, device: torch.device) -> "Genealogy":
        """So many independent ancestors in every island."""
        error = torch.zeros(islands, ancestors, dtype=torch.float64, device=device)
        return cls(torch.arange(ancestors, device=device).repeat(islands, 1), error)

    def weigh(self, log_weight: Tensor) -> "Genealogy":
        """After the weights of one temperature, ``(islands, chains * states)``, the states of a chain in a row."""
        chains = self.ancestor.shape[1]
        share = torch.softmax(log_weight.double(), 1).reshape(len(log_weight), chains, -1).sum(2)
        return self._replace(error=self.error.scatter_add(1, self.ancestor, share - 1.0 / chains))

    def resample(self, chain: Tensor) -> "Genealogy":
        """With so many of the chains, ``(islands, particles)``, as ancestors of the next ones."""
        return self._replace(ancestor=self.ancestor.gather(1, chain))

    def variance(self) -> Tensor:
        """Of the logarithm of the evidence, ``(islands,)``."""
        size = torch.zeros_like(self.error).scatter_add(
            1, self.ancestor, torch.full_like(self.ancestor, 1 / self.ancestor.shape[1], dtype=torch.float64)
        )
        # Errors are measured from the island's own mean: few families leave it little to differ from.
        return self.error.square().sum(1) / (1.0 - size.square().sum(1)).clamp_min(0.1)
