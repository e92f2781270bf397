"""What was observed: ``y = A x + e`` with independent Gaussian noise, in whatever form the operator comes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...flow.flow import InflationaryFlow

_TOLERANCE = 1e-3  # relative, of a callable's linearity and of its adjoint: networks' libraries compute in float32

Rows = Callable[[Tensor], Tensor]


class LinearObservation(NamedTuple):
    """Observations of one operator. All tensors are in double precision, on the flow's device."""

    forward: Rows
    """``A x`` of flattened events: from ``(n, D)`` to ``(n, m)``."""
    adjoint: Rows
    """``A^T r``: from ``(n, m)`` to ``(n, D)``."""
    y: Tensor
    """``(F, m)``, all observations."""
    sd: Tensor
    """``(m,)``, standard deviation of the noise of every entry."""
    batch: torch.Size
    """The shape that the observations came in, ``F`` in all."""

    @classmethod
    def read(cls, flow: InflationaryFlow, operator: Any, y: Any, sd: Any, adjoint: Any = None) -> "LinearObservation":
        """The observation that the arguments of :func:`ifpyro.linear_posterior` mean.

        Raises:
            TypeError: if the operator is neither numbers, nor a mask, nor callable.
            ValueError: on shapes that do not fit, numbers that are not finite, noise that is not positive, or a
                callable that is not linear.
        """
        if adjoint is not None and (not callable(operator) or not callable(adjoint)):
            raise TypeError("adjoint expects a callable beside a callable operator; arrays and masks need none")
        if callable(operator):
            forward, back, shape = _callable(flow, operator, adjoint)
            whole = None
        else:
            forward, back, shape, whole = _array(flow, operator)
        seen, batch = _observed(flow, y, shape, whole)
        return cls(forward, back, seen, _noise(flow, sd, shape), batch)

    def matrix(self, dim: int) -> Tensor:
        """``A`` itself, ``(m, D)``."""
        return self.forward(torch.eye(dim, dtype=torch.double, device=self.y.device)).T


def _array(flow: InflationaryFlow, operator: Any) -> tuple[Rows, Rows, torch.Size, Tensor | None]:
    """Both directions, the shape of one ``y``, and the mask if the operator is one."""
    dim = flow.latent_dim
    try:
        given = _numbers(operator).to(flow.device)
        given = given.to_dense() if given.layout != torch.strided else given
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"operator expects a matrix (m, {dim}), a boolean mask of shape {tuple(flow.event_shape)} or a callable, "
            f"got {type(operator).__name__} ({error})"
        ) from error
    if given.is_complex():
        raise TypeError("operator expects real numbers, got complex ones; give real and imaginary parts as rows")
    if given.dtype == torch.bool:
        if given.shape not in (flow.event_shape, (dim,)):
            raise ValueError(
                f"a boolean operator is a mask of what is seen: it expects shape {tuple(flow.event_shape)}, got "
                f"{tuple(given.shape)}; a matrix of zeros and ones must have a number type"
            )
        mask = given.flatten()
        index = mask.nonzero().squeeze(-1)

        def spread(r: Tensor) -> Tensor:
            return r.new_zeros(len(r), dim).index_copy(1, index, r)

        return lambda x: x[:, index], spread, torch.Size([len(index)]), mask
    if given.ndim != 2 or given.shape[1] != dim:
        raise ValueError(
            f"linear_posterior expects an operator of shape (m, {dim}), on flattened events, or a mask of shape "
            f"{tuple(flow.event_shape)}, got shape {tuple(given.shape)}"
        )
    matrix = given.double()
    if not bool(matrix.isfinite().all()):
        raise ValueError("operator expects finite numbers, got NaN or infinity among them")
    return lambda x: x @ matrix.T, lambda r: r @ matrix, torch.Size([len(matrix)]), None


