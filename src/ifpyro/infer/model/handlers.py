"""Pyro handlers that read unconstrained vectors into a model and add up its log-density, row by row.

One model execution serves either a single draw (``rows=None``) or ``n`` draws stacked along one batch
dimension to the left of everything the model itself uses,

    value of a latent site:   (n, 1, ..., 1, *batch_shape, *event_shape)
    log-probability:          (n, 1, ..., 1, *batch_shape)   ->   summed over everything but the first: (n,)

which is what an outermost plate of size ``n`` would do. Whether a model may be run that way is decided by
`ifpyro.infer.model.verify`; the handlers here only do the arithmetic.
"""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor
from torch.distributions import Transform, biject_to

from ...core.errors import BatchingError
from ...flow.distribution import Decodes
from .layout import LatentSite, Layout, scale_and_mask, split_mask
from .reparam import SCALED_BASE
from .sites import is_deterministic


class Evaluate(Messenger):
    """Give every latent site its value and record log-prior, log-likelihood and values by site.

    ``rows=None`` runs one draw (entries of the results are scalars); otherwise ``rows=n`` draws in one run
    (entries are ``(n,)``, or broadcast to it). Subclasses say where the latent values come from.
    """

    def __init__(self, layout: Layout, rows: int | None = None, *, score: bool = True):
        super().__init__()
        self.layout = layout
        self.rows = rows
        self.score = score
        self.log_prior: dict[str, Tensor] = {}
        self.log_likelihood: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def latent_value(self, msg: Any, site: LatentSite, fn: Any) -> tuple[Tensor, Tensor | None]:
        """The site's value and its unconstrained counterpart (None where no Jacobian is needed)."""
        raise NotImplementedError

    # -- Pyro's side ------------------------------------------------------------------------------------

    def _pyro_param(self, msg: Any) -> None:
        # A parameter is a constant here, from the store or from its initial value, which is not stored.
        name = msg["name"]
        if name not in self.layout.params:
            self.layout.params[name] = _param_value(msg)
        msg["value"] = self.layout.params[name]
        msg["done"] = True

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            self._subsample(msg)
        elif is_deterministic(msg):
            self.values[msg["name"]] = msg["value"]
        elif msg["is_observed"]:
            if self.score:
                self._observed(msg)
        else:
            self._latent(msg)

    def _subsample(self, msg: Any) -> None:
        pass

    def _latent(self, msg: Any) -> None:
        name = msg["name"]
        site = self.layout.latents.get(name)
        if site is None or name in self.values:
            raise BatchingError(f"latent site {name!r} appears only for some latent values, or twice", name)
        fn, own_mask = split_mask(msg["fn"])
        value, unconstrained = self.latent_value(msg, site, fn)
        msg["value"] = value
        self.values[name] = value
        if not self.score:
            return
        log_prob = fn.log_prob(value)
        prior = self.sum_rows(log_prob, name)
        if unconstrained is not None:
            jacobian = self._transform(site, fn).log_abs_det_jacobian(unconstrained, value)
            extra = jacobian.dim() - (value.dim() - len(site.event_shape))
            if extra > 0:
                jacobian = jacobian.flatten(-extra).sum(-1)
            prior = prior + self.sum_rows(jacobian, name)
        self.log_prior[name] = prior
        # The prior term stays the proper density that prior draws follow; what scales and masks change goes
        # with the likelihood, so that the sum is Pyro's density and tempering starts from what can be drawn.
        mask = _both(msg["mask"], own_mask)
        if name in self.layout.unmasked:
            mask = None
        if mask is not None or isinstance(msg["scale"], Tensor) or msg["scale"] != 1:
            change = scale_and_mask(log_prob, msg["scale"], mask) - log_prob
            self.log_likelihood[name] = self.sum_rows(change, name)

    def _observed(self, msg: Any) -> None:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        if msg["infer"].get(SCALED_BASE) in self.layout.unmasked:
            fn = fn.unmasked()  # the latent's masked-out entries keep their prior
            if fn is None:
                return
        log_prob = fn.log_prob(value, *msg["args"], **msg["kwargs"])
        if name in self.layout.guarded:
            # With bounds that move with the latents, many distributions return finite nonsense outside them.
            inside = fn.support.check(value)
            log_prob = torch.where(inside, log_prob, log_prob.new_full((), -torch.inf))
        log_prob = scale_and_mask(log_prob, msg["scale"], msg["mask"])
        self.log_likelihood[name] = self.sum_rows(log_prob, name)

    # -- arithmetic -------------------------------------------------------------------------------------

    def sum_rows(self, terms: Tensor, name: str) -> Tensor:
        """Sum over everything but the batch of draws."""
        if self.rows is None or terms.dim() <= self.layout.depth:
            return terms.sum()
        if terms.dim() > self.layout.depth + 1 or terms.shape[0] not in (1, self.rows):
            raise BatchingError(
                f"the log-probability of site {name!r} has shape {tuple(terms.shape)} for {self.rows} "
                f"draws; expected {self.rows} rows and at most {self.layout.depth} dimensions to the right "
                "of them",
                name,
            )
        return terms.flatten(1).sum(-1) if terms.dim() > 1 else terms

    def batch_shape(self, site: LatentSite) -> Size:
        """Shape of a latent site's batch in this run: the draws, padding, and its own batch."""
        if self.rows is None:
            return site.batch_shape
        return Size((self.rows,) + (1,) * (self.layout.depth - len(site.batch_shape))) + site.batch_shape

    def _transform(self, site: LatentSite, fn: Any) -> Transform:
        return site.transform if site.transform is not None else biject_to(fn.support)

    def totals(self) -> tuple[Tensor, Tensor]:
        """``(log_prior, log_likelihood)`` over all sites, each ``(rows,)``, or a scalar for one draw."""
        if len(self.log_prior) != len(self.layout.latents):
            missing = sorted(set(self.layout.latents) - set(self.log_prior))
            raise BatchingError(f"latent sites {missing} appear for some latent values only", missing[0])
        like = next(iter(self.log_prior.values()))
        return self._add(self.log_prior, like), self._add(self.log_likelihood, like)

    def _add(self, terms: dict[str, Tensor], like: Tensor) -> Tensor:
        total = sum(terms.values(), like.new_zeros((), dtype=self.layout.dtype))
        assert isinstance(total, Tensor)
        shape = Size() if self.rows is None else Size((self.rows,))
        return (total if total.shape == shape else total.expand(shape)).to(self.layout.dtype)

    def log_terms(self) -> dict[str, Tensor]:
        """Log-prior and log-likelihood terms together, by site."""
        return {**self.log_prior, **self.log_likelihood}


