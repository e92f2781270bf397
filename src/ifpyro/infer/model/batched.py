"""A Pyro model as a batched density: what every engine samples from.

The latent sites of a model, unconstrained and laid end to end, form one vector ``q``:

    log_prior(q)      = sum over latent sites of  log p(value) + log |d value / d q|
    log_likelihood(q) = sum over observed sites and factors of  scale * log p(obs | values)

Masks and scales on *latent* sites change the likelihood term, so that the prior term remains the density that
prior draws follow; the sum is Pyro's log-density. Three ways to evaluate many draws, in order of speed: under
an outermost *plate*, by *vmap* of the single-draw density, or in a *loop*. Each is verified before it is
used.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from ...core.arguments import check_batch_size
from ...core.errors import BatchingError, ModelError
from ...core.messages import warn
from ...core.precision import full_precision
from ...core.randomness import alone, seeded
from ...flow.flow import InflationaryFlow
from .density import BatchedDensity
from .enumeration import sum_out
from .examine import Enumerated, Model, Scan, check_arguments, is_about_dtypes, scan
from .layout import Layout
from .probe import collect_probes
from .reparam import reparam
from .rows import find_rows
from .runner import Batching, InChunks, Runner, Totals
from .verify import Verifier, same_rows

_ORDER: tuple[Batching, ...] = ("plate", "vmap", "loop")
_What = Literal["density", "values", "prior"]
_SUBJECTS: dict[_What, str] = {"density": "log-density", "values": "site values", "prior": "prior draws"}


class BatchedModel:
    """A Pyro model seen as ``log p(q, data) = log_prior(q) + log_likelihood(q)`` for many draws at once.

    Implements `ifpyro.infer.model.density.BatchedDensity`. Flow-prior sites are reparameterised; ``pyro.param``
    values are held fixed; the global random state, the parameter store and Pyro's handler stack are left as
    they were.

    Args:
        model: any Pyro model with continuous latent sites, and discrete ones that are marked for enumeration: these
            are summed out (`ifpyro.infer.model.enumeration`).
        args: its positional arguments.
        kwargs: its keyword arguments.
        batching: ``"plate"``, ``"vmap"`` or ``"loop"``; None takes the first that proves right.
        batch_size: at most this many draws are evaluated at once, which bounds memory; None evaluates all.
        seed: of the prior draws on which the batching is verified.
        device: where ``q`` lives; None takes the device of the model's first latent site.

    Raises:
        TypeError: if the model cannot be called with these arguments.
        ValueError: if the model has no latent sites, discrete latents, a random subsample, randomness outside
            its sites, invalid parameters at prior draws, an impossible or NaN likelihood at every probe, or if
            the batching asked for is wrong for it.

    Attributes:
        dim: length of ``q``.
        gaussian_prior: whether the prior of ``q`` is exactly N(0, I).
        batching: how log-densities are batched: ``"plate"``, ``"vmap"`` or ``"loop"``.
        site_batching: the same for the values of sites.
        prior_batching: the same for prior draws.
        dtype, device: of ``q``.
        rows: a plate of flows whose rows are independent given the rest (`ifpyro.infer.model.rows`), or None.
        prepare: how this model, with these or other data, is changed before it is run: flow priors reparameterised,
            enumerated latents summed out.
    """

    @alone()
    @full_precision()
    def __init__(
        self,
        model: Model,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        batching: Batching | str | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        if batching is not None and batching not in _ORDER:
            raise ValueError(f"batching expects 'plate', 'vmap', 'loop' or None, got {batching!r}")
        batch_size = check_batch_size(batch_size)
        args, kwargs = tuple(args), dict(kwargs or {})
        check_arguments(model, args, kwargs)
        self._asked, self._batch_size = batching, batch_size
        self._notes: list[str] = []
        self.prepare: Callable[[Model], Model] = reparam
        try:
            found, invalid = _scan(reparam(model), args, kwargs, seed)
        except Enumerated:
            with seeded(seed), pyro.validation_enabled(False):
                summed = sum_out(reparam(model), args, kwargs)
            self.prepare = lambda other: summed(reparam(other))
            found, invalid = _scan(self.prepare(model), args, kwargs, seed)
        model = self.prepare(model)
        self._layout = found.layout
        self.dim: int = self._layout.dim
        self.device = torch.device(device) if device is not None else found.device
        self.dtype = self._layout.dtype
        self._runner = Runner(model, args, kwargs, self._layout)
        with seeded(seed), pyro.validation_enabled(False):
            probes = collect_probes(self._runner)
            with torch.no_grad():
                self._runner.find_flows(probes.q[0])
            if invalid is not None:
                raise ModelError(
                    f"at some prior draws the model is invalid: {invalid}\nKeep parameters where they belong (exp, "
                    "softplus, clamp), or count such draws as impossible: pyro.enable_validation(False)"
                ) from invalid
            self.gaussian_prior: bool = probes.gaussian_prior
            self.rows = find_rows(self._runner, probes.q)
            self._verifier = Verifier(self._runner, probes)
            self._trusted: dict[_What, set[int]] = {what: {1, *probes.sizes} for what in _SUBJECTS}
            self._ways: dict[_What, Batching] = {}
            for what in _SUBJECTS:
                self._ways[what] = self._choose(what, _ORDER)

    @property
    def batching(self) -> Batching:
        """How log-densities of many draws are evaluated."""
        return self._ways["density"]

    @property
    def site_batching(self) -> Batching:
        """How the sites of many draws are computed."""
        return self._ways["values"]

    @property
    def prior_batching(self) -> Batching:
        """How many prior draws are made (unless the prior is N(0, I), which needs no model)."""
        return self._ways["prior"]

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latent sites, in the order in which they lie in ``q``."""
        return tuple(self._layout.latents)

    @property
    def layout(self) -> Layout:
        """Where its latent sites lie in ``q``."""
        return self._layout

    @property
    def runner(self) -> Runner:
        """The model in the form in which it is evaluated."""
        return self._runner

    @property
    def probe_sizes(self) -> tuple[int, int]:
        """Two batch sizes that occur nowhere in the model."""
        return self._verifier.probes.sizes

    # -- what engines use -------------------------------------------------------------------------------

    @alone()
    @full_precision()
    def __call__(self, q: Tensor) -> Totals:
        """Differentiable ``(log_prior, log_likelihood)``, each ``(n,)``, for ``q`` of shape ``(n, dim)``.

        A draw at which a matrix decomposition in the model fails has log-likelihood ``-inf``.

        Raises:
            ValueError: if ``q`` has another shape.
        """
        n = self._check(q)
        with pyro.validation_enabled(False):
            if self._batch_size is not None and n > self._batch_size:
                totals: Totals = InChunks.apply(q, self._totals, self._batch_size)
                return totals
            return self._totals(q)

    @alone()
    @full_precision()
    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws from the prior of ``q``, shape ``(num, dim)``, from ``generator`` alone."""
        if isinstance(num, bool) or num != int(num) or num < 1:
            raise ValueError(f"sample_prior expects a positive number of draws, got {num!r}")
        if self.gaussian_prior:
            z = torch.randn(num, self.dim, generator=generator, device=generator.device, dtype=self.dtype)
            return z.to(self.device)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        like = torch.empty(0, device=self.device)
        size = min(self._batch_size or num, num)
        counts = [min(size, num - start) for start in range(0, num, size)]
        with pyro.validation_enabled(False), torch.no_grad():
            with seeded(0):  # apart from the draws, which depend on the generator alone
                self._verify_size("prior", size, like)
            with seeded(seed):
                return torch.cat([self._runner.draw(self.prior_batching, n, like) for n in counts])

    @alone()
    @full_precision()
    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """Every latent and deterministic site in the user's space, name to ``(n, *shape)``, detached."""
        n = self._check(q)
        with pyro.validation_enabled(False), torch.no_grad():
            parts = [self._values(chunk) for chunk in q.detach().split(self._batch_size or n)]
        return {name: torch.cat([part[name] for part in parts]) for name in self._layout.shapes}

    @alone()
    def unconstrain(self, values: Mapping[str, Any]) -> Tensor:
        """The ``q`` of given latent values, the inverse of `sites`.

        Args:
            values: every latent site, constrained, ``(n, *shape)``. A flow-prior site ``x`` may be given
                instead of its latent ``x_base``; the flow encodes it.

        Returns:
            ``q`` of shape ``(n, dim)``.

        Raises:
            ValueError: on missing or unknown sites, wrong shapes, or values outside a site's support.
        """
        given = {name: torch.as_tensor(value, device=self.device) for name, value in values.items()}
        n = self._check_values(given)
        with pyro.validation_enabled(False), torch.no_grad():
            q: Tensor = self._runner.invert(self.site_batching, given, n)
        back = self.sites(q)
        for name, value in given.items():
            # Many transforms clamp what lies outside, so that only the way back shows it.
            far = (back[name] - value).abs() > 1e-2 * value.abs() + 1e-3
            if not bool(torch.isfinite(back[name]).all()) or bool(far.any()):
                raise ValueError(f"initial values of {name!r} lie outside the site's support, or on its edge")
        if not bool(torch.isfinite(q).all()):
            raise ValueError("some initial values lie on the edge of their site's support")
        return q

    def describe(self) -> str:
        """How the model is evaluated and why, for reading."""
        layout = self._layout
        prior = "N(0, I), drawn directly" if self.gaussian_prior else self.prior_batching
        lines = [
            f"{self.dim} unconstrained dimensions in {len(layout.latents)} latent sites, {self.dtype}, {self.device}",
            f"log-density: {self.batching}; site values: {self.site_batching}; prior draws: {prior}",
        ]
        for name, site in layout.latents.items():
            note = "; masked-out entries matter to nothing else and keep their prior" * (name in layout.unmasked)
            lines.append(f"  {name}: {tuple(layout.shapes[name])}, q[{site.start}:{site.stop}]{note}")
        return "\n".join(lines + [f"note: {note}" for note in self._notes])

    # -- how they are computed --------------------------------------------------------------------------

    def _totals(self, q: Tensor) -> Totals:
        self._verify_size("density", len(q), q)
        return self._runner.totals(self.batching, q)

    def _values(self, q: Tensor) -> dict[str, Tensor]:
        self._verify_size("values", len(q), q)
        return self._runner.values(self.site_batching, q)

    def _choose(self, what: _What, order: tuple[Batching, ...]) -> Batching:
        """The first way of batching that gives what single draws give."""
        asked = self._asked if what == "density" else None
        for batching in order:
            if asked not in (None, batching):
                continue
            if batching == "loop":
                return batching
            reason = self._verifier.objection(what, batching)
            if what == "prior" and batching == "plate" and self._ways["density"] != "plate":
                reason = "the log-density is not batched by a plate"
            if reason is None:
                return batching
            if asked == batching:
                raise ValueError(
                    f"batching={batching!r} is wrong for this model: {reason}. Leave batching=None to let it be chosen."
                )
            self._note(f"cannot batch the {_SUBJECTS[what]} by {batching}: {reason}")
            if batching == "vmap" and what == "density":
                warn(
                    "the model cannot be run for many draws at once, so its log-density is evaluated draw by draw, "
                    f"many times slower: {reason}. {_mend(reason)}"
                )
        raise AssertionError("unreachable: the loop is always right")

    def _verify_size(self, what: _What, n: int, q: Tensor) -> None:
        """Check a batch size met for the first time against single draws: it may be a size of the model."""
        if n in self._trusted[what] or self._ways[what] != "plate":
            return
        self._trusted[what].add(n)
        with torch.no_grad():
            try:
                if what == "density":
                    right = same_rows(self._runner, q)
                elif what == "values":
                    self._verifier.check_some_values("plate", q)
                    right = True
                else:
                    right = self._verifier.objection("prior", "plate", n) is None
            except BatchingError:
                right = False
        if not right:
            self._note(f"the plate gives wrong {_SUBJECTS[what]} for just {n} draws and is given up")
            self._asked = None
            with seeded(0):
                self._ways[what] = self._choose(what, _ORDER[1:])

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _check(self, q: Tensor) -> int:
        if q.dim() != 2 or q.shape[1] != self.dim or len(q) == 0:
            raise ValueError(f"expected q of shape (n, {self.dim}) with n >= 1, got {tuple(q.shape)}")
        return len(q)

    def _check_values(self, given: dict[str, Tensor]) -> int:
        shapes = self._layout.shapes
        needed = set()
        for name in self._layout.latents:
            data = name.removesuffix("_base")
            needed.add(data if name not in given and name != data and data in given and data in shapes else name)
        if needed != set(given):
            raise ValueError(
                f"expected values for the latent sites {sorted(self._layout.latents)} and no others, got "
                f"{sorted(given)}: missing {sorted(needed - set(given))}, not needed "
                f"{sorted(set(given) - needed)}"
            )
        n = max((len(value) for value in given.values() if value.dim()), default=0)
        for name, value in given.items():
            if n < 1 or value.shape != (n, *shapes[name]):
                raise ValueError(
                    f"initial values of {name!r}: expected shape {('n', *shapes[name])} with the same n "
                    f"for all sites, got {tuple(value.shape)}"
                )
        return n


