"""The first look at a model: which sites it has, and what makes it unfit for sampling.

Everything a user can get wrong is said here, once and in full, so that the evaluation of the density can be
lean.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, identity_transform

from ...core.errors import ModelError
from ...core.randomness import seeded
from .enumeration import is_enumerated
from .handlers import Evaluate, FromVector
from .layout import LatentSite, Layout, split_mask, support_tensors
from .reparam import SCALED_BASE
from .runner import Runner
from .sites import is_deterministic

Model = Callable[..., Any]

_VALIDATED_DRAWS = 4
"""Prior draws at which distributions check their parameters; later runs go without."""


def check_arguments(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise a helpful TypeError if the model cannot be called with these arguments."""
    if not callable(model):
        raise TypeError(f"expected a Pyro model (a callable), got {type(model).__name__}")
    function = pyro.poutine.unwrap(model)
    while hasattr(function, "msngr") and hasattr(function, "fn"):
        function = pyro.poutine.unwrap(function.fn)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [type(a).__name__ for a in args] + [f"{k}={type(v).__name__}" for k, v in kwargs.items()]
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"the model {name}{signature} cannot be called with ({', '.join(given)}): {error}. "
            "Pass the model's own arguments, in its order or by its names."
        ) from None


class Enumerated(Exception):
    """The model has discrete latents that are to be summed out first."""


class Scan(Evaluate):
    """One draw from the prior that writes down the layout as it goes."""

    def __init__(self) -> None:
        super().__init__(Layout())
        self.device = torch.device("cpu")
        self.observes = False

    def _subsample(self, msg: Any) -> None:
        fn = msg["fn"]
        size, subsample = fn.size, fn.subsample_size
        if msg["value"] is None and subsample is not None and subsample < size:
            raise ModelError(
                f"plate {msg['name']!r} draws a random subsample of {subsample} of {size}; MCMC and SMC "
                "need the full likelihood. Drop subsample_size, or pass a fixed `subsample=` of indices."
            )

    def _pyro_sample(self, msg: Any) -> None:
        frames = [frame.dim for frame in msg["cond_indep_stack"] if frame.dim is not None]
        self.layout.depth = max([self.layout.depth, *(-dim for dim in frames)])
        name = msg["name"]
        if name in self.layout.shapes:
            raise ModelError(f"the model has two sites named {name!r}; give every site its own name")
        if type(msg["fn"]).__name__ != "_Subsample" and not is_deterministic(msg):
            self.observes |= msg["is_observed"]
            self._inspect_observed(msg) if msg["is_observed"] else self._inspect_latent(msg)
        super()._pyro_sample(msg)
        if name in self.values:
            self.layout.shapes[name] = self.values[name].shape

    def _inspect_latent(self, msg: Any) -> None:
        name, (fn, _) = msg["name"], split_mask(msg["fn"])
        support = _support(fn, name)
        if getattr(support, "is_discrete", False):
            if is_enumerated(msg):
                raise Enumerated(name)
            raise ModelError(
                f"latent site {name!r} is discrete ({_kind(fn)}); only continuous latents can be moved by "
                "HMC, SMC or elliptical slice sampling. If it takes finitely many values, "
                "pyro.infer.config_enumerate(model) has it summed out; otherwise sum it out by hand with a "
                "pyro.factor."
            )
        if isinstance(fn, Delta):
            raise ModelError(f"latent site {name!r} is a Delta, which has no density; use pyro.deterministic instead")
        if isinstance(innermost(fn), dist.ImproperUniform):
            raise ModelError(
                f"latent site {name!r} has an ImproperUniform prior, of which there are no draws, and samplers here "
                "look at the model at prior draws first, whatever their init; give it a proper prior, as wide as need "
                "be: Normal(0, 100), or LogNormal(0, 5) for what is positive"
            )
        try:
            transform = biject_to(support)
        except NotImplementedError:
            raise ModelError(
                f"latent site {name!r} ({_kind(fn)}) has support {support}, for which there is no "
                "bijection from the real numbers; rewrite the site with a transform of an unconstrained one"
            ) from None
        shape = fn.batch_shape + fn.event_shape
        free = transform.inverse_shape(shape)
        if free[: len(fn.batch_shape)] != fn.batch_shape:
            raise ModelError(f"latent site {name!r}: its support {support} mixes batch dimensions; use .to_event()")
        dtype = fn.sample().dtype
        site = LatentSite(
            name=name,
            batch_shape=fn.batch_shape,
            event_shape=fn.event_shape,
            unconstrained_event_shape=free[len(fn.batch_shape) :],
            start=self.layout.dim,
            dtype=dtype,
            transform=None if support_tensors(support) else transform,
            is_real=_is_real(support),
        )
        self.layout.latents[name] = site
        self.layout.dim = site.stop

    def _inspect_observed(self, msg: Any) -> None:
        fn, name, value = msg["fn"], msg["name"], msg["value"]
        if not isinstance(value, Tensor):
            raise ModelError(
                f"observed site {name!r}: expected obs to be a tensor, got {type(value).__name__}: "
                "use torch.as_tensor(obs)"
            )
        if isinstance(innermost(fn), (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)):
            return  # there NaN means that nothing was seen
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise ModelError(
                f"observed site {name!r} contains NaN. A mask does not keep NaN out of the gradient: put "
                "any valid number in place of missing observations and mask them, leave them out, or use "
                "pyro.distributions.NanMaskedNormal."
            )
        fn, own_mask = split_mask(fn)
        try:
            support = fn.support
        except (NotImplementedError, AttributeError):
            return  # pyro.factor and distributions without a declared support
        if support_tensors(support):
            self.layout.guarded.add(name)
            return
        inside = support.check(value)
        for mask in (own_mask, msg["mask"]):
            if mask is not None:
                inside = inside | ~torch.as_tensor(mask)
        if not bool(inside.all()):
            raise ModelError(
                f"observed site {name!r} is impossible: its value lies outside the support ({support}) of "
                f"{_kind(fn)}. Check the data and the likelihood."
            )

    def _observed(self, msg: Any) -> None:
        # Validation would raise for a value that is merely impossible for this one prior draw.
        try:
            super()._observed(msg)
        except ValueError:
            if msg["name"] not in self.layout.guarded:
                raise
            self.log_likelihood[msg["name"]] = torch.tensor(-torch.inf)

    def latent_value(self, msg: Any, site: LatentSite, fn: Any) -> tuple[Tensor, Tensor | None]:
        """A prior draw."""
        with torch.no_grad():
            value: Tensor = fn.sample()
        if not self.values:
            self.device = value.device
        return value, None

    def sum_rows(self, terms: Tensor, name: str) -> Tensor:
        """Sum, after noting how many dimensions the log-probability has."""
        self.layout.depth = max(self.layout.depth, terms.dim())
        return super().sum_rows(terms, name)


