"""Probe points: prior draws at which a model's single-draw density is known, and what they tell about the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ifpyro.infer.handlers import BatchingError, Evaluate, FromPrior, FromVector, Layout
from ifpyro.infer.scan import GaussianPrior, Model, check_reproducible, irrelevant_masked_sites
from ifpyro.infer.verify import probe_sizes, sizes_in

_MAX_DRAWS = 256


@dataclass
class Probes:
    """Single-draw results at several prior draws, all with finite density.

    Attributes:
        q: ``(n, dim)``.
        singles: one evaluation per row of ``q``.
        gradients: of log-prior and log-likelihood, each ``(n, dim)``.
        sizes: the two batch sizes to verify with; they add up to ``n``.
    """

    q: Tensor
    singles: list[Evaluate]
    gradients: tuple[Tensor, Tensor]
    sizes: tuple[int, int]
    gaussian_prior: bool
    unmasked: set[str]
    parameters: list[Tensor]

    def groups(self) -> Iterator["Probes"]:
        """The probes split into the two batches."""
        start = 0
        for size in self.sizes:
            part = slice(start, start + size)
            prior, likelihood = self.gradients
            yield Probes(
                self.q[part],
                self.singles[part],
                (prior[part], likelihood[part]),
                self.sizes,
                self.gaussian_prior,
                self.unmasked,
                self.parameters,
            )
            start += size


def collect_probes(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout) -> Probes:
    """Draw probe points and raise if the model cannot be sampled from at any of them."""
    own_sizes = sizes_in(args, kwargs, list(layout.shapes.values()), [layout.dim])
    first = _prior_draw(model, args, kwargs, layout)
    own_sizes |= sizes_in({k: v.shape for k, v in first.values.items()})
    sizes = probe_sizes(own_sizes)
    device = first.vector().device
    check_reproducible(model, args, kwargs, layout, first.vector(), device)
    points = _finite_points(model, args, kwargs, layout, first, sum(sizes))
    unmasked = irrelevant_masked_sites(model, args, kwargs, layout, points)
    layout.unmasked |= unmasked

    singles: list[Evaluate] = []
    rows: list[tuple[Tensor, Tensor]] = []
    parameters: dict[int, Tensor] = {}
    for point in points:
        q = point.detach().requires_grad_(True)
        with torch.enable_grad():
            run = FromVector(layout, q).run(model, args, kwargs)
            terms = run.totals()
        for leaf in _leaves(terms, q):
            parameters[id(leaf)] = leaf
        rows.append((_gradient(terms[0], q), _gradient(terms[1], q)))
        for store in (run.log_prior, run.log_likelihood, run.values):
            store.update({name: value.detach() for name, value in store.items()})
        singles.append(run)
    gradients = (torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows]))
    _require_finite_gradients(gradients, layout)

    q = points[0].detach().requires_grad_(True)
    with torch.enable_grad():
        prior = GaussianPrior(layout, q)
        prior.run(model, args, kwargs)
    return Probes(
        points, singles, gradients, sizes, all(prior.standard.values()), unmasked, list(parameters.values())
    )


def _prior_draw(model: Model, args: Any, kwargs: Any, layout: Layout) -> FromPrior:
    run = FromPrior(layout, score=True)
    try:
        with torch.no_grad():
            run.run(model, args, kwargs)
            run.totals()
    except BatchingError as error:
        raise ValueError(
            f"the sites of the model change from run to run: {error}. Every run must visit the same latent sites."
        ) from None
    for name, value in run.values.items():
        if name not in layout.shapes or value.shape != layout.shapes[name]:
            raise ValueError(
                f"the sites of the model change from run to run: {name!r} had shape {tuple(layout.shapes.get(name, ()))}, "
                f"now {tuple(value.shape)}"
            )
    return run


def _finite_points(
    model: Model, args: Any, kwargs: Any, layout: Layout, first: FromPrior, num: int
) -> Tensor:
    """The ``num`` most plausible of some prior draws, in ``q``."""
    drawn: list[tuple[float, Tensor]] = []
    troubles: dict[str, dict[str, int]] = {"nan": {}, "-inf": {}}
    run, tries = first, 0
    while True:
        tries += 1
        q = run.vector()
        prior, likelihood = run.totals()
        if bool(torch.isfinite(q).all()) and bool(torch.isfinite(prior)) and bool(torch.isfinite(likelihood)):
            drawn.append((float(likelihood), q))
        for name, value in (*run.log_prior.items(), *run.log_likelihood.items()):
            kind = "nan" if bool(torch.isnan(value)) else "-inf" if bool(value == -torch.inf) else None
            if kind is not None:
                troubles[kind][name] = troubles[kind].get(name, 0) + 1
        if len(drawn) >= 2 * num or (drawn and tries >= 4 * num) or tries >= _MAX_DRAWS:
            break
        run = _prior_draw(model, args, kwargs, layout)
    if not drawn:
        _explain(troubles, tries)
    drawn.sort(key=lambda pair: -pair[0])
    points = [q for _, q in drawn[:num]]
    scale = 0.1
    while len(points) < num:  # few draws are possible at all: look close to those that are
        q = points[0] + scale * torch.randn_like(points[0])
        with torch.no_grad():
            run_near = FromVector(layout, q).run(model, args, kwargs)
        if all(bool(torch.isfinite(term)) for term in run_near.totals()):
            points.append(q)
        scale *= 0.7
        if scale < 1e-6:
            points += [points[0] + scale * (i + 1) for i in range(num - len(points))]
    return torch.stack(points)


def _explain(troubles: dict[str, dict[str, int]], tries: int) -> None:
    for kind, meaning in (("nan", "NaN"), ("-inf", "-inf: the observation is impossible")):
        always = [name for name, count in troubles[kind].items() if count == tries]
        some = always or list(troubles[kind])
        if some:
            raise ValueError(
                f"the log-probability of site {some[0]!r} is {meaning} at all of {tries} draws from the prior. "
                "Check the data for NaN and for values outside the likelihood's support, and the likelihood's parameters."
            )
    raise ValueError(f"the log-density is not finite at any of {tries} draws from the prior")


def _require_finite_gradients(gradients: tuple[Tensor, Tensor], layout: Layout) -> None:
    total = gradients[0] + gradients[1]
    for name, site in layout.latents.items():
        bad = ~torch.isfinite(total[:, site.start : site.stop])
        if bool(bad.any(-1).all()):
            raise ValueError(
                f"the gradient with respect to site {name!r} is not finite at any probe although the density is. Masking a "
                "NaN does not remove it from the gradient: replace missing observations by any valid number before masking."
            )


def _leaves(terms: tuple[Tensor, ...], q: Tensor) -> list[Tensor]:
    """Every leaf tensor other than ``q`` that the terms would send gradients to (network parameters)."""
    found, seen = [], set()
    stack = [term.grad_fn for term in terms if term.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not q:
            found.append(leaf)
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    return found


def _gradient(term: Tensor, q: Tensor) -> Tensor:
    if not term.requires_grad:
        return torch.zeros_like(q)
    gradient = torch.autograd.grad(term, q, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(q) if gradient is None else gradient