def _scan(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> tuple[Scan, ValueError | None]:
    """What is found in a model, and what torch's validation objects to: later runs may say more than it says."""
    try:
        with seeded(seed):
            return scan(model, args, kwargs), None
    except ModelError:
        raise
    except ValueError as error:
        with seeded(seed), pyro.validation_enabled(False):
            return scan(model, args, kwargs), error


def _mend(reason: str) -> str:
    """What to write instead in a model that no batch of draws can pass through."""
    if is_about_dtypes(reason):
        return "Give the model's own tensors the dtype of its flow priors (tensor.to(flow.dtype))"
    if "branches on latent values" in reason:
        return "Write torch.where(condition, a, b) in place of the branch, and keep latent values as tensors"
    if "in-place" in reason or "inplace" in reason:
        return "Make a new tensor (torch.cat, torch.stack) in place of writing into an old one"
    if "random" in reason:
        return "Draw it by pyro.sample, or once outside the model"
    return "Use torch functions that torch.func.vmap can run, on tensors that the model makes itself"


def check_model(model: object, kernel: str) -> None:
    """Raises ``TypeError`` unless ``model`` can be called."""
    what = "a Pyro model (a callable with pyro.sample statements)"
    if isinstance(model, InflationaryFlow | torch.distributions.Distribution):
        raise TypeError(
            f"{kernel} expects {what}, got {type(model).__name__}, which is a prior: write a model that draws from it, "
            'pyro.sample("x", flow.prior()), and observes'
        )
    if not callable(model):
        raise TypeError(f"{kernel} expects {what}, got {type(model).__name__}")


def resolve_density(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    batching: Literal["plate", "vmap", "loop"] | None,
    batch_size: int | None,
    seed: int,
) -> BatchedDensity:
    """The batched density of ``model(*args, **kwargs)``; an object that already is one comes back as it is.

    Raises:
        TypeError: if arguments are given for a density, which takes none.
        ValueError: if there is nothing to infer.
    """
    if all(hasattr(model, name) for name in ("dim", "sample_prior", "sites", "gaussian_prior")):
        if args or kwargs:
            raise TypeError("run() expects no arguments when the kernel holds a density instead of a Pyro model")
        density = model
    else:
        density = BatchedModel(model, args, kwargs, batching=batching, batch_size=batch_size, seed=seed)
    if density.dim < 1:
        raise ValueError("the model has no continuous latent site: there is nothing to infer")
    return density
