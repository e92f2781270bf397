"""The flow as a Pyro transform and a Pyro distribution: the only module that knows ``pyro.distributions``."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import _InverseTransform

from ..data.charts import Chart
from ..data.constrained import Inside
from .solver.discrete_map import DiscreteMap


class _Flow(Protocol):
    """What a transform asks of a flow."""

    map: DiscreteMap
    event_shape: torch.Size
    chart: Chart

    @property
    def latent_dim(self) -> int: ...

    @property
    def batch_shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def encode_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


@dataclass
class Decodes:
    """What flows are told of the latents of one run of a model: results that exist already, and who asks for which.

    Attributes:
        known: Latent, flow and what it decodes to; the very same latent is then not decoded again.
        asked: Latents and the flows that were asked to decode them, in order.
    """

    known: list[tuple[Tensor, Any, Tensor]] = field(default_factory=list)
    asked: list[tuple[Tensor, Any]] = field(default_factory=list)


_DECODES: ContextVar[Decodes | None] = ContextVar("ifpyro_decodes", default=None)


@contextmanager
def sharing(decodes: Decodes) -> Iterator[None]:
    """Within, every :class:`FlowTransform` looks for its result in ``decodes`` and notes there what it is asked."""
    token = _DECODES.set(decodes)
    try:
        yield
    finally:
        _DECODES.reset(token)


class _ConditionalFlow(Protocol):
    """What a conditional transform asks of a flow."""

    event_shape: torch.Size
    chart: Chart

    def given(self, c: Any) -> _Flow: ...


class FlowTransform(TransformModule):
    """The map from the Gaussian latent to data as a ``TransformModule``.

    Domain: real vectors of length ``flow.latent_dim``; codomain: the flow's support over its event shape; any batch
    shape. A plain call solves the flow without a log-determinant, because inference on the latent needs none;
    ``log_abs_det_jacobian(z, x)`` is then one pass of Jacobians from ``z``, and never inverts anything.

    With ``cache_size=1`` a call also computes the log-determinant, in the same solve, and remembers ``(z, x,
    log_det)``: ``inv(x)`` and ``log_abs_det_jacobian(z, x)`` after it cost nothing, and likewise after an inverse call.
    A remembered result that carries an autograd graph is handed out once, and not at all after a backward pass went
    through it, so that no graph can be run backward a second time.

    Args:
        flow: the flow.
        cache_size: 0 or 1.

    Example:
        >>> transform = ifpyro.FlowTransform(flow)
        >>> transform
        FlowTransform(2 -> (2,))
        >>> x = transform(torch.zeros(5, 2))
        >>> torch.allclose(transform.inv(x), torch.zeros(5, 2), atol=1e-5)
        True
    """

    bijective = True
    is_ifpyro_flow: ClassVar[bool] = True
    """How a sampler recognises a site whose latent it should use."""

    def __init__(self, flow: _Flow, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        if isinstance(flow, type) or not hasattr(flow, "decode_and_log_det"):
            raise TypeError(f"FlowTransform expects a flow, got {getattr(flow, '__name__', type(flow).__name__)}")
        self.flow = flow
        self._memory: _Memory | None = None

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def domain(self) -> constraints.Constraint:
        """Real vectors."""
        return constraints.real_vector

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """The flow's support, over its event shape."""
        return _codomain(self.flow.chart, self.flow.event_shape)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, latent_dim)`` to ``(*batch, *event_shape)``."""
        return _swap_tail(shape, torch.Size([self.flow.latent_dim]), self.flow.event_shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, *event_shape)`` to ``(*batch, latent_dim)``."""
        return _swap_tail(shape, self.flow.event_shape, torch.Size([self.flow.latent_dim]))

    @property
    def inv(self) -> "InverseFlowTransform":
        """The map from data to latent; ``t.inv.inv is t``."""
        inverse: InverseFlowTransform | None = self.__dict__.get("_inv")
        if inverse is None:
            inverse = self._inv = InverseFlowTransform(self)
        return inverse

    def with_cache(self, cache_size: int = 1) -> "FlowTransform":
        """The same flow with another cache size."""
        return self if cache_size == self._cache_size else FlowTransform(self.flow, cache_size=cache_size)

    def __call__(self, z: Tensor) -> Tensor:
        """Data ``x`` of latents ``z``."""
        decodes = _DECODES.get()
        if decodes is not None:
            decodes.asked.append((z, self.flow))
            for latent, flow, x in decodes.known:
                if latent is z and flow is self.flow:
                    return x
        if self._cache_size == 0:
            return self.flow.decode(z)
        state = self.flow.map.state()
        if self._memory is None or not self._memory.has(state, z=z):
            x, log_det = self.flow.decode_and_log_det(z)
            self._memory = _Memory(state, z=z, x=x, log_det=log_det, computed=x)
        return self._memory.x

    def _inv_call(self, x: Tensor) -> Tensor:
        if self._cache_size == 0:
            return self.flow.encode(x)
        state = self.flow.map.state()
        if self._memory is None or not self._memory.has(state, x=x):
            z, log_det = self.flow.encode_and_log_det(x)
            self._memory = _Memory(state, z=z, x=x, log_det=-log_det, computed=z)
        return self._memory.z

    def _call(self, z: Tensor) -> Tensor:
        return self.flow.decode(z)

    def _inverse(self, x: Tensor) -> Tensor:
        return self.flow.encode(x)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """``log|det dx/dz|`` in nats, of the batch shape; ``x`` must be the image of ``z``."""
        memory = self._memory
        if memory is not None and memory.matches(self.flow.map.state(), z, x):
            log_det = memory.take_log_det()
            if log_det is not None:
                return log_det
        return self.flow.decode_and_log_det(z)[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_memory": None, "_inv": None}

    def __repr__(self) -> str:
        return f"FlowTransform({self.flow.latent_dim} -> {tuple(self.flow.event_shape)})"


class ConditionalFlowTransform(ConditionalTransformModule):
    """The map from latent to data of a conditional flow; ``.condition(c)`` is a :class:`FlowTransform`.

    Args:
        flow: The conditional flow.

    Example:
        >>> joint = torch.tensor([[[1.0, 0.8], [0.8, 1.0]]])
        >>> exact = ifpyro.ConditionalFlow.from_gaussian_mixture(torch.ones(1), torch.zeros(1, 2), joint, given=[1])
        >>> transform = exact.transform().condition(torch.tensor([1.0]))
        >>> transform(torch.zeros(1))  # the centre of x | c = 1
        tensor([0.800])
    """

    bijective = True

    def __init__(self, flow: _ConditionalFlow) -> None:
        super().__init__()
        self.flow = flow

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def domain(self) -> constraints.Constraint:
        """Real vectors."""
        return constraints.real_vector

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """The flow's support, over its event shape."""
        return _codomain(self.flow.chart, self.flow.event_shape)

    def condition(self, context: Any) -> FlowTransform:
        """The transform under conditions ``(*batch, *condition_shape)``."""
        return FlowTransform(self.flow.given(context))


class InverseFlowTransform(_InverseTransform):
    """Data to latent. Unlike torch's inverse wrapper it survives copying and pickling."""

    def __copy__(self) -> "InverseFlowTransform":
        forward = copy.copy(self._inv)
        assert isinstance(forward, FlowTransform)
        return forward.inv

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        state["_inv"]._inv = self  # a copy's inverse's inverse is the copy


class _Memory:
    """One pair ``x = T(z)`` and its log-determinant, with what is needed to know that they may still be used."""

    def __init__(self, state: Any, *, z: Tensor, x: Tensor, log_det: Tensor, computed: Tensor) -> None:
        self.state, self.z, self.x = state, z, x
        self._versions = (z._version, x._version)
        self._recorded = torch.is_grad_enabled()
        self._carries_graph = computed.requires_grad or log_det.requires_grad
        self._computed = computed
        self._log_det: Tensor | None = log_det
        for tensor in (computed, log_det):
            if tensor.requires_grad:
                tensor.register_hook(self._forget_log_det)

    def has(self, state: Any, *, z: Tensor | None = None, x: Tensor | None = None) -> bool:
        """Whether the partner of this very tensor, under this very map, may be handed out."""
        given, kept, partner = (z, self.z, self.x) if x is None else (x, self.x, self.z)
        reused_graph = self._carries_graph and partner is self._computed
        return given is kept and self._unchanged(state) and not reused_graph

    def matches(self, state: Any, z: Tensor, x: Tensor) -> bool:
        """Whether these very tensors are the pair under this very map."""
        return z is self.z and x is self.x and self._unchanged(state)

    def take_log_det(self) -> Tensor | None:
        """The log-determinant, once if it carries a graph."""
        log_det = self._log_det
        if self._carries_graph:
            self._log_det = None
        return log_det

    def _unchanged(self, state: Any) -> bool:
        # What was computed without gradients cannot serve a caller who wants them.
        wanted = torch.is_grad_enabled() and (self.z.requires_grad or self.x.requires_grad)
        same = self.state == state and self._versions == (self.z._version, self.x._version)
        return same and (self._recorded or not wanted)

    def _forget_log_det(self, _: Tensor) -> None:
        self._log_det = None


class FlowPrior(dist.TransformedDistribution):
    """``x = T(z)``, ``z ~ N(0, I)``, with the density of ``flow.log_prob``: ``-inf`` outside the support.

    Its ``transforms`` are one :class:`FlowTransform`, and its ``base_dist`` the latent's.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.transforms[0].flow.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


def flow_prior(flow: _Flow) -> FlowPrior:
    """``x = T(z)``, ``z ~ N(0, I)``, as a Pyro distribution of event shape ``flow.event_shape``."""
    zeros = torch.zeros(*flow.batch_shape, flow.latent_dim, dtype=flow.dtype, device=flow.device)
    base = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
    return FlowPrior(base, [FlowTransform(flow)])


def _codomain(chart: Chart, event_shape: torch.Size) -> constraints.Constraint:
    return constraints.independent(constraints.real, len(event_shape)) if chart.is_real else Inside(chart)


def _swap_tail(shape: torch.Size, old: torch.Size, new: torch.Size) -> torch.Size:
    cut = len(shape) - len(old)
    if cut < 0 or shape[cut:] != old:
        raise ValueError(f"expected a shape ending in {tuple(old)}, got {tuple(shape)}")
    return torch.Size([*shape[:cut], *new])
