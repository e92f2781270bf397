r"""Sampling that starts from another density than the prior: a flow that already knows the posterior roughly.

With ``g`` a normalised density over the model's unconstrained vector ``q``, the model

.. math:: p(q)\,L(q) = g(q) \cdot \frac{p(q)\,L(q)}{g(q)}

has the same posterior and the same evidence as prior ``p`` and likelihood ``L``, but tempering starts at ``g``: where
``g`` is nearly the posterior, weights ``p L / g`` are nearly constant and one importance sampling step is all there is;
where it is not, temperatures lead from it to the posterior.

``g`` is a mixture: a flow ``T``; the same flow of a widened latent ``N(0, w^2 I)``, because a learned posterior's tails
are lighter than the truth's; and the model's own prior, so that nothing that the prior allows is left out.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.errors import ModelError
from ...flow.flow import log_normal
from ...flow.solver.fidelity import fidelity
from ..model.batched import BatchedModel
from ..model.density import BatchedDensity

WIDER = 1.5
"""Standard deviation of the widened latent."""


class Start(Protocol):
    """A flow over ``q``."""

    event_shape: torch.Size

    @property
    def latent_dim(self) -> int:
        """Of its latent."""
        ...

    @property
    def batch_shape(self) -> torch.Size:
        """Of its conditions."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Data of latents."""
        ...

    def encode_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of data, and their log-determinant."""
        ...


class StartedDensity:
    """A model's density as `ifpyro.infer.model.density.BatchedDensity` whose "prior" is the mixture ``g``.

    Args:
        density: The model; with many data sets, rows come in one run for each.
        start: A flow over ``q``; of a batch of as many conditions as there are data sets.
        defensive: Share of ``g`` that is not the flow itself: half of it is the flow of a widened latent, half the
            model's prior.

    Raises:
        ValueError: If the flow is not one over ``q``, or the share not in ``[0, 1)``.
    """

    gaussian_prior = False

    def __init__(self, density: BatchedDensity, start: Start, defensive: float = 0.1) -> None:
        if isinstance(defensive, bool) or not isinstance(defensive, int | float) or not 0 <= defensive < 1:
            raise ValueError(f"defensive expects a share in [0, 1), got {defensive!r}")
        families = getattr(density, "families", 1)
        if start.latent_dim != density.dim or start.batch_shape.numel() != families:
            wanted = f"{families} conditions" if families > 1 else "one condition"
            raise ValueError(
                f"start expects a flow over the model's {density.dim} unconstrained dimensions, of {wanted}; got one "
                f"of {start.latent_dim} dimensions and {start.batch_shape.numel()} conditions"
            )
        self.density, self.start, self.dim = density, start, density.dim
        self.families = families
        self.latents = getattr(density, "latents", ())
        self.device = getattr(density, "device", start.device)
        self.dtype = getattr(density, "dtype", start.dtype)
        self.batching = getattr(density, "batching", None)
        self._to_x, self._to_q = _coordinates(density, start)
        self._shares = (1.0 - defensive, defensive / 2, defensive / 2)

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``(log g, log p + log L - log g)``, each ``(n,)``."""
        log_prior, log_likelihood = self.density(q)
        start = self.log_start(q, log_prior)
        return start, log_prior + log_likelihood - start

    def log_start(self, q: Tensor, log_prior: Tensor) -> Tensor:
        """``log g(q)``, given the model's log-prior there."""
        x, log_det_x = self._to_x(q.to(self.start.dtype))
        z, log_det = self.start.encode_and_log_det(self._by_condition(x))
        whole = self._by_row((log_det + log_normal(z)).unsqueeze(-1)).squeeze(-1)
        wide = log_normal(z / WIDER) - self.dim * math.log(WIDER) + log_det
        wide = self._by_row(wide.unsqueeze(-1)).squeeze(-1)
        parts = [whole + log_det_x, wide + log_det_x, log_prior.to(whole)]
        weighed = [part + math.log(share) for part, share in zip(parts, self._shares, strict=True) if share]
        return torch.stack(weighed).logsumexp(0).to(q)

    def sample_prior(self, num: int, generator: torch.Generator) -> Tensor:
        """Exact draws of ``g``, ``(num, dim)``."""
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        # Stratified: the shares are kept, which only lowers the variance of what weights estimate.
        u = torch.rand(num, **options)
        wide = (u >= self._shares[0]) & (u < self._shares[0] + self._shares[1])
        z = torch.randn(num, self.dim, dtype=self.start.dtype, **options).to(self.start.device)
        z = torch.where(wide.to(z.device)[:, None], WIDER * z, z)
        with torch.no_grad(), fidelity("fine"):
            x = self._by_row(self.start.decode(self._by_condition(z)).reshape(*self._lead(num), -1))
            q = self._to_q(x).to(device=self.device, dtype=self.dtype)
            if not self._shares[2]:
                return q
            prior = self.density.sample_prior(num, generator)
        return torch.where((u >= 1 - self._shares[2]).to(q.device)[:, None], prior, q)

    def sites(self, q: Tensor) -> dict[str, Tensor]:
        """See `BatchedDensity.sites`."""
        return self.density.sites(q)

    def _lead(self, num: int) -> tuple[int, ...]:
        return (num // self.families, self.families) if self.families > 1 else (num,)

    def _by_condition(self, rows: Tensor) -> Tensor:
        """Rows ``(n, ...)``, one run for each condition, as ``(n / S, S, ...)``."""
        if self.families == 1:
            return rows.reshape(len(rows), *(1,) * len(self.start.batch_shape), *rows.shape[1:])
        return rows.unflatten(0, (self.families, -1)).transpose(0, 1)

    def _by_row(self, value: Tensor) -> Tensor:
        """The inverse of `_by_condition` for ``(n / S, S, k)``."""
        if self.families == 1:
            return value.reshape(len(value), value.shape[-1])
        return value.transpose(0, 1).flatten(0, 1)


_Maps = tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]]


def _coordinates(density: BatchedDensity, start: Start) -> _Maps:
    """From ``q`` to what the flow is over, with the log-determinant, and back."""
    if _is_real(start):

        def as_it_is(q: Tensor) -> tuple[Tensor, Tensor]:
            return q.reshape(len(q), *start.event_shape), q.new_zeros(len(q))

        return as_it_is, lambda x: x.reshape(len(x), -1)
    sites = density.layout.latents if isinstance(density, BatchedModel) else {}
    site = next(iter(sites.values())) if len(sites) == 1 else None
    if site is None or site.transform is None or site.batch_shape + site.event_shape != start.event_shape:
        raise ModelError(
            "start expects a flow over the model's unconstrained vector, or one over the value of its only latent "
            f"site; got a flow over {tuple(start.event_shape)} with a support, for the sites {list(sites)}; train it "
            "on unconstrained values, or use ifpyro.amortise(model)"
        )
    transform, shape = site.transform, site.batch_shape + site.unconstrained_event_shape

    def constrained(q: Tensor) -> tuple[Tensor, Tensor]:
        free = q.reshape(len(q), *shape)
        x = transform(free)
        log_det = transform.log_abs_det_jacobian(free, x)
        return x, log_det.reshape(len(q), -1).sum(-1)

    return constrained, lambda x: transform.inv(x.reshape(len(x), *start.event_shape)).reshape(len(x), -1)


def _is_real(start: Any) -> bool:
    chart = getattr(start, "chart", None)
    return chart is None or bool(chart.is_real)
