"""A Pyro model as a batched density: what every engine samples from.

The latent sites of a model, unconstrained and laid end to end, form one vector ``q``:

    log_prior(q)      = sum over latent sites of  log p(value) + log |d value / d q|
    log_likelihood(q) = sum over observed sites and factors of  scale * log p(obs | values)

Masks and scales on *latent* sites change the likelihood term, so that the prior term remains the density that prior draws
follow; the sum is Pyro's log-density. Three ways to evaluate many draws, in order of speed: under an outermost *plate*, by
*vmap* of the single-draw density, or in a *loop*. `ifpyro.infer.verify` decides which of them are right for a model.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from ifpyro.infer.handlers import BatchingError, Evaluate, FromPrior, FromValues, FromVector, Layout
from ifpyro.infer.probe import collect_probes
from ifpyro.infer.reparam import reparam
from ifpyro.infer.scan import check_arguments, scan, seeded
from ifpyro.infer.verify import branches_on_latents, check_density, check_values, close_totals

Batching = Literal["plate", "vmap", "loop"]
_ORDER: tuple[Batching, ...] = ("plate", "vmap", "loop")


class BatchedModel:
    """A Pyro model seen as ``log p(q, data) = log_prior(q) + log_likelihood(q)`` for many draws at once.

    Implements `ifpyro.infer.density.BatchedDensity`. Flow-prior sites are reparameterised; ``pyro.param`` values are held
    fixed; the global random state, the parameter store and Pyro's handler stack are left as they were.

    Args:
        model: any Pyro model with continuous latent sites.
        args: its positional arguments.
        kwargs: its keyword arguments.
        batching: ``"plate"``, ``"vmap"`` or ``"loop"``; None takes the first that proves right.
        batch_size: at most this many draws are evaluated at once, which bounds memory; None evaluates all.
        seed: of the prior draws on which the batching is verified.
        device: where ``q`` lives; None takes the device of the model's first latent site.

    Raises:
        TypeError: if the model cannot be called with these arguments.
        ValueError: if the model has no latent sites, discrete latents, a random subsample or randomness outside its sites,
            an impossible or NaN likelihood at every probe, or if the batching asked for is wrong for it.

    Attributes:
        dim: length of ``q``.
        gaussian_prior: whether the prior of ``q`` is exactly N(0, I).
        batching: how densities are evaluated: ``"plate"``, ``"vmap"`` or ``"loop"``.
        site_batching: the same for the values of sites.
        prior_batching: the same for prior draws.
        dtype, device: of ``q``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        batching: Batching | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        if batching is not None and batching not in _ORDER:
            raise ValueError(f"batching expects 'plate', 'vmap', 'loop' or None, got {batching!r}")
        if batch_size is not None and (
            isinstance(batch_size, bool) or batch_size != int(batch_size) or batch_size < 1
        ):
            raise ValueError(f"batch_size expects a positive integer or None, got {batch_size!r}")
        kwargs = dict(kwargs or {})
        check_arguments(model, args, kwargs)
        self._model, self._args, self._kwargs = reparam(model), tuple(args), kwargs
        self._batch_size, self._asked = batch_size, batching
        self._frozen: list[Tensor] = []
        self._notes: list[str] = []
        with seeded(seed, torch.device(device or "cpu")):
            found = scan(self._model, self._args, self._kwargs)
        self._layout: Layout = found.layout
        self.dim: int = self._layout.dim
        self.device = torch.device(device) if device is not None else found.device or torch.device("cpu")
        with seeded(seed, self.device), pyro.validation_enabled(False):
            probes = collect_probes(self._model, self._args, self._kwargs, self._layout)
            self._probes = probes
            self.gaussian_prior: bool = probes.gaussian_prior
            self.dtype = probes.q.dtype
            self._layout.unmasked |= probes.unmasked
            self._frozen = probes.parameters
            self._branches = branches_on_latents(self._single, probes.q[:2])
            self.batching: Batching = self._choose("density", _ORDER)
            self.site_batching: Batching = self._choose("values", _ORDER)
            self.prior_batching: Batching = self._choose("prior", _ORDER)
        self._trusted: set[int] = {1}

    # -- the density ---------------------------------------------------------------------------------------------------

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``(log_prior, log_likelihood)``, each ``(n,)``, for ``q`` of shape ``(n, dim)``; differentiable in ``q``.

        A draw at which a matrix decomposition in the model fails has log-likelihood ``-inf``.

        Raises:
            ValueError: if ``q`` has another shape.
        """
        n = self._check(q)
        with self._quiet():
            if n not in self._trusted:
                self._distrust(q, n)
            if self._batch_size is not None and n > self._batch_size:
                return _InChunks.apply(q, self._totals, self._batch_size)  # type: ignore[no-untyped-call,no-any-return]
            return self._totals(q)

    def _totals(self, q: Tensor) -> tuple[Tensor, Tensor]:
        try:
            if len(q) > 1 and self.batching != "loop":
                return (
                    self._density(self.batching, q).totals()
                    if self.batching == "plate"
                    else self._vmap_totals(q)
                )
        except torch.linalg.LinAlgError:
            pass  # one draw spoils the batch: find out which
        rows = [self._safe_single(row) for row in q]
        return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])

    def _safe_single(self, row: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._single(row).totals()
        except torch.linalg.LinAlgError:
            zero = row.sum() * 0
            return zero, zero - torch.inf

    def _vmap_totals(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.vmap(lambda row: self._single(row).totals())(q)  # type: ignore[no-any-return]

    def _single(self, row: Tensor) -> Evaluate:
        return FromVector(self._layout, row).run(self._model, self._args, self._kwargs)

    def _density(self, batching: Batching, q: Tensor) -> Evaluate:
        """All terms of all draws, site by site."""
        if batching == "plate":
            return FromVector(self._layout, q, len(q)).run(self._model, self._args, self._kwargs)

        def terms(row: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[Tensor, Tensor]]:
            run = self._single(row)
            return run.log_prior, run.log_likelihood, run.totals()

        run = Evaluate(self._layout, len(q))
        run.log_prior, run.log_likelihood, _ = torch.func.vmap(terms)(q)
        return run

    def _distrust(self, q: Tensor, n: int) -> None:
        """Check a batch size met for the first time against single draws: sizes may coincide with the model's own."""
        self._trusted.add(n)
        if self.batching != "plate":
            return
        rows = sorted({0, n // 2, n - 1})
        with torch.no_grad():
            try:
                batched = self._totals(q.detach())
                singles = [self._safe_single(q[row].detach()) for row in rows]
            except BatchingError:
                right = False
            else:
                right = all(
                    close_totals(batched, row, single) for row, single in zip(rows, singles, strict=True)
                )
        if not right:
            self._note(f"the plate of draws goes wrong for {n} draws; evaluating differently")
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self.batching = self._choose("density", _ORDER[1:])

    # -- draws and sites -----------------------------------------------------------------------------------------------

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws from the prior of ``q``, shape ``(num, dim)``; all randomness comes from ``generator``."""
        if isinstance(num, bool) or num != int(num) or num < 1:
            raise ValueError(f"sample_prior expects a positive number of draws, got {num!r}")
        if self.gaussian_prior:
            z = torch.randn(num, self.dim, generator=generator, device=generator.device, dtype=self.dtype)
            return z.to(self.device)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with seeded(seed, self.device), self._quiet(), torch.no_grad():
            size = self._batch_size or num
            return torch.cat(
                [self._draw(self.prior_batching, min(size, num - i)) for i in range(0, num, size)]
            )

    def _draw(self, batching: Batching, n: int) -> Tensor:
        def one(_: Tensor) -> Tensor:
            run = FromPrior(self._layout)
            run.run(self._model, self._args, self._kwargs)
            return run.vector()

        if batching == "plate":
            run = FromPrior(self._layout, n)
            run.run(self._model, self._args, self._kwargs)
            return run.vector()
        blanks = torch.zeros(n, device=self.device)
        if batching == "vmap":
            return torch.func.vmap(one, randomness="different")(blanks)  # type: ignore[no-any-return]
        return torch.stack([one(blank) for blank in blanks])

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """Every latent and deterministic site in the user's space: name to ``(n, *shape)``, without gradients."""
        n = self._check(q)
        with self._quiet(), torch.no_grad():
            size = self._batch_size or n
            parts = [self._values(self.site_batching, chunk) for chunk in q.detach().split(size)]
        return {name: torch.cat([part[name] for part in parts]) for name in self._layout.shapes}

    def _values(self, batching: Batching, q: Tensor) -> dict[str, Tensor]:
        def one(row: Tensor) -> dict[str, Tensor]:
            run = FromVector(self._layout, row, score=False)
            return run.run(self._model, self._args, self._kwargs).values

        if batching == "plate" and len(q) > 1:
            run = FromVector(self._layout, q, len(q), score=False).run(self._model, self._args, self._kwargs)
            return {name: _align(value, self._layout, name, len(q)) for name, value in run.values.items()}
        if batching == "vmap":
            return torch.func.vmap(one)(q)  # type: ignore[no-any-return]
        rows = [one(row) for row in q]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """The ``q`` of given latent values, the inverse of `sites`.

        Args:
            values: every latent site, constrained, ``(n, *shape)``. A flow-prior site ``x`` may be given instead of its
                latent ``x_base``; it is encoded by the flow.

        Returns:
            ``q`` of shape ``(n, dim)``.

        Raises:
            ValueError: on missing or unknown sites, wrong shapes, or values outside a site's support.
        """
        latents, shapes = self._layout.latents, self._layout.shapes
        needed = {name if name in values else name.removesuffix("_base") for name in latents}
        needed = {name if name in shapes else f"{name}_base" for name in needed}
        if needed - set(values) or set(values) - set(shapes):
            raise ValueError(
                f"expected values for the latent sites {sorted(latents)}, got {sorted(values)} "
                f"(missing {sorted(needed - set(values))}, unknown {sorted(set(values) - set(shapes))})"
            )
        values = {name: torch.as_tensor(value, device=self.device) for name, value in values.items()}
        n = len(next(iter(values.values()))) if next(iter(values.values())).dim() else 0
        for name, value in values.items():
            if value.shape != (n, *shapes[name]) or n < 1:
                raise ValueError(
                    f"initial values of {name!r}: expected shape (n, {', '.join(map(str, shapes[name]))}) with the same n "
                    f"for every site, got {tuple(value.shape)}"
                )

        def invert(given: dict[str, Tensor], rows: int | None) -> Tensor:
            run = FromValues(self._layout, given, rows)
            run.run(self._model, self._args, self._kwargs)
            return run.vector()

        with self._quiet(), torch.no_grad():
            if self.site_batching == "plate" and n > 1:
                q = invert(values, n)
            else:
                q = torch.stack([invert({k: v[i] for k, v in values.items()}, None) for i in range(n)])
        for name, site in latents.items():
            if not bool(torch.isfinite(q[:, site.start : site.stop]).all()):
                raise ValueError(f"initial values of {name!r} lie outside the site's support, or on its edge")
        return q

    # -- the choice ----------------------------------------------------------------------------------------------------

    def _choose(self, what: Literal["density", "values", "prior"], order: tuple[Batching, ...]) -> Batching:
        """The first way of batching that gives what single draws give."""
        for batching in order:
            if self._asked not in (None, batching) and (what == "density" or batching == "plate"):
                continue
            if batching == "loop":
                return batching
            reason = self._objection(what, batching)
            if reason is None:
                return batching
            if self._asked == batching and what == "density":
                raise ValueError(
                    f"batching={batching!r} is wrong for this model: {reason}. Leave batching=None."
                )
            subject = {"density": "log-density", "values": "site values", "prior": "prior draws"}[what]
            if what != "prior" and (what == "density" or batching == self.batching):  # say it once
                self._note(f"cannot batch the {subject} by {batching}: {reason}")
        raise ValueError(f"batching={self._asked!r} is wrong for this model")

    def _objection(self, what: str, batching: Batching) -> str | None:
        """Why a way of batching is wrong for this model, or None."""
        if self._branches:
            return "the model branches on latent values (if, while, .item() or bool() of a tensor)"
        try:
            for part in self._probes.groups():
                if what == "density":
                    check_density(lambda q: self._density(batching, q), part.singles, part.q, part.gradients)
                elif what == "values":
                    with torch.no_grad():
                        check_values(self._values(batching, part.q), part.singles)
                else:
                    self._check_prior_draws(batching, len(part.q))
        except BatchingError as error:
            return str(error)
        except Exception as error:  # whatever a model may raise when it meets a batch it was not written for
            return (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
        return None

    def _check_prior_draws(self, batching: Batching, n: int) -> None:
        if batching == "plate" and self.batching != "plate":
            raise BatchingError("the log-density is not batched by a plate")
        q = self._draw(batching, n)
        if q.shape != (n, self.dim):
            raise BatchingError("prior draws have the wrong shape")
        for name, site in self._layout.latents.items():
            part = q[:, site.start : site.stop]
            if len(torch.unique(part, dim=0)) < n and part.shape[1] > 0:
                raise BatchingError(f"prior draws of site {name!r} repeat", name)

    def describe(self) -> str:
        """How the model is evaluated and why, for reading."""
        lines = [
            f"{self.dim} unconstrained dimensions in {len(self._layout.latents)} latent sites, {self.dtype}, {self.device}",
            f"log-density: {self.batching}; site values: {self.site_batching}; prior draws: "
            + ("N(0, I)" if self.gaussian_prior else self.prior_batching),
        ]
        for name, site in self._layout.latents.items():
            lines.append(f"  {name}: {tuple(self._layout.shapes[name])} from q[{site.start}:{site.stop}]")
        for name in sorted(self._layout.unmasked):
            lines.append(f"  {name}: its masked-out entries matter to no other site and keep their prior")
        return "\n".join(lines + [f"note: {note}" for note in self._notes])

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            warnings.warn(f"ifpyro: {text}", UserWarning, stacklevel=5)

    def _check(self, q: Tensor) -> int:
        if q.dim() != 2 or q.shape[1] != self.dim or len(q) == 0:
            raise ValueError(f"expected q of shape (n, {self.dim}) with n >= 1, got {tuple(q.shape)}")
        return len(q)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without Pyro's validation and without gradients to the parameters of networks inside the model."""
        frozen = [p for p in self._frozen if p.requires_grad]
        with pyro.validation_enabled(False):
            try:
                for parameter in frozen:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(True)


class _InChunks(torch.autograd.Function):
    """Evaluate chunk by chunk, gradients included, so that only one chunk's graph is alive at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, totals: Callable[[Tensor], tuple[Tensor, Tensor]], size: int) -> Any:
        terms, gradients = [], []
        for chunk in q.detach().split(size):
            if not q.requires_grad:
                terms.append(totals(chunk))
                continue
            with torch.enable_grad():
                chunk = chunk.requires_grad_(True)
                pair = totals(chunk)
                gradients.append([_gradient(term, chunk) for term in pair])
            terms.append((pair[0].detach(), pair[1].detach()))
        if gradients:
            ctx.save_for_backward(*(torch.cat(parts) for parts in zip(*gradients, strict=True)))
        return tuple(torch.cat(parts) for parts in zip(*terms, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight_prior: Tensor, weight_likelihood: Tensor) -> Any:
        prior, likelihood = ctx.saved_tensors
        return weight_prior[:, None] * prior + weight_likelihood[:, None] * likelihood, None, None


def _gradient(term: Tensor, q: Tensor) -> Tensor:
    if not term.requires_grad:
        return torch.zeros_like(q)
    gradient = torch.autograd.grad(term.sum(), q, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(q) if gradient is None else gradient


def _align(value: Tensor, layout: Layout, name: str, n: int) -> Tensor:
    """A site's value from a batched run as ``(n, *shape)``."""
    shape = layout.shapes[name]
    if value.shape == shape:
        return value.expand(n, *shape)  # does not depend on the draw
    middle = value.shape[1 : value.dim() - len(shape)]
    if value.dim() <= len(shape) or value.shape[0] not in (1, n) or any(size != 1 for size in middle):
        raise BatchingError(
            f"site {name!r} has shape {tuple(value.shape)} for {n} draws of {tuple(shape)}", name
        )
    return value.reshape(value.shape[0], *shape).expand(n, *shape)
