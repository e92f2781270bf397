r"""The inflationary flow: data to Gaussian latent and back, with its density.

The model is the *discrete* map from latent to data,

.. math:: x = b(\mu + W (s \odot v)), \qquad v = T(z), \qquad z \sim N(0, I),

``T`` being the fixed-grid solve of :mod:`ifpyro.flow.solver.steps` towards the data, ``(mu, W, s)`` the data's mean,
eigenvectors and standard deviations, and ``b`` the bijection onto a constrained support (identity without one).
``encode`` inverts that map to rounding, and every log-determinant is the map's own.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.constraints import Constraint

from ..core.arguments import check_integer, check_seed, check_shape, check_type
from ..core.files import check_writable, write_tensors
from ..core.messages import warn
from ..data.arrays import as_real
from ..data.constrained import ChartTransform
from ..data.parts import chart_of, located
from ..data.support import as_support, support_to_dict
from .axes.basis import Basis
from .axes.schedule import Schedule
from .decoder import Decoder
from .distribution import FlowTransform, flow_prior
from .mapped import Mapped
from .networks.mixture import mixture_parts
from .networks.velocity import Velocity
from .solver.compiled import try_compiled
from .solver.discrete_map import DiscreteMap, Switches, in_parts
from .solver.grid import Grid
from .solver.traces import trace_maker
from .trajectory import participation_ratio, rescaled_path

if TYPE_CHECKING:
    import pyro.distributions as dist


class LogProbEstimate(NamedTuple):
    """A log-density and how well it is known.

    Attributes:
        value: nats, shape ``(*batch,)``.
        standard_error: of ``value``, by the spread of independent estimates; zero where the value is exact. With ``p``
            estimates it has ``p - 1`` degrees of freedom: few of them call for Student's quantiles.

    Example:
        >>> value, error = flow.log_prob_estimate(torch.zeros(3, 2))
        >>> value.shape, error.max()
        (torch.Size([3]), tensor(0.))
    """

    value: Tensor
    standard_error: Tensor


class InflationaryFlow(Mapped, nn.Module):
    """An invertible map between data ``x`` and a latent ``z ~ N(0, I)``, with densities.

    Usually made by :func:`ifpyro.fit` or :func:`ifpyro.load`. Shapes are ``(*batch, *event_shape)`` for ``x`` and
    ``(*batch, latent_dim)`` for ``z``, everywhere.

    Args:
        basis: mean, rotation and scales of the (unconstrained, flattened) data.
        schedule: which axis turns into noise when.
        velocity: the network, or any :class:`~ifpyro.flow.networks.velocity.Velocity`.
        event_shape: shape of one data point; ``(D,)`` by default.
        support: what the data obey, in any form that :func:`ifpyro.fit` takes; real by default.
        grid: the fine solver grid, the map that *is* the model.
        coarse_steps: steps of the cheap map used under ``ifpyro.fidelity("coarse")``.
        refinements: fixed-point iterations per step of the inverse in single precision; a flow in double precision
            makes two more. Up to 128 axes, rows that they do not close are solved by Newton's method.
        report: what training and checks measured (plain data).

    Attributes:
        gradient_checkpointing: False by default. If set, gradients in ``x`` and ``z`` run every solver step a second
            time instead of remembering its activations: one state a step is kept, whatever the network. In the gradient
            of ``decode`` every evaluation within a step runs a third time, so that activations of one are ever held.
        exact_up_to: axes up to which log-determinants are exact, 128 by default. Beyond, they are estimated with signs
            that are the same in every call (see :mod:`ifpyro.flow.solver.traces`).
        cuda_graphs: False by default. If set, decodes on a GPU and their gradients in ``z`` are recorded as CUDA graphs
            when batches of one size come for the third time, and played back: where networks are small, launching their
            kernels takes most of the time. Up to 24 recordings keep all their activations in memory. A network must not
            wait for the processor, and what it reads besides its arguments and weights stays as it was. For one thread
            and one stream. Log-determinants, ``encode``, checkpointed gradients, second derivatives and calls inside
            torch.func run as they always do.
        autocast: None by default. A dtype such as ``torch.bfloat16`` evaluates a single-precision flow's network in it,
            on devices where that is fast; states stay as they are. Positions and round trips are then good to about its
            precision, times what the network moves. Without it, convolutions keep out of TF32 on NVIDIA GPUs too, in
            samplers those of gradients as well.

    Example:
        >>> flow = ifpyro.InflationaryFlow.from_gaussian_mixture(
        ...     torch.tensor([0.5, 0.5]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.1 * torch.eye(2).expand(2, 2, 2)
        ... )
        >>> flow.event_shape, flow.latent_dim
        (torch.Size([2]), 2)
        >>> x = flow.sample(1000, seed=0)
        >>> z = flow.encode(x)
        >>> (flow.decode(z) - x).abs().max() < 1e-4
        tensor(True)
    """

    def __init__(
        self,
        basis: Basis,
        schedule: Schedule,
        velocity: Velocity,
        *,
        event_shape: Sequence[int] | None = None,
        support: Any = None,
        grid: Grid | None = None,
        coarse_steps: int = 4,
        refinements: int = 2,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_type("InflationaryFlow: basis", basis, Basis, "a Basis")
        check_type("InflationaryFlow: schedule", schedule, Schedule, "a Schedule, such as Schedule.preserving()")
        check_type("InflationaryFlow: velocity", velocity, Velocity, "a Velocity, such as MLP(dim)")
        check_type("InflationaryFlow: grid", grid, (Grid, NoneType), "a Grid, such as Grid(8), or None")
        axes = getattr(velocity, "dim", basis.dim)
        if axes != basis.dim:
            raise ValueError(f"expected a velocity on the {basis.dim} axes of the basis, got one on {axes}")
        self.basis = basis
        self.schedule = schedule
        self.velocity = velocity
        self.event_shape = torch.Size((basis.dim,) if event_shape is None else check_shape("event_shape", event_shape))
        self.support = support
        if self.chart.free_shape.numel() != basis.dim:
            raise ValueError(
                f"expected a basis of {self.chart.free_shape.numel()} axes for events of shape "
                f"{tuple(self.event_shape)} in this support, got {basis.dim}"
            )
        self.report = report or {}
        schedule.check_axes(basis.principal, basis.dim)
        angles = schedule.angles(basis.scale)
        velocity.attach(basis, angles)
        self.map = DiscreteMap(
            velocity, angles, grid or Grid(), coarse_steps, Switches(refinements=refinements), frame=basis
        )
        self._told_of_estimates = False
        self.eval()
        self.requires_grad_(False)

    @classmethod
    @torch.inference_mode(False)  # its tensors would be of no use outside
    def from_gaussian_mixture(
        cls,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        *,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> "InflationaryFlow":
        """The exact flow of a Gaussian mixture: nothing is trained.

        Its density is that of the smoothed mixture: at the noise floor, in standardised coordinates, component ``k``
        has mean ``c m_k`` and covariance ``c Sigma_k c + sin(theta_0)^2`` with ``c = diag(cos theta_0)``.

        Args:
            weights: ``(K,)``, positive; normalised to sum to one.
            means: ``(K, D)``.
            covariances: ``(K, D, D)``, positive definite.
            schedule: ``details_first`` by default.
            options: as for :class:`InflationaryFlow`.

        Example:
            >>> weights, means = torch.tensor([0.3, 0.7]), torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
            >>> covariances = torch.eye(2).expand(2, 2, 2)
            >>> exact = ifpyro.InflationaryFlow.from_gaussian_mixture(weights, means, covariances)
            >>> exact.log_prob(torch.tensor([0.0, 0.5]))
            tensor(-3.963)
            >>> parts = dist.MultivariateNormal(means, covariances)
            >>> dist.MixtureSameFamily(dist.Categorical(weights), parts).log_prob(torch.tensor([0.0, 0.5]))
            tensor(-3.963)
        """
        schedule = schedule or Schedule.details_first()
        basis, velocity = mixture_parts(weights, means, covariances, schedule)
        return cls(basis, schedule, velocity, **options)

    # -- shapes, dtypes, devices ------------------------------------------------------------------------------------

    @property
    def support(self) -> Constraint | None:
        """The constraint that the data obey, None for real ones; its bounds are exact, and where the flow is."""
        return located(self.chart.support, self.device)

    @support.setter
    def support(self, support: Any) -> None:
        self.chart = chart_of(as_support(support, self.event_shape), self.event_shape).to(self.basis.scale)

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch of distributions that this is: none, unless it has conditions."""
        return torch.Size()

    # -- how the map is run -----------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "velocity" and "map" in self.__dict__:  # a network put in its place drives the map from then on
            self.map.velocity = value

    # -- the map ----------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, *, batch_size: int | None = None, adaptive: float | None = None) -> Tensor:
        """Latent ``z`` of data ``x``: the inverse of :meth:`decode`, to rounding.

        Args:
            x: data, ``(*batch, *event_shape)``.
            batch_size: most rows that are solved at once, here and in what follows: it bounds memory.
            adaptive: a tolerance, such as 1e-6, to which the differential equation itself is solved with adaptive steps
                instead of the flow's own grid, here and in :meth:`decode`: an independent check of the numerics. The
                result is not the exact inverse of anything, and rows of a batch influence each other below it.

        Raises:
            ValueError: on a wrong event shape.
            TypeError: on a wrong dtype or device.

        Example:
            >>> flow.encode(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            tensor([[-0.674,  0.000],
                    [ 0.674,  0.000]])
        """
        return self._to_latent(x, False, batch_size, adaptive)[0]

    def decode(self, z: Tensor, *, batch_size: int | None = None, adaptive: float | None = None) -> Tensor:
        """Data ``x`` of latents ``z``; ``adaptive`` as in :meth:`encode`.

        Example:
            >>> flow.decode(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            tensor([[-1.150,  0.000],
                    [ 1.150,  0.000]])
        """
        return self._to_data(z, False, batch_size, adaptive)[0]

    def encode_and_log_det(self, x: Tensor, *, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """``z`` and ``log|det dz/dx|`` (shape ``(*batch,)``), in one solve.

        Example:
            >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
            >>> z, log_det = flow.encode_and_log_det(x)
            >>> dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_det
            tensor([-0.229, -0.229])
            >>> flow.log_prob(x)
            tensor([-0.229, -0.229])
        """
        return self._to_latent(x, True, batch_size)

    def decode_and_log_det(self, z: Tensor, *, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """``x`` and ``log|det dx/dz|`` (shape ``(*batch,)``), in one solve.

        Example:
            >>> z = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
            >>> x, log_det = flow.decode_and_log_det(z)
            >>> log_det
            tensor([ 2.696, -1.996])
        """
        return self._to_data(z, True, batch_size)

    def log_prob(self, x: Tensor, *, batch_size: int | None = None) -> Tensor:
        r"""Log-density ``log N(z; 0, I) + log|det dz/dx|`` in nats, shape ``(*batch,)``; ``-inf`` outside the support.

        Outside, on the boundary and at infinity its gradient is zero; of NaN it is NaN.

        Exact up to ``exact_up_to`` axes, 128 by default. Beyond, an estimate whose random signs are the same in every
        call: smooth, repeatable, and off by an amount that grows with the number of axes, often a good part of a nat,
        and differs from row to row. A warning says so, once for every flow; :meth:`log_prob_estimate` tells the
        standard error, and ``flow.exact_up_to = flow.latent_dim`` makes it exact, at the price of that many products of
        the Jacobian in every step.

        Example:
            >>> flow.log_prob(torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
            tensor([-0.229, -4.534])
        """
        if self.latent_dim > self.exact_up_to and not self._told_of_estimates:
            self._told_of_estimates = True
            warn(
                f"log_prob of a flow of {self.latent_dim} axes is an estimate: log_prob_estimate tells its standard "
                f"error, and flow.exact_up_to = {self.latent_dim} makes it exact"
            )
        settled, inside, outside = self._settled(x)
        z, log_det = self.encode_and_log_det(settled, batch_size=batch_size)
        return torch.where(inside, log_normal(z) + log_det, outside)

    def log_prob_estimate(
        self,
        x: Tensor,
        *,
        probes: int = 24,
        method: str = "hutchinson",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> LogProbEstimate:
        """Log-density of many axes with its standard error; exact, as :meth:`log_prob`, up to ``exact_up_to`` axes.

        Args:
            x: data, ``(*batch, *event_shape)``.
            probes: products of the Jacobian at every evaluation of the velocity.
            method: ``"hutchinson"``, or ``"hutch++"``, which pays where the Jacobian has a few dominant directions
                (see :mod:`ifpyro.flow.solver.traces`).
            seed: of the random vectors, which differ from row to row.
            batch_size: most rows at once.

        Returns:
            ``value`` and ``standard_error``, each ``(*batch,)``, without gradients.

        Raises:
            ValueError: on an unknown method, or too few probes to have a spread.

        Example:
            >>> estimate = flow.log_prob_estimate(torch.tensor([-1.0, 0.0]))
            >>> estimate.value, estimate.standard_error  # exact, since 2 axes are few
            (tensor(-0.229), tensor(0.))
        """
        generator = torch.Generator(self.device).manual_seed(check_seed(seed))

        def estimate(through: DiscreteMap, rows: Tensor) -> tuple[Tensor, ...]:
            return through.estimate(rows, probes=probes, method=method, generator=generator)

        trace_maker(method, probes, self.latent_dim, generator)  # refuses wrong arguments, exact or not
        with torch.no_grad():
            if self.latent_dim <= self.exact_up_to:
                exact = self.log_prob(x, batch_size=batch_size)
                return LogProbEstimate(exact, torch.zeros_like(exact))
            settled, inside, outside = self._settled(x)
            v, batch, log_det_inside = self.standardise(settled, with_log_det=True)
            z, log_det, error = self._solve(estimate, v, batch, batch_size)
            value = (log_normal(z) - log_det).reshape(batch) - self.basis.log_det() - log_det_inside
            error = torch.where(inside, error.reshape(batch), 0.0)
        return LogProbEstimate(torch.where(inside, value, outside), error)

    def sample(
        self, shape: Sequence[int] | int = (), *, seed: int | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Draws of shape ``(*shape, *event_shape)``; ``seed`` makes them repeatable.

        Raises:
            ValueError: if the shape is not of integers, or the seed out of range.

        Example:
            >>> flow.sample(3, seed=0)
            tensor([[ 1.366, -0.093],
                    [-1.598,  0.180],
                    [-1.186, -0.442]])
            >>> flow.sample((5, 4)).shape
            torch.Size([5, 4, 2])
        """
        shape = check_shape("sample", shape)
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(check_seed(seed))
        size = (*shape, *self.batch_shape, self.latent_dim)
        z = torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return self.decode(z, batch_size=batch_size)

    def decoder(self, k: int) -> "Decoder":
        """A map from the first ``k`` latents to data, the remaining latents at their mean, zero.

        Returns:
            A callable from ``(*batch, k)`` to ``(*batch, *event_shape)`` that knows the measured share of the variance
            that it loses, ``.reconstruction_error``.

        Raises:
            ValueError: if ``k`` is not in ``1..latent_dim``.

        Example:
            >>> decoder = flow.decoder(1)
            >>> decoder(torch.tensor([[-1.0], [0.0], [1.0]]))
            tensor([[-1.150,  0.000],
                    [ 0.000,  0.000],
                    [ 1.150,  0.000]])
        """
        return Decoder(self, check_integer("decoder", k, 1, self.latent_dim, "latents"))

    def trajectory(self, x: Tensor, steps: int = 32) -> tuple[Tensor, Tensor]:
        """The path of ``x`` through the paper's rescaled coordinates (see :mod:`ifpyro.flow.trajectory`).

        Args:
            x: data, ``(*batch, *event_shape)``.
            steps: number of solver steps of the grid to walk.

        Returns:
            Angles' times ``(steps + 1,)`` and positions ``(steps + 1, *batch, latent_dim)`` in the eigenbasis.

        Example:
            >>> times, path = flow.trajectory(flow.sample(10, seed=0), steps=8)
            >>> times.shape, path.shape
            (torch.Size([9]), torch.Size([9, 10, 2]))
        """
        grid = replace(self.grid, steps=steps)
        v, batch, _ = self.standardise(x)
        times, path = rescaled_path(self.map, self.basis.scale, v, grid)
        return times, path.reshape(len(times), *batch, self.latent_dim)

    def participation_ratio(self, t: Tensor | None = None) -> Tensor:
        """The dimension ``PR = (sum s^2)^2 / sum s^4`` of the rescaled covariance, at times ``t`` (1 by default).

        Source: de Albuquerque & Pearson 2024, section 3; constant in a preserving flow.

        Example:
            >>> flow.participation_ratio(torch.tensor([0.0, 1.0]))
            tensor([1.180, 2.000], dtype=torch.float64)
        """
        t = torch.ones(1, dtype=torch.double) if t is None else as_real(t, "t", torch.double)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"participation_ratio expects times in [0, 1], got {t.tolist()}")
        return participation_ratio(self.angles, self.basis.scale, t).squeeze()

    def compile(self, *, rows: int = 64, **options: Any) -> float:  # type: ignore[override]
        """Compile the solver step of :meth:`decode` and of its gradient, for this session; needs a C++ compiler.

        Results agree with those of the uncompiled flow to rounding. Log-determinants, ``encode``, calls inside
        torch.func, gradient checkpointing and, until the next call, another ``autocast`` stay uncompiled.

        Args:
            rows: batch size with which it is tried; other sizes share the compiled code. One row, and steps of another
                Runge-Kutta method (those of a sampler's guides), are compiled when they first come.
            options: for ``torch.compile``; ``dynamic=True`` by default.

        Returns:
            Seconds that compilation took.

        Raises:
            RuntimeError: from torch, if the compiler is missing or fails; the flow then stays uncompiled.
        """
        rows = check_integer("compile: rows", rows, 1, 2**31)
        began = time.perf_counter()
        self.map.compile(options)
        try:
            try_compiled(self.decode, torch.zeros(rows, self.latent_dim, dtype=self.dtype, device=self.device))
        except Exception:
            self.map.compiled_take = None
            raise
        return time.perf_counter() - began

    # -- Pyro -------------------------------------------------------------------------------------------------------

    def transform(self, cache_size: int = 0) -> "FlowTransform":
        """The map from latent to data as a Pyro transform.

        Example:
            >>> transform = flow.transform()
            >>> x = transform(torch.zeros(2))
            >>> transform.log_abs_det_jacobian(torch.zeros(2), x)
            tensor(2.696)
        """
        return FlowTransform(self, cache_size=cache_size)

    def prior(self) -> "dist.TransformedDistribution":
        """The flow as a distribution to put in a Pyro model.

        Example:
            >>> prior = flow.prior()
            >>> prior.event_shape, prior.sample((5,)).shape
            (torch.Size([2]), torch.Size([5, 2]))
            >>> prior.log_prob(torch.tensor([-1.0, 0.0]))
            tensor(-0.229)
        """
        return flow_prior(self)

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the flow to one safetensors file, atomically, with every setting that changes numbers.

        What only changes how they are computed (``gradient_checkpointing``, ``cuda_graphs``, a compiled step) is not
        kept.

        Example:
            >>> trained = ifpyro.fit(flow.sample(200, seed=0), max_steps=10, seed=0, progress=False)
            >>> trained.save("prior.safetensors")
            >>> ifpyro.load("prior.safetensors").event_shape
            torch.Size([2])
        """
        path = check_writable(path)
        header = {
            "schedule": self.schedule.to_dict(),
            "network": self.velocity.spec(),
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

    # -- in standardised coordinates, for those who measure the numerics ---------------------------------------------

    def standardise(self, x: Tensor, with_log_det: bool = False) -> tuple[Tensor, torch.Size, Tensor | float]:
        """Standardised coordinates ``v`` of data, ``(n, D)``; the batch shape; and the support's log-determinant."""
        x = self._checked(x, self.event_shape, "x")
        free, inside = self.chart.unconstrain(x, with_log_det)
        return self.basis.to_standard(free).reshape(-1, self.latent_dim), free.shape[:-1], inside

    def evaluated_velocity(self) -> Velocity:
        """The velocity in the precision in which it is evaluated."""
        return self.map.evaluated_velocity()

    # -- internals --------------------------------------------------------------------------------------------------

    def _to_data(
        self, z: Tensor, with_log_det: bool, batch_size: int | None, adaptive: float | None = None
    ) -> tuple[Tensor, Tensor]:
        z = self._checked(z, torch.Size([self.latent_dim]), "z")
        batch = z.shape[:-1]
        solve = partial(DiscreteMap.to_data, log_det=with_log_det)
        if adaptive is not None:
            solve = partial(DiscreteMap.adaptive, to_data=True, tolerance=adaptive)
        v, log_det = self._solve(solve, z.reshape(-1, self.latent_dim), batch, batch_size)
        free = self.basis.from_standard(v.reshape(*batch, self.latent_dim))
        x, inside = self.chart.constrain(free, with_log_det)
        return x, log_det.reshape(batch) + self.basis.log_det() + inside if with_log_det else log_det

    def _to_latent(
        self, x: Tensor, with_log_det: bool, batch_size: int | None, adaptive: float | None = None
    ) -> tuple[Tensor, Tensor]:
        v, batch, inside = self.standardise(x, with_log_det)
        solve = partial(DiscreteMap.to_latent, log_det=with_log_det)
        if adaptive is not None:
            solve = partial(DiscreteMap.adaptive, to_data=False, tolerance=adaptive)
        z, log_det = self._solve(solve, v, batch, batch_size)
        z = z.reshape(*batch, self.latent_dim)
        return z, -(log_det.reshape(batch) + self.basis.log_det() + inside) if with_log_det else log_det

    def _solve(
        self, solve: Callable[..., tuple[Tensor, ...]], rows: Tensor, batch: torch.Size, batch_size: int | None
    ) -> tuple[Tensor, ...]:
        """A solve of the map for the rows ``(n, D)`` of a batch, at most so many at once."""
        return in_parts(partial(solve, self.map), rows, batch_size)

    def of_rows(self, rows: Tensor) -> "InflationaryFlow":
        """The flow of some rows of a batch, by their indices: itself, unless it has conditions."""
        return self

    def bijection(self) -> Transform | None:
        """From unconstrained space onto the support, or None for real data."""
        return None if self.chart.is_real else ChartTransform(self.chart)

    def _settled(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Data with a point inside the support in place of those that are not, which were, and the others' density."""
        x = self._checked(x, self.event_shape, "x")
        settled, inside = self.chart.settled(x)
        missing = x.isnan().flatten(inside.ndim).any(-1) if self.event_shape else x.isnan()
        return settled, inside, torch.where(missing, math.nan, -math.inf).to(x)

    def _checked(self, value: Any, event: torch.Size, name: str) -> Tensor:
        """A tensor of the flow's; arrays, tables and lists become one, as they do in training."""
        if not isinstance(value, Tensor):
            value = as_real(value, name, self.dtype).to(self.device)
        if value.layout != torch.strided:
            raise TypeError(f"expected {name} to be a dense tensor, got layout {value.layout}; use {name}.to_dense()")
        if value.dtype != self.dtype or value.device != self.device:
            raise TypeError(
                f"expected {name} as {self.dtype} on {self.device}, got {value.dtype} on {value.device}; convert with "
                f"{name}.to(flow.device, flow.dtype), or move the flow with flow.to(...)"
            )
        if value.shape[value.ndim - len(event) :] != event or value.ndim < len(event):
            raise ValueError(
                f"expected {name} of shape (*batch, {', '.join(map(str, event))}), got {tuple(value.shape)}"
            )
        return value

    def train(self, mode: bool = True) -> "InflationaryFlow":
        """Stays as it is: a flow is a fixed map, which dropout that a parent module switches on would make random."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InflationaryFlow":
        self.map.clear()  # its tensors have the old dtype and device
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; the scales decide the angles and embeddings, which are recomputed."""
        result = super().load_state_dict(*args, **kwargs)
        self.map.clear()
        self.map.angles = self.schedule.angles(self.basis.scale)
        self.velocity.attach(self.basis, self.angles)
        return result

    def extra_repr(self) -> str:
        """Event shape, latent dimension and solver."""
        return f"event_shape={tuple(self.event_shape)}, latent_dim={self.latent_dim}, grid={self.grid}"


def log_normal(z: Tensor) -> Tensor:
    """Log-density of ``N(0, I)`` at ``z`` of shape ``(*batch, D)``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
