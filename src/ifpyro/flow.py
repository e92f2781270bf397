r"""The inflationary flow: data to Gaussian latent and back, with its density.

The model is the *discrete* map from latent to data,

.. math:: x = b(\mu + W (s \odot v)), \qquad v = T(z), \qquad z \sim N(0, I),

``T`` being the fixed-grid solve of :mod:`ifpyro.ode` towards the data, ``(mu, W, s)`` the data's mean, eigenvectors and
standard deviations, and ``b`` the bijection onto a constrained support (identity without one). ``encode`` inverts that
map to rounding, and every log-determinant is the map's own.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.constraints import Constraint

from .basis import Basis
from .fidelity import current_fidelity
from .inverse import invert
from .ode import (
    Grid,
    Solver,
    Step,
    Tableau,
    build_solver,
    solve_adaptive,
    take,
    take_with_log_det,
    take_with_probes,
)
from .recompute import recompute
from .schedule import Angles, Schedule
from .support import unconstrained_to
from .velocity import GaussianMixtureVelocity, Velocity

if TYPE_CHECKING:
    import pyro.distributions as dist

    from .prior import FlowTransform
    from .reconstruction import Decoder

EXACT_UP_TO = 128  # axes; beyond, one Jacobian an evaluation costs more than a trained flow's own accuracy is worth


class InflationaryFlow(nn.Module):
    """An invertible map between data ``x`` and a latent ``z ~ N(0, I)``, with densities.

    Usually made by :func:`ifpyro.fit` or :func:`ifpyro.load`. Shapes are ``(*batch, *event_shape)`` for ``x`` and
    ``(*batch, latent_dim)`` for ``z``, everywhere.

    Args:
        basis: mean, rotation and scales of the (unconstrained, flattened) data.
        schedule: which axis turns into noise when.
        velocity: the network, or any :class:`~ifpyro.velocity.Velocity`.
        event_shape: shape of one data point; ``(D,)`` by default.
        support: a torch constraint that the data obey; real by default.
        grid: the fine solver grid, the map that *is* the model.
        coarse_steps: steps of the cheap map used under ``ifpyro.fidelity("coarse")``.
        refinements: fixed-point iterations per step of the inverse in single precision; a flow in double precision
            makes two more. Up to 128 axes, rows that they do not close are solved by Newton's method.
        report: what training and checks measured (plain data).

    Attributes:
        gradient_checkpointing: False by default. If set, gradients in ``x`` and ``z`` run every solver step a second
            time instead of remembering its activations: one state a step is kept, whatever the network. In the gradient
            of ``decode`` every evaluation within a step runs a third time, so that activations of one are ever held.
    """

    def __init__(
        self,
        basis: Basis,
        schedule: Schedule,
        velocity: Velocity,
        *,
        event_shape: Sequence[int] | None = None,
        support: Constraint | None = None,
        grid: Grid | None = None,
        coarse_steps: int = 4,
        refinements: int = 2,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.basis = basis
        self.schedule = schedule
        self.velocity = velocity
        self.event_shape = torch.Size(event_shape if event_shape is not None else (basis.dim,))
        self.support = support
        self.grid = grid or Grid()
        self.coarse_steps = coarse_steps
        self.refinements = refinements
        self.report = report or {}
        schedule.check_axes(basis.principal, basis.dim)
        self.angles: Angles = schedule.angles(basis.scale)
        velocity.attach(basis, self.angles)
        self.gradient_checkpointing = False
        self._compiled_take: Callable[..., Tensor] | None = None
        self._solvers: dict[Any, Solver] = {}
        self._solved_state: tuple[Any, ...] = ()
        self._solved_weights: list[Tensor] = []
        self.eval()
        self.requires_grad_(False)

    @classmethod
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
        """
        schedule = schedule or Schedule.details_first()
        w, m, cov = weights.double(), means.double(), covariances.double()
        if m.ndim != 2 or cov.shape != (*m.shape, m.shape[-1]) or w.shape != m.shape[:1]:
            raise ValueError(
                "a mixture expects weights (K,), means (K, D) and covariances (K, D, D), got "
                f"{tuple(w.shape)}, {tuple(m.shape)}, {tuple(cov.shape)}"
            )
        w = w / w.sum()
        mean = w @ m
        centred = m - mean
        covariance = torch.einsum("k,kij->ij", w, cov + centred.unsqueeze(-1) * centred.unsqueeze(-2))
        exact = Basis.from_moments(mean, covariance, m)
        unit = exact.rotation / exact.scale
        velocity = GaussianMixtureVelocity(
            w.to(means),
            exact.to_standard(m).to(means),
            (unit.T @ cov @ unit).to(means),
            schedule.angles(exact.scale),
        )
        return cls(exact.to(means.dtype), schedule, velocity, **options)

    # -- shapes, dtypes, devices ------------------------------------------------------------------------------------

    @property
    def latent_dim(self) -> int:
        """Number of latent coordinates: the dimension of the unconstrained data."""
        return self.basis.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the flow's buffers."""
        return self.basis.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where the flow lives."""
        return self.basis.scale.device

    # -- the map ----------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Latent ``z`` of data ``x``: the inverse of :meth:`decode`, to rounding.

        Raises:
            ValueError: on a wrong event shape.
            TypeError: on a wrong dtype or device.
        """
        return self._to_latent(x, with_log_det=False)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Data ``x`` of latents ``z``."""
        return self._to_data(z, with_log_det=False)[0]

    def encode_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` and ``log|det dz/dx|`` (shape ``(*batch,)``), in one solve."""
        return self._to_latent(x, with_log_det=True)

    def decode_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log|det dx/dz|`` (shape ``(*batch,)``), in one solve."""
        return self._to_data(z, with_log_det=True)

    def log_prob(self, x: Tensor) -> Tensor:
        r"""Log-density ``log N(z; 0, I) + log|det dz/dx|`` in nats, shape ``(*batch,)``."""
        z, log_det = self.encode_and_log_det(x)
        return _log_normal(z) + log_det

    def sample(self, shape: Sequence[int] | int = (), *, seed: int | None = None) -> Tensor:
        """Draws of shape ``(*shape, *event_shape)``; ``seed`` makes them repeatable."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        z = torch.randn(*shape, self.latent_dim, generator=generator, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return self.decode(z)

    def decoder(self, k: int) -> "Decoder":
        """A map from the first ``k`` latents to data, the remaining latents at their mean, zero.

        Returns:
            A callable from ``(*batch, k)`` to ``(*batch, *event_shape)`` that knows the measured share of the variance
            that it loses, ``.reconstruction_error``.

        Raises:
            ValueError: if ``k`` is not in ``1..latent_dim``.
        """
        from .reconstruction import Decoder  # builds on this module

        if not 1 <= k <= self.latent_dim:
            raise ValueError(f"decoder expects 1 <= k <= {self.latent_dim} latents, got {k}")
        return Decoder(self, k)

    def trajectory(self, x: Tensor, steps: int = 32) -> tuple[Tensor, Tensor]:
        """The path of ``x`` through the paper's rescaled coordinates.

        The rescaling ``A(t) = cos theta_1(t)``, common to all axes, keeps the leading axis at its own scale: in a
        preserving flow the whole covariance then stays constant; in a reducing flow the compressed axes shrink.

        Args:
            x: data, ``(*batch, *event_shape)``.
            steps: number of solver steps of the grid to walk.

        Returns:
            Angles' times ``(steps + 1,)`` and positions ``(steps + 1, *batch, latent_dim)`` in the eigenbasis.
        """
        v, batch = self._standardise(x)[:2]
        solver = self._solver(v, replace(self.grid, steps=steps))
        states = [v]
        for step in solver.to_latent:
            states.append(take(self.velocity, step, states[-1]))
        times = replace(self.grid, steps=steps).times()
        sd = self._rescaled_sd(times).to(v).unsqueeze(1)
        return times, (torch.stack(states) * sd).unflatten(1, batch)

    def participation_ratio(self, t: Tensor | None = None) -> Tensor:
        """The dimension ``PR = (sum s^2)^2 / sum s^4`` of the rescaled covariance, at times ``t`` (1 by default).

        Source: de Albuquerque & Pearson 2024, section 3; constant in a preserving flow.
        """
        t = torch.ones(1, dtype=torch.double) if t is None else torch.as_tensor(t, dtype=torch.double)
        variance = self._rescaled_sd(t).square()
        return (variance.sum(-1) ** 2 / variance.square().sum(-1)).squeeze()

    def compile(self, *, rows: int = 64, **options: Any) -> float:  # type: ignore[override]
        """Compile the solver step of :meth:`decode` and of its gradient, for this session; needs a C++ compiler.

        Results agree with those of the uncompiled flow to rounding. Log-determinants, ``encode``, calls inside
        torch.func and gradient checkpointing stay uncompiled.

        Args:
            rows: batch size with which it is tried; other sizes share the compiled code (one row compiles anew).
            options: for ``torch.compile``; ``dynamic=True`` by default.

        Returns:
            Seconds that compilation took.

        Raises:
            RuntimeError: from torch, if the compiler is missing or fails; the flow then stays uncompiled.
        """

        def compiled(y: Tensor, embedding: tuple[Tensor, ...], rate: tuple[Tensor, ...], tableau: Tableau) -> Tensor:
            return take(self.velocity, Step(tableau, embedding, rate), y)

        began = time.perf_counter()
        self._compiled_take = torch.compile(compiled, **{"dynamic": True, **options})
        z = torch.zeros(rows, self.latent_dim, dtype=self.dtype, device=self.device)
        try:
            with torch.no_grad():
                self.decode(z)
            with torch.enable_grad():
                z.requires_grad_(True)
                torch.autograd.grad(self.decode(z).sum(), z)
        except Exception:
            self._compiled_take = None
            raise
        return time.perf_counter() - began

    # -- Pyro -------------------------------------------------------------------------------------------------------

    def transform(self, cache_size: int = 0) -> "FlowTransform":
        """The map from latent to data as a Pyro transform."""
        from .prior import FlowTransform  # prior.py builds on this module

        return FlowTransform(self, cache_size=cache_size)

    def prior(self) -> "dist.TransformedDistribution":
        """The flow as a distribution to put in a Pyro model."""
        from .prior import flow_prior

        return flow_prior(self)

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the flow to one safetensors file, atomically."""
        from .storage import save_flow

        save_flow(self, path)

    # -- in standardised coordinates, for those who measure the numerics ---------------------------------------------

    def decode_standard(self, z: Tensor, grid: Grid) -> Tensor:
        """The solve alone, on any grid: latents ``(n, D)`` to standardised coordinates ``v``."""
        for step in self._solver(z, grid).to_data:
            z = take(self.velocity, step, z)
        return z

    def solve_adaptive(
        self, state: Tensor, *, to_data: bool, rtol: float = 1e-6, atol: float = 1e-6, log_det: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The ODE itself in standardised coordinates ``(n, D)``, by torchdiffeq's adaptive steps: an oracle."""
        return solve_adaptive(self.velocity, self.angles, state, to_data=to_data, rtol=rtol, atol=atol, log_det=log_det)

    # -- internals --------------------------------------------------------------------------------------------------

    def _to_data(self, z: Tensor, *, with_log_det: bool) -> tuple[Tensor, Tensor]:
        self._check(z, torch.Size([self.latent_dim]), "z")
        batch = z.shape[:-1]
        y = z.reshape(-1, self.latent_dim)
        log_det = self.basis.log_det().expand(len(y)) if with_log_det else y.new_zeros(())
        probes = self._probes(y) if with_log_det else None
        run = self._runner()
        for step in self._solver(y).to_data:
            if with_log_det:
                y, part = run(partial(self._take_with_log_det, step, probes=probes), y)
                log_det = log_det + part
            else:
                y = run(partial(self._take, step), y)
        x, bijection_log_det = self._unstandardise(y, batch, with_log_det)
        return x, log_det.reshape(batch) + bijection_log_det if with_log_det else log_det

    def _to_latent(self, x: Tensor, *, with_log_det: bool) -> tuple[Tensor, Tensor]:
        y, batch, bijection_log_det = self._standardise(x, with_log_det)
        log_det = self.basis.log_det().expand(len(y)) if with_log_det else y.new_zeros(())
        probes = self._probes(y) if with_log_det else None
        solver = self._solver(y)
        iterations = self.refinements + (2 if self.dtype == torch.double else 0)
        newton = self.latent_dim <= EXACT_UP_TO
        run = self._runner()
        for step, guess in zip(reversed(solver.to_data), solver.to_latent, strict=True):
            y = run(partial(invert, self.velocity, step, guess, iterations=iterations, newton=newton), y)
            if with_log_det:
                log_det = log_det + run(partial(self._take_with_log_det, step, probes=probes), y)[1]
        z = y.reshape(*batch, self.latent_dim)
        return z, -(log_det.reshape(batch) + bijection_log_det) if with_log_det else log_det

    def _runner(self) -> Callable[..., Any]:
        """How a step is called: plainly, or so that its gradient runs it again."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return _call
        if any(w.requires_grad or _is_wrapped(w) for w in self._weights()):
            raise ValueError(
                "gradient checkpointing differentiates in x and z alone: it expects frozen weights, but some require "
                "gradients; call flow.requires_grad_(False), or set flow.gradient_checkpointing = False"
            )
        return recompute

    def _take(self, step: Step, y: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Within a step that runs again, every evaluation does: activations of one alone are ever held.
            return take(lambda state, embedding: recompute(lambda v: self.velocity(v, embedding), state), step, y)
        if self._compiled_take is None or self.gradient_checkpointing or _is_wrapped(y):
            return take(self.velocity, step, y)
        return self._compiled_take(y, step.embedding, step.rate, step.tableau)

    def _take_with_log_det(self, step: Any, y: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        if probes is None:
            return take_with_log_det(self.velocity, step, y)
        return take_with_probes(self.velocity, step, y, probes)

    def _probes(self, y: Tensor) -> Tensor | None:
        if self.latent_dim <= EXACT_UP_TO:
            return None
        # The same signs for every row and every call: a log-density that is a fixed function, as an accept step needs.
        generator = torch.Generator(y.device).manual_seed(0)
        shape = (8, 1, self.latent_dim)
        signs = torch.randint(0, 2, shape, generator=generator, device=y.device)
        return (2.0 * signs - 1.0).to(y.dtype).expand(-1, len(y), -1)

    def _standardise(self, x: Tensor, with_log_det: bool = False) -> tuple[Tensor, torch.Size, Tensor | float]:
        self._check(x, self.event_shape, "x")
        batch = x.shape[: x.ndim - len(self.event_shape)]
        bijection = self.bijection()
        if bijection is None:
            flat = x.reshape(-1, self.latent_dim)
            return self.basis.to_standard(flat), batch, 0.0
        free = bijection.inv(x)
        log_det = self._bijection_log_det(bijection, free, x) if with_log_det else 0.0
        return self.basis.to_standard(free.reshape(-1, self.latent_dim)), batch, log_det

    def _unstandardise(self, y: Tensor, batch: torch.Size, with_log_det: bool) -> tuple[Tensor, Tensor | float]:
        free = self.basis.from_standard(y)
        bijection = self.bijection()
        if bijection is None:
            return free.reshape(*batch, *self.event_shape), 0.0
        free = free.reshape(*batch, *bijection.inverse_shape(self.event_shape))
        x = bijection(free)
        return x, self._bijection_log_det(bijection, free, x) if with_log_det else 0.0

    def bijection(self) -> Transform | None:
        """From unconstrained space onto the support, or None for real data."""
        if self.support is None or self.support is constraints.real:
            return None
        return unconstrained_to(self.support)

    def _bijection_log_det(self, bijection: Transform, free: Tensor, x: Tensor) -> Tensor:
        log_det = bijection.log_abs_det_jacobian(free, x)
        # What torch leaves to be summed is what its result has beyond the batch: a stack's declared event axes do not
        # say, because torch does not sum over the stacked axis.
        extra = log_det.ndim - (x.ndim - len(self.event_shape))
        return log_det.flatten(-extra).sum(-1) if extra else log_det

    def _solver(self, like: Tensor, grid: Grid | None = None) -> Solver:
        grid = grid or self._current_grid()
        weights = self._weights()
        if any(w.requires_grad or _is_wrapped(w) for w in weights):
            return build_solver(self.velocity, self.angles, grid, like)  # of this call alone: never shared
        # A network that was trained on, or replaced, has other embeddings.
        state = tuple((w.data_ptr(), w._version) for w in weights)
        if state != self._solved_state:
            self._solvers.clear()
            # Storage is told apart by its address, so it is kept alive for as long as the embeddings are.
            self._solved_state, self._solved_weights = state, [w.detach() for w in weights]
        key = (grid, like.dtype, like.device)
        if key not in self._solvers:
            # A plain tensor stands for `like`, which may be a wrapper of torch.func that must not outlive its call.
            with torch.no_grad():
                plain = torch.empty(0, dtype=like.dtype, device=like.device)
                self._solvers[key] = build_solver(self.velocity, self.angles, grid, plain)
        return self._solvers[key]

    def map_state(self) -> tuple[Any, ...]:
        """What the map depends on besides its argument: a remembered result holds while this compares equal."""
        weights = [*self.basis.buffers(), *self._weights()]
        if any(_is_wrapped(w) for w in weights):
            return (object(),)  # weights of one vmapped call equal no others
        return (
            self._current_grid(),
            self.refinements,
            torch.is_grad_enabled() and any(w.requires_grad for w in weights),
            tuple((w.dtype, w.device, w.data_ptr(), w._version) for w in weights),
        )

    def _weights(self) -> list[Tensor]:
        return _tensors_of(self.velocity)

    def _current_grid(self) -> Grid:
        level = current_fidelity()
        if level == "fine":
            return self.grid
        return replace(self.grid, steps=self.coarse_steps if level == "coarse" else level)

    def _rescaled_sd(self, t: Tensor) -> Tensor:
        theta = self.angles(t)
        return self.basis.scale.double().cpu() * theta[..., :1].cos() / theta.cos()

    def _check(self, value: Tensor, event: torch.Size, name: str) -> None:
        if not isinstance(value, Tensor):
            kind = "numpy array" if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"expected {name} to be a torch tensor, got a {kind}; use torch.as_tensor({name})")
        if value.dtype != self.dtype or value.device != self.device:
            raise TypeError(
                f"expected {name} as {self.dtype} on {self.device}, got {value.dtype} on {value.device}; convert with "
                f"{name}.to(flow.device, flow.dtype), or move the flow with flow.to(...)"
            )
        if value.shape[value.ndim - len(event) :] != event or value.ndim < len(event):
            raise ValueError(
                f"expected {name} of shape (*batch, {', '.join(map(str, event))}), got {tuple(value.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InflationaryFlow":
        self._solvers.clear()  # its tensors have the old dtype and device
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; the scales decide the angles and embeddings, which are recomputed."""
        result = super().load_state_dict(*args, **kwargs)
        self._solvers.clear()
        self.angles = self.schedule.angles(self.basis.scale)
        self.velocity.attach(self.basis, self.angles)
        return result

    def __getstate__(self) -> dict[str, Any]:
        forgotten: dict[str, Any] = {"_solvers": {}, "_solved_state": (), "_solved_weights": [], "_compiled_take": None}
        return {**self.__dict__, **forgotten}

    def extra_repr(self) -> str:
        """Event shape, latent dimension and solver."""
        return f"event_shape={tuple(self.event_shape)}, latent_dim={self.latent_dim}, grid={self.grid}"


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers: what torch's own iterators yield, without their names, which take longer than a step."""
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    for child in module._modules.values():
        if child is not None:
            own += _tensors_of(child)
    return own


def _call(function: Callable[[Tensor], Any], y: Tensor) -> Any:
    return function(y)


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * float(np.log(2 * np.pi)))
