"""One model, run for many draws in any of three ways: under a plate, by vmap, or in a loop.

Nothing here asks whether a way is right for the model; `ifpyro.infer.model.verify` does.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.errors import BatchingError
from ...flow.distribution import sharing
from .handlers import Evaluate, FromPrior, FromValues, FromVector
from .layout import Layout

Batching = Literal["plate", "vmap", "loop"]
Totals = tuple[Tensor, Tensor]


class Runner:
    """A model with its arguments and layout.

    Args:
        model: a Pyro model, flow priors already reparameterised.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: its latent sites.

    Attributes:
        flows: latent site to the flow that decodes it, once `find_flows` has looked.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout
    ) -> None:
        self.model, self.args, self.kwargs, self.layout = model, args, kwargs, layout
        self.flows: dict[str, Any] = {}

    def run(self, handler: Any) -> Any:
        """Execute the model under a handler and return the handler."""
        with handler:
            self.model(*self.args, **self.kwargs)
        return handler

    def single(self, row: Tensor, decoded: Mapping[str, Tensor] | None = None, *, score: bool = True) -> Evaluate:
        """All terms of one draw, ``(dim,)``; what flows make of its latents may be known already (`decode`)."""
        known = {name: (self.flows[name], value) for name, value in (decoded or {}).items()}
        return self.listen(FromVector(self.layout, row, score=score, decoded=known))

    def listen(self, handler: Any) -> Any:
        """Execute the model under a handler of one draw that shares what flows decode, and return the handler."""
        with sharing(handler.decodes):
            return self.run(handler)

    def find_flows(self, row: Tensor) -> None:
        """Note which flow decodes which latent site, so that many draws can be decoded in one batch.

        A flow that a run makes for itself, as one that depends on other latents does, is decoded where it stands.
        """
        twice = []
        for _ in range(2):
            run = self.single(row)
            sites = {id(value): name for name, value in run.values.items() if name in self.layout.latents}
            twice.append({sites[id(z)]: flow for z, flow in run.decodes.asked if id(z) in sites})
        self.flows = {name: flow for name, flow in twice[0].items() if twice[1].get(name) is flow}

    def decode(self, q: Tensor) -> dict[str, Tensor]:
        """What the flows make of all draws: latent site to ``(n, *batch_shape, *event)``."""
        found = {}
        for name, flow in self.flows.items():
            site = self.layout.latents[name]
            z = q[:, site.start : site.stop].reshape(len(q), *site.batch_shape, *site.event_shape)
            found[name] = flow.decode(z.to(site.dtype))
        return found

    def terms(self, batching: Batching, q: Tensor) -> Evaluate:
        """All terms of all draws, site by site; ``batching`` is plate or vmap."""
        if batching == "plate":
            return self.run(FromVector(self.layout, q, len(q)))

        def one(row: Tensor, decoded: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            run = self.single(row, decoded)
            return run.log_prior, run.log_likelihood

        result = Evaluate(self.layout, len(q))
        result.log_prior, result.log_likelihood = torch.func.vmap(one)(q, self.decode(q))
        return result

    def totals(self, batching: Batching, q: Tensor) -> Totals:
        """``(log_prior, log_likelihood)``, each ``(n,)``; -inf likelihood where a decomposition fails."""
        if len(q) > 1 and batching == "plate":
            with suppress(torch.linalg.LinAlgError):  # one draw spoils the batch: find out which
                return self.terms("plate", q).totals()
        decoded = self.decode(q) if len(q) > 1 else {}
        if len(q) > 1 and batching != "loop":
            with suppress(torch.linalg.LinAlgError):
                return torch.func.vmap(lambda row, known: self.single(row, known).totals())(q, decoded)
        rows = [self.safe_single(row, known) for row, known in zip(q, _by_row(decoded, len(q)), strict=True)]
        return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])

    def safe_single(self, row: Tensor, decoded: Mapping[str, Tensor] | None = None) -> Totals:
        """Both totals of one draw."""
        try:
            return self.single(row, decoded).totals()
        except torch.linalg.LinAlgError:
            zero = row.sum() * 0
            return zero, zero - torch.inf

    def values(self, batching: Batching, q: Tensor) -> dict[str, Tensor]:
        """Every latent and deterministic site, ``(n, *shape)``."""

        def one(row: Tensor, decoded: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.single(row, decoded, score=False).values

        if batching == "plate" and len(q) > 1:
            run = self.run(FromVector(self.layout, q, len(q), score=False))
            return {name: self._align(name, value, len(q)) for name, value in run.values.items()}
        decoded = self.decode(q)
        if batching == "vmap":
            return torch.func.vmap(one)(q, decoded)
        rows = [one(row, known) for row, known in zip(q, _by_row(decoded, len(q)), strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def draw(self, batching: Batching, n: int, like: Tensor) -> Tensor:
        """Prior draws ``(n, dim)`` from the current random state, on the device of ``like``."""
        if batching == "plate":
            return self.run(FromPrior(self.layout, n)).vector()

        def one(_: Tensor) -> Tensor:
            return self.run(FromPrior(self.layout)).vector()

        blanks = like.new_zeros(n)
        if batching == "vmap":
            return torch.func.vmap(one, randomness="different")(blanks)
        return torch.stack([one(blank) for blank in blanks])

    def invert(self, batching: Batching, values: dict[str, Tensor], n: int) -> Tensor:
        """The ``q``, ``(n, dim)``, of constrained latent values ``(n, *shape)``."""
        if batching == "plate" and n > 1:
            return self.run(FromValues(self.layout, values, n)).vector()
        rows = [{name: value[i] for name, value in values.items()} for i in range(n)]
        return torch.stack([self.run(FromValues(self.layout, row)).vector() for row in rows])

    def _align(self, name: str, value: Tensor, n: int) -> Tensor:
        """A site's value from a run under a plate as ``(n, *shape)``."""
        shape = self.layout.shapes.get(name)
        if shape is None:
            raise BatchingError(f"site {name!r} appears in a batch of draws only", name)
        if value.shape == shape:
            return value.expand(n, *shape)  # does not depend on the draw
        own = value.dim() - len(shape)
        middle = value.shape[1:own]
        if own < 1 or value.shape[0] not in (1, n) or value.shape[own:] != shape or any(s != 1 for s in middle):
            raise BatchingError(
                f"site {name!r} has shape {tuple(value.shape)} for {n} draws; for one draw it has {tuple(shape)}",
                name,
            )
        return value.reshape(value.shape[0], *shape).expand(n, *shape)


def _by_row(values: Mapping[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    return [{name: value[i] for name, value in values.items()} for i in range(n)]


class InChunks(torch.autograd.Function):
    """Evaluate chunk by chunk, gradients included, so that only one chunk's graph is alive at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, totals: Callable[[Tensor], Totals], size: int) -> Any:
        """``totals(q)``, from chunks of ``size`` rows."""
        terms: list[Totals] = []
        gradients: list[Totals] = []
        for chunk in q.detach().split(size):
            if not q.requires_grad:
                terms.append(totals(chunk))
                continue
            with torch.enable_grad():
                chunk = chunk.requires_grad_(True)
                prior, likelihood = totals(chunk)
                gradients.append((gradient(prior.sum(), chunk), gradient(likelihood.sum(), chunk)))
            terms.append((prior.detach(), likelihood.detach()))
        if gradients:
            ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*gradients, strict=True)))
        return tuple(torch.cat(parts) for parts in zip(*terms, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight_prior: Tensor, weight_likelihood: Tensor) -> Any:
        """Rows are independent, so a row's gradient is its weight times what was kept."""
        prior, likelihood = ctx.saved_tensors
        return weight_prior[:, None] * prior + weight_likelihood[:, None] * likelihood, None, None


def gradient(term: Tensor, q: Tensor) -> Tensor:
    """Gradient of a scalar with respect to ``q``; zero where it does not depend on it."""
    if not term.requires_grad:
        return torch.zeros_like(q)
    found = torch.autograd.grad(term, q, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(q) if found is None else found
