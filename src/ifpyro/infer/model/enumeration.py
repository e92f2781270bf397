r"""Discrete latents summed out of a model, so that what is left can be moved by gradients.

With discrete latents ``k`` marked ``infer={"enumerate": "parallel"}`` (`pyro.infer.config_enumerate` marks all of
them), continuous ones ``x`` and data ``y``, the model is replaced by one with a single factor in place of every site
that depends on ``k``,

    log p(y, x) = log p(x) + log sum_k p(k | x) p(y | k, x).

Pyro enumerates ``k`` along dimensions to the left of all plates and of the batch of draws, and eliminates them plate by
plate (Obermeyer et al. 2019, tensor variable elimination). Plates must be declared. Masks act inside the sum;
``poutine.scale`` has no meaning there that all would agree on, and is refused.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ...core.errors import ModelError
from ...core.messages import warn
from ...flow.solver.steps import is_wrapped
from .handlers import Evaluate
from .layout import Layout
from .log_einsum import LogRing
from .sites import is_deterministic

Model = Callable[..., Any]

_DRAWS = "_ifpyro_draws"


def is_enumerated(msg: Any) -> bool:
    """Whether a latent site is marked for parallel enumeration."""
    return not msg["is_observed"] and msg["infer"].get("enumerate") == "parallel"


def sum_out(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Model], Model]:
    """How the discrete latents of a model are summed out of it, and of the same model with other data.

    Args:
        model: a model with sites marked for enumeration, flow priors already reparameterised.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        what turns such a model into one without discrete latents. When run, that one raises `ModelError` if a latent
        site depends on them, a scale acts on the sum, or batch dimensions are not declared.

    Sites that record what they compute from the discrete latents have no one value: a warning says that they are left
    out.
    """
    look, again = _Look(), _Look()
    with look:
        model(*args, **kwargs)
    with again, _Enumerate(-look.depth - 2):
        model(*args, **kwargs)
    hidden = frozenset(name for name, shape in look.computed.items() if again.computed.get(name) != shape)
    if hidden:
        warn(
            f"deterministic sites {sorted(hidden)} depend on discrete latents that are summed out: they have no one "
            "value and are left out of the draws; compute them afterwards from pyro.infer.infer_discrete"
        )

    def summed(original: Model) -> Model:
        def marginal(*args: Any, **kwargs: Any) -> Any:
            collect = _Collect(look.depth, hidden)
            with collect, _Enumerate(-look.depth - 2):
                result = original(*args, **kwargs)
            if collect.names:
                first, *others = collect.names
                name = f"sum over {first}" + (f" and {len(others)} more sites" if others else "")
                pyro.factor(name, collect.log_sum())
            return result

        return marginal

    return summed


class _Enumerate(EnumMessenger):
    """Pyro's enumeration, which asks for the shape of a value in a way that ``vmap`` does not allow."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and is_wrapped(value):
            msg = {**msg, "value": torch.empty(value.shape, device="meta")}
        super()._pyro_post_sample(msg)


class _Look(Evaluate):
    """How many batch dimensions a model has, and the shapes of what it computes, seen at one draw."""

    def __init__(self) -> None:
        super().__init__(Layout())
        self.depth = 0
        self.computed: dict[str, torch.Size] = {}

    def _pyro_sample(self, msg: Any) -> None:
        frames = [-frame.dim for frame in msg["cond_indep_stack"] if frame.dim is not None]
        self.depth = max([self.depth, *frames])
        if is_deterministic(msg):
            self.computed[msg["name"]] = msg["value"].shape
        elif type(msg["fn"]).__name__ != "_Subsample":
            self.depth = max(self.depth, _batch_dims(msg))


class _Collect(Messenger):
    """Takes the sites that depend on enumerated ones out of a run and adds them up."""

    def __init__(self, depth: int, hidden: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.depth, self.hidden = depth, hidden
        self.names: list[str] = []
        self._trace = Trace()

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample":
            return
        if is_deterministic(msg):
            msg["stop"] = name in self.hidden
            return
        enumerated = msg["infer"].get("_enumerate_dim") is not None
        if not enumerated and _batch_dims(msg) <= self.depth + 1:
            return
        if enumerated:
            self.names.append(name)
        elif not msg["is_observed"] and name.endswith("_unobserved"):
            raise ModelError(
                f"site {name.removesuffix('_unobserved')!r} has an obs_mask and depends on discrete latents to be "
                "summed out: its missing values would be latents that depend on them. Observe the rows that were seen "
                "alone, y[seen], or put any valid number where nothing was seen and the statement under "
                "poutine.mask(mask=seen)"
            )
        elif not msg["is_observed"]:
            raise ModelError(
                f"latent site {name!r} depends on discrete latents to be summed out, as only observed sites may. "
                "Use pyro.distributions.MixtureSameFamily as its prior"
            )
        if isinstance(msg["scale"], Tensor) or msg["scale"] != 1:
            raise ModelError(f"site {name!r} is scaled and depends on discrete latents: a scaled sum is not supported")
        msg["stop"] = True  # nobody outside sees it

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["stop"] and not is_deterministic(msg):
            self._trace.add_node(msg["name"], **msg)

    def log_sum(self) -> Tensor:
        """Log of the sum, shape ``(1, ..., 1)`` with a batch of draws in front if there is one."""
        draws = -self.depth - 1
        size = 1
        for site in self._trace.nodes.values():
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            # The probabilities of a masked label still sum to one; what it explains is what the mask takes away.
            mask = None if site["infer"].get("_enumerate_dim") is not None else site["mask"]
            site["log_prob"] = site["unscaled_log_prob"] = scale_and_mask(log_prob, mask=mask)
            if log_prob.dim() >= -draws:
                size = max(size, log_prob.shape[draws])
        frame = CondIndepStackFrame(_DRAWS, draws, size, -1)
        for site in self._trace.nodes.values():
            site["cond_indep_stack"] = (*site["cond_indep_stack"], frame)
        trace = self._trace
        try:
            trace.pack_tensors()
        except ValueError as error:
            raise ModelError(
                "where discrete latents are summed out, every batch dimension must be that of a pyro.plate or be "
                f"declared by .to_event(). {str(error).splitlines()[0].rstrip(':')}"
            ) from None
        plates = trace.plate_to_symbol
        terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for site in trace.nodes.values():
            ordinal = frozenset(plates[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            terms.setdefault(ordinal, []).append(site["packed"]["log_prob"])
        sums = set(trace.symbol_to_dim) - set(plates.values())
        total = torch.zeros(())
        for found in contract_tensor_tree(terms, sums, ring=LogRing()).values():
            for term in found:
                total = total + _over_all_but(term, plates[_DRAWS])
        return total.reshape(-1, *(1,) * self.depth) if size > 1 else total.reshape((1,) * self.depth)


def _over_all_but(term: Tensor, symbol: str) -> Tensor:
    """Sum of a packed tensor over all dimensions but one, shape ``(n,)`` or, if it lacks that one, ``()``."""
    dims: str = term._pyro_dims  # type: ignore[attr-defined]
    others = [i for i, name in enumerate(dims) if name != symbol]
    return term.sum(others) if others else term


def _batch_dims(msg: Any) -> int:
    """Dimensions of a site's log-probability."""
    fn, value = msg["fn"], msg["value"]
    of_value = value.dim() - fn.event_dim if isinstance(value, Tensor) else 0
    return max(len(fn.batch_shape), of_value)