def scan(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Scan:
    """Run the model from the prior and return what was found first, or raise what is wrong with it."""
    found, *others = (Scan() for _ in range(_VALIDATED_DRAWS))
    for scanner in (found, *others):
        try:
            with scanner:
                model(*args, **kwargs)
        except RuntimeError as error:
            if not is_about_dtypes(str(error)):
                raise
            raise ModelError(_mixed(str(error), scanner.layout)) from error
    missing = [f"argument {k + 1}" for k, value in enumerate(args) if value is None]
    missing += [name for name, value in kwargs.items() if value is None]
    if missing and not found.observes:
        raise ModelError(
            f"the model observes nothing, and {' and '.join(missing)} of it {'is' if len(missing) == 1 else 'are'} "
            "None: without data the posterior is the prior. Pass the data; for draws from the prior use "
            "pyro.infer.Predictive, or a model without such an argument."
        )
    if not found.layout.latents:
        raise ModelError(
            "the model has no latent sites: every pyro.sample in it is observed or deterministic. There is "
            "nothing to infer; give at least one site without obs."
        )
    return found


def is_about_dtypes(message: str) -> bool:
    """Whether an error of torch's says that tensors of two dtypes met."""
    return "dtype" in message or "scalar type" in message


def _mixed(message: str, layout: Layout) -> str:
    drawn = ", ".join(f"{name!r} {site.dtype}" for name, site in layout.latents.items())
    return (
        f"the model mixes dtypes ({message.strip().splitlines()[0]}). Its latent sites are {drawn or 'not reached'}, "
        f"and torch's default dtype is {torch.get_default_dtype()}. Give the model's own tensors the dtype of its flow "
        "priors (tensor.to(flow.dtype)), or the flow that of the model: flow.to(torch.float32), or ifpyro.fit(..., "
        "dtype=torch.float32)"
    )


def check_reproducible(runner: Runner, q: Tensor) -> None:
    """Raise if two runs on the same latent values disagree."""
    runs = []
    for seed in (1, 2):
        with seeded(seed):
            runs.append(runner.single(q))
    first, second = runs[0].log_terms(), runs[1].log_terms()
    for name in {**first, **second}:
        same = name in first and name in second
        if not (same and torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-6, equal_nan=True)):
            raise ModelError(
                f"the model is not reproducible: site {name!r} has a different log-probability in two runs "
                "on the same latent values. Randomness inside the model (torch.randn, dropout, random "
                "minibatches) must be a pyro.sample site, or be drawn once outside the model."
            )