class FromVector(Evaluate):
    """Latent values from ``q``, of shape ``(dim,)`` for one draw and ``(n, dim)`` for ``rows=n``.

    Args:
        layout: the latent sites.
        q: the unconstrained draws.
        rows: number of draws in one run under a plate; None for a single draw.
        score: whether log-probabilities are wanted.
        decoded: latent site to its flow and what that makes of this draw, where it is known.

    Attributes:
        decodes: what flows are told of this run.
    """

    def __init__(
        self,
        layout: Layout,
        q: Tensor,
        rows: int | None = None,
        *,
        score: bool = True,
        decoded: Mapping[str, tuple[Any, Tensor]] | None = None,
    ):
        super().__init__(layout, rows, score=score)
        self.q, self.decoded, self.decodes = q, decoded or {}, Decodes()

    def latent_value(self, msg: Any, site: LatentSite, fn: Any) -> tuple[Tensor, Tensor | None]:
        """The site's slice of ``q``, constrained."""
        u = self.q[..., site.start : site.stop]
        u = u.reshape(self.batch_shape(site) + site.unconstrained_event_shape).to(site.dtype)
        if site.name in self.decoded:
            self.decodes.known.append((u, *self.decoded[site.name]))
        return (u, None) if site.is_real else (self._transform(site, fn)(u), u)


class FromPrior(Evaluate):
    """Latent values drawn from their priors, in the model's order, from the current random state."""

    def latent_value(self, msg: Any, site: LatentSite, fn: Any) -> tuple[Tensor, Tensor | None]:
        """A draw, and what it is in ``q``."""
        with torch.no_grad():
            value = self.draw(msg, site, fn)
            u = value if site.is_real else self._transform(site, fn).inv(value)
        self.unconstrained[site.name] = u
        return (value, None) if site.is_real else (value, u)

    def __init__(self, layout: Layout, rows: int | None = None, *, score: bool = False):
        super().__init__(layout, rows, score=score)
        self.unconstrained: dict[str, Tensor] = {}

    def draw(self, msg: Any, site: LatentSite, fn: Any) -> Tensor:
        """One value per draw for a site."""
        shape = self.batch_shape(site)
        return (fn if fn.batch_shape == shape else fn.expand(shape)).sample()

    def vector(self) -> Tensor:
        """The unconstrained draws, ``(dim,)`` or ``(rows, dim)``."""
        lead = () if self.rows is None else (self.rows,)
        parts = [self.unconstrained[name].reshape(*lead, -1) for name in self.layout.latents]
        return torch.cat([p.to(self.layout.dtype) for p in parts], -1)


class FromValues(FromPrior):
    """Latent values given in the user's space, constrained, by site name: for `BatchedModel.unconstrain`."""

    def __init__(self, layout: Layout, values: dict[str, Tensor], rows: int | None = None):
        super().__init__(layout, rows)
        self.given = values

    def draw(self, msg: Any, site: LatentSite, fn: Any) -> Tensor:
        """The given value."""
        if msg["value"] is not None:  # inverted from the value of a reparameterised site
            return msg["value"].to(site.dtype)
        shape = self.batch_shape(site) + site.event_shape
        return self.given[site.name].reshape(shape).to(site.dtype)

    # Reparameterisers ask for these before they replace a site, which lets `x` be given instead of `x_base`.
    def _pyro_get_init_messengers(self, msg: Any) -> None:
        msg["value"] = [*(msg["value"] or []), _Initial(self)]


class _Initial:
    def __init__(self, owner: FromValues):
        self.owner = owner

    def _process_message(self, msg: Any) -> None:
        name, owner = msg["name"], self.owner
        if msg["value"] is None and name in owner.given and name not in owner.layout.latents:
            lead = () if owner.rows is None else (owner.rows,)
            shape = owner.layout.shapes[name]
            value_dim = msg["fn"].event_dim + owner.layout.depth
            pad = (1,) * (value_dim - len(shape)) if owner.rows is not None else ()
            msg["value"] = owner.given[name].reshape(*lead, *pad, *shape)


def _param_value(msg: Any) -> Tensor:
    store, name = pyro.get_param_store(), msg["name"]
    if name in store:
        value = store[name]
        # pyro.module compares identities, so its parameters must come back as they are.
        return value if "$$$" in name else value.detach()
    args = msg["args"]
    if len(args) < 2:
        raise KeyError(f"the model reads pyro.param({name!r}) without an initial value and the store has none")
    init = args[1]
    if "$$$" in name:
        return init
    value = init() if callable(init) and not isinstance(init, Tensor) else init
    return torch.as_tensor(value).detach().clone()


def _both(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return a & b
