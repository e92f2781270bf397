r"""The rows of a plate as blocks: objects with a flow prior each, independent given everything outside the plate.

With globals ``g`` and the latents ``z_i`` of the flows of row ``i``,

.. math:: \log p(g, z, y) = \log p(g) + \sum_i \left[ \log N(z_i; 0, I) + \ell_i(g, z_i) \right],

where ``l_i`` adds up every other term inside the plate. Rows can then be moved and accepted one by one, all of them in
one batch. Which plate that may be is read off the model's own plates; that it is true is verified numerically: terms of
rows that stay where they are must not change when others move, nor may anything outside the plate.
"""

from contextlib import suppress
from typing import Any

import pyro
import torch
from torch import Tensor

from ...core.randomness import seeded
from .handlers import FromVector
from .layout import LatentSite, Layout
from .runner import Runner

LEAST_ROWS = 8
"""Rows from which a plate is worth its own moves."""

_SUBSETS = 16
"""Random halves of the rows that are moved to see whether the others notice."""


class _RowTerms(FromVector):
    """One run whose terms inside a plate keep the plate's dimension."""

    def __init__(self, layout: Layout, q: Tensor, plate: str, **options: Any) -> None:
        super().__init__(layout, q, **options)
        self.plate = plate
        self.frames: dict[str, dict[str, tuple[int, int]]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        frames = [f for f in msg["cond_indep_stack"] if f.vectorized and f.dim is not None]
        self.frames[msg["name"]] = {f.name: (f.dim, f.size) for f in frames}
        super()._pyro_sample(msg)

    def sum_rows(self, terms: Tensor, name: str) -> Tensor:
        """Sum over everything but the plate."""
        dim, size = self.frames[name].get(self.plate, (None, 0))
        if dim is None:
            return terms.sum()
        if terms.dim() < -dim:
            raise ValueError(f"the log-probability of site {name!r} does not have the dimension of its plate")
        axis = terms.dim() + dim
        rows = terms.sum([k for k in range(terms.dim()) if k != axis]) if terms.dim() > 1 else terms
        return rows.expand(size)


class PlateRows:
    """The rows of one plate of a model. See the module.

    Args:
        runner: the model; its flows are known.
        plate: name of the plate.
        size: its number of rows, ``N``.
        sites: latent sites of the flows inside it, each with the axis of its batch that is the plate.

    Attributes:
        entries: where the latents of each row lie in ``q``, ``(N, d)``.
        rest: where everything else lies in ``q``, ``(dim - N d,)``.
    """

    def __init__(self, runner: Runner, plate: str, size: int, sites: dict[str, int]) -> None:
        self.runner, self.plate, self.size, self.sites = runner, plate, size, sites
        layout = runner.layout
        parts = []
        for name, axis in sites.items():
            site = layout.latents[name]
            shape = site.batch_shape + site.unconstrained_event_shape
            place = torch.arange(site.start, site.stop).reshape(shape)
            parts.append(place.movedim(axis, 0).reshape(size, -1))
        self.entries = torch.cat(parts, 1)
        moved = torch.zeros(layout.dim, dtype=torch.bool)
        moved[self.entries.flatten()] = True
        self.rest = (~moved).nonzero().squeeze(1)

    def latents(self, q: Tensor) -> Tensor:
        """The latents of every row, ``(n, N, d)``."""
        return q[:, self.entries.to(q.device)]

    def with_latents(self, q: Tensor, z: Tensor) -> Tensor:
        """``q`` with other latents ``(n, N, d)``."""
        moved = q.clone()
        moved[:, self.entries.flatten().to(q.device)] = z.flatten(1)
        return moved

    def decode(self, q: Tensor) -> dict[str, Tensor]:
        """What all flows of the model make of ``q``."""
        return self.runner.decode(q)

    def decode_rows(self, q: Tensor, rows: Tensor, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the flows make of the rows in question, ``(n, N)``; the others are ``known``."""
        decoded = dict(known)
        for name, axis in self.sites.items():
            site, flow = self.runner.layout.latents[name], self.runner.flows[name]
            z = self._z(q, site).to(site.dtype)
            if flow.batch_shape:  # every row has a condition of its own, which goes by its place in the batch
                decoded[name] = flow.decode(z)
                continue
            z, x = z.movedim(axis + 1, 1), known[name].movedim(axis + 1, 1).clone()
            x[rows] = flow.decode(z[rows])
            decoded[name] = x.movedim(1, axis + 1)
        return decoded

    def choose(self, rows: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
        """Decoded values of ``new`` in the rows ``(n, N)``, of ``old`` in the others."""
        chosen = dict(old)
        for name, axis in self.sites.items():
            fresh, before = new[name].movedim(axis + 1, 1), old[name].movedim(axis + 1, 1)
            mask = rows.reshape(*rows.shape, *(1,) * (fresh.dim() - 2))
            chosen[name] = torch.where(mask, fresh, before).movedim(1, axis + 1)
        return chosen

    def terms(self, q: Tensor, decoded: dict[str, Tensor]) -> Tensor:
        """The terms ``l_i`` of every row, ``(n, N)``."""
        return self._split(q, decoded)[0]

    def totals(self, q: Tensor, decoded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-prior and log-likelihood, each ``(n,)``, differentiable in ``q`` at fixed decoded values."""

        def one(row: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self.runner.single(row, known).totals()

        with pyro.validation_enabled(False):
            return torch.func.vmap(one)(q, decoded)

    def verify(self, q: Tensor, seed: int = 0) -> bool:
        """Whether the rows are independent given the rest, as far as points ``q`` of shape ``(n, dim)`` show."""
        generator = torch.Generator(device=q.device).manual_seed(seed)
        with torch.no_grad(), seeded(seed):
            base = q[:1].expand(_SUBSETS, -1)
            rows = torch.rand(_SUBSETS, self.size, generator=generator, device=q.device) < 0.5
            noise = torch.randn(_SUBSETS, *self.entries.shape, generator=generator, device=q.device, dtype=q.dtype)
            z = torch.where(rows[..., None], noise, self.latents(base))
            moved = self.with_latents(base, z)
            before, outside = self._split(base, self.decode(base))
            after, outside_after = self._split(moved, self.decode(moved))
            prior, likelihood = self.totals(base, self.decode(base))
            normal = torch.distributions.Normal(0.0, 1.0).log_prob(self.latents(base)).sum((1, 2))
        size = 1 + before.abs().amax()
        tolerance = float(torch.finfo(q.dtype).eps ** 0.5 * size)
        same = bool(((after - before).abs()[~rows] <= tolerance).all())
        same = same and bool(((outside_after - outside).abs() <= tolerance).all())
        whole = before.sum(1) + outside + normal
        return same and bool(((whole - prior - likelihood).abs() <= tolerance * self.size).all())

    def _split(self, q: Tensor, decoded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Terms of rows ``(n, N)`` and the sum of all terms outside the plate ``(n,)``."""

        def one(row: Tensor, known: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            flows = {name: (self.runner.flows[name], value) for name, value in known.items()}
            run = self.runner.listen(_RowTerms(self.runner.layout, row, self.plate, decoded=flows))
            zero = row.new_zeros(self.size)
            inside, outside = zero, zero.sum()
            for terms, is_prior in ((run.log_prior, True), (run.log_likelihood, False)):
                for name, value in terms.items():
                    if is_prior and name in self.sites:
                        continue
                    if self.plate in run.frames[name]:
                        inside = inside + value
                    else:
                        outside = outside + value
            return inside, outside

        with pyro.validation_enabled(False):
            rows, rest = torch.func.vmap(one)(q, decoded)
        return rows, rest

    def _z(self, q: Tensor, site: LatentSite) -> Tensor:
        return q[:, site.start : site.stop].reshape(len(q), *site.batch_shape, *site.event_shape)


def find_rows(runner: Runner, q: Tensor) -> PlateRows | None:
    """The plate of flows whose rows can be moved one by one, or None if the model has none.

    Args:
        runner: the model, its flows known.
        q: some possible draws, ``(n, dim)``.
    """
    if not runner.flows:
        return None
    run: _RowTerms = runner.listen(_RowTerms(runner.layout, q[0], ""))
    plates: dict[str, tuple[int, dict[str, int]]] = {}
    for name in runner.flows:
        depth = len(runner.layout.latents[name].batch_shape)
        for plate, (dim, size) in run.frames[name].items():
            if size >= LEAST_ROWS and depth + dim >= 0 and runner.layout.latents[name].batch_shape[dim] == size:
                plates.setdefault(plate, (size, {}))[1][name] = depth + dim
    for plate, (size, sites) in sorted(plates.items(), key=lambda item: -item[1][0] * len(item[1][1])):
        rows = PlateRows(runner, plate, size, sites)
        with suppress(Exception):  # whatever a model may raise that vmap cannot run, or whose terms have other shapes
            if rows.verify(q):
                return rows
    return None