class MaskProbe(FromVector):
    """Notes the mask of every masked latent site, as wide as the site's batch."""

    def __init__(self, layout: Layout, q: Tensor):
        super().__init__(layout, q)
        self.masks: dict[str, Tensor] = {}
        self.completing: dict[str, str] = {}  # latent site to the factor that completes its masked density

    def _observed(self, msg: Any) -> None:
        if (base := msg["infer"].get(SCALED_BASE)) is not None:
            self.completing[base] = msg["name"]
        super()._observed(msg)

    def latent_value(self, msg: Any, site: LatentSite, fn: Any) -> tuple[Tensor, Tensor | None]:
        """As usual, after noting the mask."""
        for mask in (split_mask(msg["fn"])[1], msg["mask"]):
            if mask is not None and mask is not True:
                mask = torch.as_tensor(mask, device=self.q.device).expand(site.batch_shape)
                self.masks[site.name] = mask & self.masks.get(site.name, mask)
        return super().latent_value(msg, site, fn)


def irrelevant_masked_sites(runner: Runner, points: Tensor) -> set[str]:
    """Masked latent sites whose masked-out entries matter to nothing else in the model.

    A masked-out latent entry has no prior. If nothing else depends on it either (padding, or the observed
    part of an ``obs_mask`` site), its posterior would be flat and improper: such entries keep their prior
    instead, which leaves every other marginal as it is. Decided by gradients: those of all other sites' terms
    must be exactly zero there.
    """
    verdicts: dict[str, bool] = {}
    masks: dict[str, Tensor] = {}
    for q in points:
        q = q.detach().requires_grad_(True)
        with torch.enable_grad():
            run: MaskProbe = runner.run(MaskProbe(runner.layout, q))
        for name, mask in run.masks.items():
            site = runner.layout.latents[name]
            own = (name, run.completing.get(name))
            others = [v for k, v in (*run.log_prior.items(), *run.log_likelihood.items()) if k not in own]
            joint = sum((v.sum() for v in others), q.sum() * 0)
            (gradient,) = torch.autograd.grad(joint, q, retain_graph=True)
            part = gradient[site.start : site.stop].reshape(*site.batch_shape, -1)
            clean = bool((part[~mask] == 0).all()) and torch.equal(masks.setdefault(name, mask), mask)
            verdicts[name] = verdicts.get(name, True) and clean
    return {name for name, irrelevant in verdicts.items() if irrelevant}


def standard_normal(fn: Any, site: LatentSite) -> bool:
    """Whether a latent site's prior is N(0, I) whatever the other latents are."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if not site.is_real or not isinstance(fn, torch.distributions.Normal):
        return False
    constant = not (fn.loc.requires_grad or fn.scale.requires_grad)
    return constant and bool((fn.loc == 0).all()) and bool((fn.scale == 1).all())


class GaussianPrior(FromVector):
    """Notes which latent sites are standard normal; run it on a ``q`` that requires gradients."""

    def __init__(self, layout: Layout, q: Tensor):
        super().__init__(layout, q)
        self.standard: dict[str, bool] = {}

    def latent_value(self, msg: Any, site: LatentSite, fn: Any) -> tuple[Tensor, Tensor | None]:
        """As usual, after looking at the prior."""
        self.standard[site.name] = standard_normal(fn, site)
        return super().latent_value(msg, site, fn)


def has_gaussian_prior(runner: Runner, point: Tensor) -> bool:
    """Whether the prior of ``q`` is exactly N(0, I)."""
    with torch.enable_grad():
        run: GaussianPrior = runner.run(GaussianPrior(runner.layout, point.detach().requires_grad_(True)))
    return all(run.standard.values())


def innermost(fn: Any) -> Any:
    """A distribution without masks and declarations of its event."""
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _support(fn: Any, name: str) -> Any:
    if isinstance(innermost(fn), dist.VonMises):
        # It declares all real numbers, on which its periodic density is improper; its draws lie on one turn.
        return constraints.independent(constraints.interval(-math.pi, math.pi), len(fn.event_shape))
    try:
        return _of_components(fn.support)
    except (NotImplementedError, AttributeError):
        raise ModelError(f"latent site {name!r} ({_kind(fn)}) declares no support") from None


def _of_components(support: Any) -> Any:
    """The support of a mixture as that of its components, which share it."""
    if isinstance(support, constraints.independent):
        return constraints.independent(_of_components(support.base_constraint), support.reinterpreted_batch_ndims)
    if type(support).__name__ == "MixtureSameFamilyConstraint" and not support_tensors(support.base_constraint):
        return support.base_constraint
    return support


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return biject_to(support) is identity_transform or support is constraints.real_vector


def _kind(fn: Any) -> str:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return type(fn).__name__
