"""A chart as torch and Pyro know such things: a constraint, and the transform onto it."""

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

from .charts import Chart
from .parts import in_words


class Inside(constraints.Constraint):
    """The inside of a chart's support, as a constraint on events: what Pyro is told of a flow's values."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        """Axes of an event."""
        return len(self.chart.event_shape)

    def check(self, value: Tensor) -> Tensor:
        """Which data are strictly inside, ``(*batch,)``."""
        return self.chart.inside(value)

    def __repr__(self) -> str:
        return f"Inside({in_words(self.chart.support)})"


class ChartTransform(Transform):
    """A chart as a torch transform."""

    bijective = True

    def __init__(self, chart: Chart, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.chart = chart

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """Real numbers in the shape of an unconstrained event."""
        return constraints.independent(constraints.real, len(self.chart.free_shape))

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """The inside of the support."""
        return Inside(self.chart)

    def with_cache(self, cache_size: int = 1) -> "ChartTransform":
        """The same chart with another cache size."""
        return self if cache_size == self._cache_size else ChartTransform(self.chart, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return self.chart.from_free(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.chart.to_free(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|``, ``(*batch,)``."""
        return self.chart.log_det(x, y)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, *free_shape)`` to ``(*batch, *event_shape)``."""
        return torch.Size([*shape[: len(shape) - len(self.chart.free_shape)], *self.chart.event_shape])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """``(*batch, *event_shape)`` to ``(*batch, *free_shape)``."""
        return torch.Size([*shape[: len(shape) - len(self.chart.event_shape)], *self.chart.free_shape])


@biject_to.register(Inside)
@transform_to.register(Inside)
def _transform_onto(inside: Inside) -> ChartTransform:
    return ChartTransform(inside.chart)
