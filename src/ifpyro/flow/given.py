"""A conditional flow at conditions that are known: one flow, or a batch of them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.arguments import check_count
from ..data.charts import Chart
from .axes.basis import Basis
from .axes.schedule import Schedule
from .flow import InflationaryFlow
from .networks.conditional import GivenVelocity
from .networks.velocity import Velocity
from .solver.discrete_map import DiscreteMap


class GivenFlow(InflationaryFlow):
    """The flow of ``x | c``, for one condition or a batch of them; made by :meth:`ifpyro.ConditionalFlow.given`.

    For one condition it is a flow like any other, as fast as one, to sample from, to put in a model, to save. For
    conditions of shape ``(*B, *shape)`` it is a batch of flows: the batch shape of ``x`` and ``z`` ends in ``B``, or
    broadcasts to it. It shares its network with the conditional flow. Gradients reach the conditions.

    Args:
        basis: Axes about the mean of each condition, ``(*B, D)``.
        schedule: Of the conditional flow.
        velocity: Of time and state.
        shift: Of its embedding, ``(*B, E)``.
        through: The map of the conditional flow.
        event_shape: Of a data point.
        chart: Of the support.
        report: Of the conditional flow.
    """

    velocity: GivenVelocity

    def __init__(
        self,
        basis: Basis,
        schedule: Schedule,
        velocity: Velocity,
        shift: Tensor,
        through: DiscreteMap,
        event_shape: torch.Size,
        chart: Chart,
        report: dict[str, Any],
    ) -> None:
        nn.Module.__init__(self)  # what an InflationaryFlow computes from its parts is shared here
        self._batch_shape = shift.shape[:-1]
        self.basis, self.schedule = basis, schedule
        self.velocity = GivenVelocity(velocity, shift if shift.ndim == 1 else shift.reshape(-1, shift.shape[-1]))
        self.event_shape, self.chart, self.report = event_shape, chart, report
        self.map = through.driven_by(self.velocity, basis)
        self.training = self.velocity.training = False

    @property
    def batch_shape(self) -> torch.Size:
        """Shape ``B`` of the conditions."""
        return self._batch_shape

    def of_rows(self, rows: Tensor) -> "GivenFlow":
        """The flows of some of the conditions, by their indices in the flattened batch: batch shape ``(len(rows),)``.

        A flow of one condition is that of all rows.
        """
        if not self.batch_shape:
            return self
        mean = self.basis.mean.reshape(-1, self.latent_dim)[rows]
        shift = self.velocity.shift[rows]
        basis = self.basis.with_mean(mean)
        parts = (self.event_shape, self.chart, self.report)
        return GivenFlow(basis, self.schedule, self.velocity.inner, shift, self.map, *parts)

    def standardise(self, x: Tensor, with_log_det: bool = False) -> tuple[Tensor, torch.Size, Tensor | float]:
        """See :meth:`InflationaryFlow.standardise`."""
        x = self._checked(x, self.event_shape, "x")
        return super().standardise(self._spread(x, len(self.event_shape)), with_log_det)

    def save(self, path: str | Path) -> None:
        """Write the flow of one condition to a file, from which :func:`ifpyro.load` reads an ordinary flow.

        Raises:
            ValueError: If there are several conditions.
        """
        if self.batch_shape:
            raise ValueError(
                f"save expects the flow of one condition, got a batch of shape {tuple(self.batch_shape)}; save the "
                "conditional flow itself, or flow.given(c[i])"
            )
        super().save(path)

    def _to_data(
        self, z: Tensor, with_log_det: bool, batch_size: int | None, adaptive: float | None = None
    ) -> tuple[Tensor, Tensor]:
        z = self._checked(z, torch.Size([self.latent_dim]), "z")
        return super()._to_data(self._spread(z, 1), with_log_det, batch_size, adaptive)

    def _spread(self, value: Tensor, event_dim: int) -> Tensor:
        """A value for every condition."""
        if not self.batch_shape:
            return value
        cut = value.ndim - event_dim
        try:
            batch = torch.broadcast_shapes(value.shape[:cut], self.batch_shape)
        except RuntimeError as error:
            raise ValueError(
                f"expected a batch shape that fits the conditions' {tuple(self.batch_shape)}, got "
                f"{tuple(value.shape[:cut])}; many draws of each go to the left of it, (draws, *conditions)"
            ) from error
        return value.expand(*batch, *value.shape[cut:])

    def _solve(
        self, solve: Callable[..., tuple[Tensor, ...]], rows: Tensor, batch: torch.Size, batch_size: int | None
    ) -> tuple[Tensor, ...]:
        conditions, through = self.batch_shape, self.map
        if conditions and batch[len(batch) - len(conditions) :] != conditions:  # a condition serves several rows
            index = torch.arange(conditions.numel(), device=rows.device).reshape(conditions).expand(batch)
            through = through.of_rows(index.reshape(-1))
        if not conditions:
            return super()._solve(solve, rows, batch, batch_size)
        if batch_size is None:
            return solve(through, rows)
        index = torch.arange(len(rows), device=rows.device)
        parts = [
            solve(through.of_rows(part), rows[part]) for part in index.split(check_count("batch_size", batch_size, 1))
        ]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GivenFlow":
        # What is shared with the conditional flow stays where it is.
        self.basis, self.velocity = copy.deepcopy(self.basis), copy.deepcopy(self.velocity)
        self.map = DiscreteMap(
            self.velocity, self.angles, self.grid, self.coarse_steps, self.map.switches, frame=self.basis
        )
        super()._apply(fn, recurse)
        return self
