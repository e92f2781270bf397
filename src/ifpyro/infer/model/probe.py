"""Probe points: prior draws at which the single-draw density is known, and what they tell about the model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...core.errors import BatchingError, ModelError
from .examine import check_reproducible, has_gaussian_prior, irrelevant_masked_sites
from .handlers import Evaluate, FromPrior
from .layout import Layout
from .runner import Runner, gradient

_MAX_DRAWS = 256


@dataclass
class Probes:
    """Single-draw results at several prior draws, all with finite density.

    Attributes:
        q: ``(n, dim)``.
        singles: one evaluation per row of ``q``.
        gradients: of log-prior and log-likelihood, each ``(n, dim)``.
        sizes: the two batch sizes to verify with; they add up to ``n``.
        gaussian_prior: whether the prior of ``q`` is N(0, I).
    """

    q: Tensor
    singles: list[Evaluate]
    gradients: tuple[Tensor, Tensor]
    sizes: tuple[int, int]
    gaussian_prior: bool

    def groups(self) -> Iterator["Probes"]:
        """The probes split into the two batches."""
        prior, likelihood = self.gradients
        for part in (slice(0, self.sizes[0]), slice(self.sizes[0], sum(self.sizes))):
            gradients = (prior[part], likelihood[part])
            yield replace(self, q=self.q[part], singles=self.singles[part], gradients=gradients)


def collect_probes(runner: Runner) -> Probes:
    """Draw probe points; raise if the model cannot be sampled from at any of them.

    Draws come from the current random state. Latent sites whose masks turn out to matter to nothing are noted
    in the layout.
    """
    layout = runner.layout
    first = _prior_draw(runner)
    sizes = _probe_sizes(_sizes_in(runner.args, runner.kwargs, list(layout.shapes.values()), layout.dim, first.values))
    check_reproducible(runner, first.vector())
    points = _finite_points(runner, first, sum(sizes))
    layout.unmasked |= irrelevant_masked_sites(runner, points)

    singles: list[Evaluate] = []
    gradients: list[tuple[Tensor, Tensor]] = []
    for point in points:
        q = point.detach().requires_grad_(True)
        with torch.enable_grad():
            run = runner.single(q)
            terms = run.totals()
        gradients.append((gradient(terms[0], q), gradient(terms[1], q)))
        for store in (run.log_prior, run.log_likelihood, run.values):
            store.update({name: value.detach() for name, value in store.items()})
        singles.append(run)
    prior, likelihood = (torch.stack(list(column)) for column in zip(*gradients, strict=True))
    _require_finite_gradients(prior + likelihood, layout)
    gaussian = has_gaussian_prior(runner, points[0])
    return Probes(points, singles, (prior, likelihood), sizes, gaussian)


def _prior_draw(runner: Runner) -> FromPrior:
    shapes = runner.layout.shapes
    try:
        with torch.no_grad():
            run: FromPrior = runner.run(FromPrior(runner.layout, score=True))
            run.totals()
    except BatchingError as error:
        raise ModelError(
            f"the sites of the model change from run to run: {error}. Every run must visit the same latent sites."
        ) from None
    for name, value in run.values.items():
        if name not in shapes or value.shape != shapes[name]:
            before = tuple(shapes[name]) if name in shapes else "absent"
            raise ModelError(
                f"the sites of the model change from run to run: {name!r} was {before}, now {tuple(value.shape)}"
            )
    return run


def _finite_points(runner: Runner, first: FromPrior, num: int) -> Tensor:
    """The ``num`` most plausible of some prior draws, in ``q``."""
    drawn: list[tuple[float, Tensor]] = []
    always: dict[str, set[str]] = {"nan": set(first.log_terms()), "-inf": set(first.log_terms())}
    run, tries = first, 0
    while True:
        tries += 1
        q = run.vector()
        likelihood = _finite_likelihood(q, run)
        if likelihood is not None:
            drawn.append((likelihood, q))
        terms = run.log_terms()
        always["nan"] &= {name for name, value in terms.items() if bool(torch.isnan(value))}
        always["-inf"] &= {name for name, value in terms.items() if bool(value == -torch.inf)}
        if len(drawn) >= 2 * num or (drawn and tries >= 4 * num) or tries >= _MAX_DRAWS:
            break
        run = _prior_draw(runner)
    if not drawn:
        _explain(always, tries)
    drawn.sort(key=lambda pair: -pair[0])
    points = [q for _, q in drawn[:num]]
    scale = 0.1
    while len(points) < num:  # few draws are possible at all: look close to one that is
        q = points[0] + scale * torch.randn_like(points[0])
        with torch.no_grad():
            possible = _finite_likelihood(q, runner.single(q)) is not None
        if possible:
            points.append(q)
        scale = max(0.8 * scale, 1e-3)
        tries += 1
        if tries > 2 * _MAX_DRAWS:
            raise ModelError(
                "the log-density is finite at isolated points only; check the likelihood's support and its parameters"
            )
    return torch.stack(points)


def _finite_likelihood(q: Tensor, run: Evaluate) -> float | None:
    prior, likelihood = run.totals()
    finite = torch.isfinite(q).all() & torch.isfinite(prior) & torch.isfinite(likelihood)
    return float(likelihood) if bool(finite) else None


def _explain(always: dict[str, set[str]], tries: int) -> NoReturn:
    where = f"at every one of {tries} draws from the prior"
    if always["nan"]:
        raise ModelError(
            f"the log-probability of site {min(always['nan'])!r} is NaN {where}: check the likelihood for "
            "0/0, logarithms of negative numbers and invalid parameters, and the data for NaN"
        )
    if always["-inf"]:
        raise ModelError(
            f"the observation is impossible: the log-probability of site {min(always['-inf'])!r} is -inf "
            f"{where}. Check that the data lie in the support of the likelihood, or widen the likelihood."
        )
    raise ModelError(f"the log-density is not finite {where}")


def _require_finite_gradients(total: Tensor, layout: Layout) -> None:
    for name, site in layout.latents.items():
        if bool((~torch.isfinite(total[:, site.start : site.stop])).any(-1).all()):
            raise ModelError(
                f"the gradient with respect to site {name!r} is not finite at any of {len(total)} probes "
                "although the density is. A torch.where or mask does not keep a NaN or infinity out of the "
                "gradient: replace such values before they enter the density."
            )


def _probe_sizes(taken: set[int]) -> tuple[int, int]:
    """Two batch sizes that occur nowhere in the model."""
    free = (n for n in range(3, len(taken) + 10) if n not in taken)
    return next(free), next(free)


def _sizes_in(*things: Any) -> set[int]:
    """Every dimension of every tensor (and shape) found in nested containers."""
    found: set[int] = set()
    for thing in things:
        if isinstance(thing, torch.Size):
            found |= set(thing) | {thing.numel()}
        elif hasattr(thing, "shape"):
            found |= _sizes_in(torch.Size(thing.shape))
        elif isinstance(thing, dict):
            found |= _sizes_in(*thing.values())
        elif isinstance(thing, Iterable) and not isinstance(thing, str | bytes):
            found |= _sizes_in(*thing) if isinstance(thing, list | tuple | set) else set()
        elif isinstance(thing, int):
            found.add(thing)
    return found
