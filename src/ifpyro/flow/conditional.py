r"""Flows of ``x`` given a condition ``c``.

With the features ``f(c)`` of a condition (:mod:`ifpyro.data.conditions`),

.. math:: x = b(\mu + B^T f(c) + W (s \odot v)), \qquad v = T(z; c), \qquad z \sim N(0, I),

``(mu, B)`` being the regression of the unconstrained data on the features, and ``(W, s)`` the axes of its residuals,
shared by all conditions. Angles, clock and grid are functions of ``s`` alone. The velocity vanishes for all ``c`` where
``x | c`` is Gaussian with a mean linear in the features: an untrained conditional flow *is* linear regression.

The latent of every condition is ``N(0, I)``, so that one ``encode`` of held-out pairs tests the calibration of all
conditions at once.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from ..core.files import write_tensors
from ..core.precision import full_precision
from ..data.conditions import Conditions
from ..data.parts import chart_of, located
from ..data.support import as_support, support_to_dict
from .axes.basis import Basis
from .axes.schedule import Schedule
from .distribution import ConditionalFlowTransform
from .given import GivenFlow
from .mapped import Mapped
from .networks.conditional import ConditionalVelocity
from .networks.conditional_mixture import conditional_mixture_parts
from .solver.discrete_map import DiscreteMap, Switches
from .solver.grid import Grid

if TYPE_CHECKING:
    import pyro.distributions as dist


class ConditionalFlow(Mapped, nn.Module):
    """A flow of data ``x`` given a condition ``c``, usually made by ``ifpyro.fit(x, condition=c)``.

    Shapes: conditions are ``(*batch, *condition_shape)``; data ``(*batch, *event_shape)`` and latents ``(*batch,
    latent_dim)`` have the conditions' batch shape, or more dimensions to its left.

    Args:
        conditions: What turns conditions into features.
        basis: Axes of the residuals about the regression's intercept.
        coefficient: ``B``, ``(p, D)``.
        schedule: Which axis turns into noise when.
        velocity: The network.
        event_shape: Shape of one data point; ``(D,)`` by default.
        support: What the data obey, in any form that :func:`ifpyro.fit` takes; real by default.
        grid: The fine solver grid.
        coarse_steps: Steps of the cheap map under ``ifpyro.fidelity("coarse")``.
        refinements: Fixed-point iterations a step of the inverse.
        report: What training and checks measured (plain data).

    Example:
        >>> joint = torch.tensor([[1.0, 0.8], [0.8, 1.0]])  # of x and c: x | c is Normal(0.8 c, 0.6)
        >>> exact = ifpyro.ConditionalFlow.from_gaussian_mixture(
        ...     torch.ones(1), torch.zeros(1, 2), joint.unsqueeze(0), given=[1]
        ... )
        >>> exact.log_prob(torch.tensor([0.8]), torch.tensor([1.0])), dist.Normal(0.8, 0.6).log_prob(torch.tensor(0.8))
        (tensor(-0.408), tensor(-0.408))
        >>> one = exact.given(torch.tensor([1.0]))  # an InflationaryFlow
        >>> one.sample(1000, seed=0).mean(0)
        tensor([0.817])
    """

    coefficient: Tensor

    def __init__(
        self,
        conditions: Conditions,
        basis: Basis,
        coefficient: Tensor,
        schedule: Schedule,
        velocity: ConditionalVelocity,
        *,
        event_shape: Sequence[int] | None = None,
        support: Any = None,
        grid: Grid | None = None,
        coarse_steps: int = 4,
        refinements: int = 2,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.conditions, self.basis, self.schedule, self.velocity = conditions, basis, schedule, velocity
        self.register_buffer("coefficient", coefficient)
        self.event_shape = torch.Size(event_shape if event_shape is not None else (basis.dim,))
        self.chart = chart_of(as_support(support, self.event_shape), self.event_shape).to(basis.scale)
        self.report = report or {}
        schedule.check_axes(basis.principal, basis.dim)
        angles = schedule.angles(basis.scale)
        velocity.attach(basis, angles)
        self.map = DiscreteMap(velocity, angles, grid or Grid(), coarse_steps, Switches(refinements=refinements), basis)
        self.eval()
        self.requires_grad_(False)

    @classmethod
    def from_gaussian_mixture(
        cls,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        given: Sequence[int],
        schedule: Schedule | None = None,
        **options: Any,
    ) -> "ConditionalFlow":
        """The exact conditional flow of a Gaussian mixture over ``(x, c)``: nothing is trained.

        Args:
            weights: ``(K,)``, positive; normalised to sum to one.
            means: ``(K, D + p)``.
            covariances: ``(K, D + p, D + p)``, positive definite.
            given: The ``p`` columns that are the condition; the others, in their order, are the data.
            schedule: ``details_first`` by default.
            options: As for :class:`ConditionalFlow`.

        Raises:
            ValueError: If shapes do not fit, or ``given`` does not name some of the columns.
        """
        schedule = schedule or Schedule.details_first()
        basis, coefficient, inner, shift = conditional_mixture_parts(weights, means, covariances, given, schedule)
        conditions = Conditions((len(given),)).to(basis.scale)
        return cls(conditions, basis, coefficient, schedule, ConditionalVelocity(inner, shift), **options)

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def support(self) -> Constraint | None:
        """What the data obey; None for real data."""
        return located(self.chart.support, self.device)

    @property
    def condition_shape(self) -> torch.Size:
        """Shape of one condition."""
        return self.conditions.shape

    # -- one condition, or many -------------------------------------------------------------------------------------

    @full_precision()
    def given(self, c: Any) -> GivenFlow:
        """The flow of ``x | c``.

        Args:
            c: One condition, of shape ``condition_shape``, or many, ``(*B, *condition_shape)``. Of a tensor that
                requires gradients, they flow through what the flow computes.

        Returns:
            Of one condition an :class:`InflationaryFlow`, as fast as one without conditions. Of many a batch of them,
            whose distribution has batch shape ``B``.

        Raises:
            TypeError: If conditions are not numbers.
            ValueError: On another shape, unseen labels, or missing entries where training had none.
        """
        c = self.conditions.check(c, self.dtype, self.device)
        features = self.conditions(c)
        mean = self.basis.mean + features @ self.coefficient
        batch = features.shape[:-1]
        shift = self.velocity.shift(self._known(c, features).reshape(batch.numel(), -1))
        return GivenFlow(
            self.basis.with_mean(mean),
            self.schedule,
            self.velocity.inner,
            shift.reshape(*batch, shift.shape[-1]),
            self.map,
            self.event_shape,
            self.chart,
            self.report,
        )

    def encode(self, x: Tensor, c: Any, *, batch_size: int | None = None) -> Tensor:
        """Latents of data ``(*batch, *event_shape)`` under conditions ``(*batch, *condition_shape)``."""
        return self.given(c).encode(x, batch_size=batch_size)

    def decode(self, z: Tensor, c: Any, *, batch_size: int | None = None) -> Tensor:
        """Data of latents ``(*batch, latent_dim)`` under conditions ``(*batch, *condition_shape)``."""
        return self.given(c).decode(z, batch_size=batch_size)

    def encode_and_log_det(self, x: Tensor, c: Any, *, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """``z`` and ``log|det dz/dx|``, ``(*batch,)``, in one solve."""
        return self.given(c).encode_and_log_det(x, batch_size=batch_size)

    def decode_and_log_det(self, z: Tensor, c: Any, *, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """``x`` and ``log|det dx/dz|``, ``(*batch,)``, in one solve."""
        return self.given(c).decode_and_log_det(z, batch_size=batch_size)

    def log_prob(self, x: Tensor, c: Any, *, batch_size: int | None = None) -> Tensor:
        """Log-density of ``x`` given ``c`` in nats, ``(*batch,)``."""
        return self.given(c).log_prob(x, batch_size=batch_size)

    def sample(
        self, c: Any, shape: Sequence[int] | int = (), *, seed: int | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Draws ``(*shape, *batch, *event_shape)`` under conditions ``(*batch, *condition_shape)``."""
        return self.given(c).sample(shape, seed=seed, batch_size=batch_size)

    # -- Pyro -------------------------------------------------------------------------------------------------------

    def prior(self, c: Any) -> "dist.TransformedDistribution":
        """The flow of ``x | c`` as a distribution to put in a Pyro model, of the conditions' batch shape.

        ::

            with pyro.plate("objects", len(c)):
                x = pyro.sample("x", flow.prior(c))
        """
        return self.given(c).prior()

    def transform(self) -> ConditionalFlowTransform:
        """The map from latent to data as a Pyro ``ConditionalTransformModule``: ``.condition(c)`` is a transform."""
        return ConditionalFlowTransform(self)

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the flow to one safetensors file, atomically; :func:`ifpyro.load` reads it."""
        header = {
            "schedule": self.schedule.to_dict(),
            "network": self.velocity.spec(),
            "condition": self.conditions.spec(),
            "event_shape": list(self.event_shape),
            "support": None if self.support is None else support_to_dict(self.support),
            "grid": asdict(self.grid),
            "coarse_steps": self.coarse_steps,
            "refinements": self.refinements,
            "exact_up_to": self.exact_up_to,
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "report": self.report,
        }
        write_tensors(path, self.state_dict(), "flow", header)

    # -- internals --------------------------------------------------------------------------------------------------

    def _known(self, c: Tensor, features: Tensor) -> Tensor:
        """What the network is told of conditions."""
        if self.velocity.shift.takes == "features":
            return features
        return self.conditions.inputs(c).reshape(*features.shape[:-1], -1)

    def _apply(self, fn: Any, recurse: bool = True) -> "ConditionalFlow":
        self.map.clear()  # its tensors have the old dtype and device
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; the scales decide the angles and embeddings, which are recomputed."""
        result = super().load_state_dict(*args, **kwargs)
        self.map.clear()
        self.map.angles = self.schedule.angles(self.basis.scale)
        self.velocity.attach(self.basis, self.map.angles)
        return result

    def extra_repr(self) -> str:
        """Shapes and solver."""
        return (
            f"event_shape={tuple(self.event_shape)}, condition_shape={tuple(self.condition_shape)}, "
            f"latent_dim={self.latent_dim}, grid={self.grid}"
        )
