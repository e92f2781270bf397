"""A batched density seen at two fidelities: a *guide* that gives gradients, and the fine density that
decides.

The guide may be a coarse solve of the flows inside the model. It steers proposals only; acceptance always
uses the fine density, so a poor guide costs efficiency and never correctness.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...flow.solver.fidelity import Evaluations, Level, at, fidelity
from ..model.density import BatchedDensity, log_density_and_grad

LADDER: tuple[Level, ...] = (*map(Evaluations, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)), "fine")
"""Guides from cheap to exact, tried in this order."""


class Agreement(NamedTuple):
    """What a guide must reach: acceptance between draws, were the guide followed perfectly."""

    mean: float
    """On average over pairs of draws."""
    nearly_all: float
    """From all but a twentieth of the draws: the others are sticky."""


LOOSE = Agreement(0.8, 0.4)
"""For particles, which a resampling frees from sticky places. One to four evaluations of a flow often suffice."""

CLOSE = Agreement(0.85, 0.5)
"""For chains, which must leave every place by themselves."""

PATIENCE = 10
"""Evaluations in a row that may be undefined at every draw before the model counts as broken."""


class Value(NamedTuple):
    """The two terms of a log-density at a batch of draws."""

    log_prior: Tensor
    """``(n,)``"""
    log_likelihood: Tensor
    """``(n,)``"""

    def tempered(self, beta: float) -> Tensor:
        """``log_prior + beta * log_likelihood``, with everything that is not a number counted as
        impossible."""
        total = self.log_prior + beta * self.log_likelihood if beta > 0 else self.log_prior
        return torch.where(total.isnan(), -torch.inf, total)


class Guide(NamedTuple):
    """The guide's value and gradient at a batch of draws."""

    value: Value
    gradient: Tensor
    """Of the tempered log-density, ``(n, dim)``."""


class Target:
    """A density with its guide, evaluated in chunks.

    Args:
        density: the batched model.
        batch_size: most rows evaluated at once; all of them if ``None``. Bounds the memory of the gradient.
        level: the guide's fidelity; chosen by measurement later if ``None``.
        agreement: what the guide must reach when it is chosen.
    """

    def __init__(
        self,
        density: BatchedDensity,
        batch_size: int | None = None,
        level: Level | None = None,
        agreement: Agreement = CLOSE,
    ) -> None:
        self.density = density
        self.families: int = getattr(density, "families", 1)
        """Equal runs of consecutive rows, one per data set (`ifpyro.infer.model.many`); nothing is pooled across
        them, and such a density is never given a part of its rows, but sees to its memory itself."""
        self.batch_size = batch_size if self.families == 1 else None
        self.level: Level = LADDER[0] if level is None else level
        self._asked, self.agreement = level, agreement
        self.one_level = False
        """Whether guide and fine density were found to be the same function (no flow inside)."""
        self._undefined = 0

    def fine(self, q: Tensor) -> Value:
        """The fine density at ``q`` of shape ``(n, dim)``, without a graph."""
        with torch.no_grad(), fidelity("fine"):
            parts = [self.density(chunk) for chunk in self._chunks(q)]
        return self._watch(Value(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])))

    def guide(self, q: Tensor, beta: float = 1.0) -> Guide:
        """The guide's value and tempered gradient at ``q`` of shape ``(n, dim)``."""
        with at(self.level):
            parts = [log_density_and_grad(self.density, chunk, beta) for chunk in self._chunks(q)]
        log_prior, log_likelihood, gradient = (torch.cat(column) for column in zip(*parts, strict=True))
        return Guide(self._watch(Value(log_prior, log_likelihood)), gradient)

    def guide_value(self, q: Tensor) -> Value:
        """The guide's value alone, without a graph."""
        with torch.no_grad(), at(self.level):
            parts = [self.density(chunk) for chunk in self._chunks(q)]
        return Value(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))

    def choose_level(self, q: Tensor, fine: Value, beta: float = 1.0) -> bool:
        """Take the cheapest guide of the ladder that agrees with the fine density around the draws ``q``.

        A proposal that follows the guide perfectly from draw i to draw j is accepted with probability
        ``min(1, exp(gap_i - gap_j))``, ``gap`` being the fine minus the guide's potential. A guide passes
        when this reaches what the `Agreement` asks.

        A level the user asked for is taken as it is.

        Returns:
            Whether the level changed (the gradients in hand are then stale).
        """
        before = self.level
        if self._asked is not None or self.one_level:
            self.level = self._asked or LADDER[0]
            return self.level != before
        for level in LADDER:
            self.level = level
            if level == "fine":
                break
            guide = self.guide_value(q)
            if torch.equal(guide.log_likelihood, fine.log_likelihood) and torch.equal(guide.log_prior, fine.log_prior):
                # A flow solved in fewer steps never agrees to the last bit on a whole batch: nothing here has
                # two levels.
                self.one_level = level == LADDER[0]
                break
            gap = (guide.tempered(beta) - fine.tempered(beta)).reshape(self.families, -1)
            accept = (gap[:, :, None] - gap[:, None, :]).clamp(max=0).exp().nan_to_num(0.0).mean(2).flatten()
            if accept.mean() >= self.agreement.mean and accept.quantile(0.05) >= self.agreement.nearly_all:
                break
        return self.level != before

    def _watch(self, value: Value) -> Value:
        """One chain may wander to where the model is undefined; a model undefined everywhere, again and
        again, broke."""
        undefined = bool((value.log_prior + value.log_likelihood).isnan().all())
        self._undefined = self._undefined + 1 if undefined else 0
        if self._undefined >= PATIENCE:
            raise FloatingPointError(
                f"the model's log-density was NaN at every draw in {PATIENCE} evaluations in a row"
            )
        return value

    def _chunks(self, q: Tensor) -> tuple[Tensor, ...]:
        return (q,) if self.batch_size is None or len(q) <= self.batch_size else q.split(self.batch_size)


def pad_rows(q: Tensor, most: int) -> Tensor:
    """``q`` with its first row repeated up to the next power of two, at most ``most`` rows.

    Subsets of the chains come in any number; a model that checks or compiles each new batch size meets few of
    them.
    """
    rows = min(most, 1 << (len(q) - 1).bit_length())
    return torch.cat([q, q[:1].expand(rows - len(q), -1)]) if rows > len(q) else q