def _numbers(value: Any) -> Tensor:
    """Numbers of any type as a tensor: masked entries of numpy's arrays as NaN, bytes in the machine's order."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float64), np.nan)
    array = np.asarray(value)
    return torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))


def _callable(
    flow: InflationaryFlow, operator: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor] | None
) -> tuple[Rows, Rows, torch.Size]:
    """Both directions of a callable on batches of events, tried on random ones; by default autograd's adjoint."""
    event = flow.event_shape

    def run(x: Tensor) -> Tensor:
        seen = operator(x.to(flow.dtype).reshape(-1, *event))
        if not isinstance(seen, Tensor) or seen.ndim < 2 or len(seen) != len(x):
            got = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise ValueError(
                f"operator expects a callable from events ({len(x)}, {', '.join(map(str, event))}) to observations "
                f"({len(x)}, ...), got {got}"
            )
        return seen

    shape = run(torch.zeros(1, flow.latent_dim, dtype=torch.double, device=flow.device)).shape[1:]

    def forward(x: Tensor) -> Tensor:
        return run(x).detach().reshape(len(x), -1).double()

    def transposed(r: Tensor) -> Tensor:
        rows = r.to(flow.dtype).reshape(-1, *shape)
        if adjoint is not None:
            back = adjoint(rows)
            if back.shape != (len(r), *event):
                raise ValueError(
                    f"adjoint expects a callable from observations ({len(r)}, {', '.join(map(str, shape))}) to events "
                    f"({len(r)}, {', '.join(map(str, event))}), got {tuple(back.shape)}"
                )
        else:
            with torch.enable_grad():
                x = torch.zeros(len(r), *event, dtype=flow.dtype, device=flow.device, requires_grad=True)
                (back,) = torch.autograd.grad(operator(x), x, rows)
        return back.detach().reshape(len(r), -1).double()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, flow.latent_dim, generator=generator, dtype=torch.double).to(flow.device)
    ax = forward(x)
    together = forward(2 * x[:1] - 3 * x[1:])
    if bool((together - (2 * ax[:1] - 3 * ax[1:])).norm() > _TOLERANCE * (together.norm() + ax.norm())):
        raise ValueError(
            "operator expects a linear callable, got one with operator(2 a - 3 b) other than 2 operator(a) - 3 "
            "operator(b); if it adds a constant, subtract operator(0) from it and from y"
        )
    r = torch.randn(ax.shape, generator=generator, dtype=torch.double).to(flow.device)
    left, right = (ax * r).sum(), (x * transposed(r)).sum()
    if bool((left - right).abs() > _TOLERANCE * (ax.norm() * r.norm() + right.abs())):
        raise ValueError(
            f"adjoint expects the transpose of operator, so that <A x, r> = <x, A^T r>, got {float(left):.6g} and "
            f"{float(right):.6g} for random x and r; leave adjoint out to have it from autograd"
        )
    return forward, transposed, shape


def _observed(flow: InflationaryFlow, y: Any, shape: torch.Size, mask: Tensor | None) -> tuple[Tensor, torch.Size]:
    """Observations ``(F, m)`` and the shape they came in."""
    given = _numbers(y).to(flow.device, torch.double)
    event = flow.event_shape
    plain = given.shape[max(0, given.ndim - len(shape)) :] == shape
    whole = mask is not None and given.shape[max(0, given.ndim - len(event)) :] == event
    if plain and whole and event != shape:
        raise ValueError(
            f"y of shape {tuple(given.shape)} may be whole events {tuple(event)} or observations of {shape[0]} seen "
            "entries each; give whole events as y[..., mask], or the operator as a matrix"
        )
    if plain or whole:
        batch = given.shape[: given.ndim - len(shape if plain else event)]
    else:
        wanted = f"(*batch, {', '.join(map(str, shape))})"
        raise ValueError(
            f"linear_posterior expects y of shape {wanted}, as the operator gives"
            + (f", or whole events (*batch, {', '.join(map(str, event))})" if mask is not None else "")
            + f", got {tuple(given.shape)}"
        )
    rows = given.reshape(batch.numel(), shape.numel() if plain else flow.latent_dim)
    rows = rows if mask is None or plain else rows[:, mask]
    if not bool(rows.isfinite().all()):
        raise ValueError("y expects finite numbers, got NaN or infinity; leave such entries out of the operator")
    return rows, batch


def _noise(flow: InflationaryFlow, sd: Any, shape: torch.Size) -> Tensor:
    """Standard deviations ``(m,)``."""
    given = _numbers(sd).to(flow.device, torch.double)
    if given.ndim and given.shape not in (shape, (shape.numel(),)):
        raise ValueError(
            f"sd expects a number, or one for every entry of y, shape {tuple(shape)}, got shape {tuple(given.shape)}"
        )
    if bool((given == 0).any()):
        raise ValueError(
            "sd expects positive numbers, got 0: without noise the posterior has no density, only a surface; give the "
            "precision of the measurement, or a thousandth of the entry's spread"
        )
    if not bool(((given > 0) & (given < math.inf)).all()):
        raise ValueError(f"sd expects positive finite numbers, sd > 0, got {given.flatten()[:4].tolist()}")
    return given.reshape(-1).expand(shape.numel()).clone()
