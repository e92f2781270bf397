"""Constrained data: the bijection from unconstrained space, and its plain-data form for files."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.constraints import Constraint

# One line a constraint: how it is named in a file, and what its parameters are called.
_NAMED: dict[str, Constraint] = {
    "real": constraints.real,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
}
_PARAMETRIC: dict[str, tuple[Any, tuple[str, ...]]] = {
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
}
_KNOWN = [*_NAMED, *_PARAMETRIC, "stack", "cat"]


def support_to_dict(support: Constraint) -> dict[str, Any]:
    """Plain data from which :func:`support_from_dict` rebuilds the constraint.

    Raises:
        ValueError: for a constraint that has no plain form.
    """
    for name, constraint in _NAMED.items():
        if support is constraint or (type(support) is type(constraint) and name in ("real", "simplex")):
            return {"kind": name}
    for name, (cls, fields) in _PARAMETRIC.items():
        if type(support) is cls:
            return {"kind": name, **{field: _plain(getattr(support, field)) for field in fields}}
    if isinstance(support, constraints.stack):
        return {"kind": "stack", "dim": support.dim, "parts": [support_to_dict(c) for c in support.cseq]}
    if isinstance(support, constraints.cat):
        parts = [support_to_dict(c) for c in support.cseq]
        return {"kind": "cat", "dim": support.dim, "lengths": list(support.lengths), "parts": parts}
    raise ValueError(f"support expects one of the torch constraints {_KNOWN}, got {support!r}")


def support_from_dict(data: dict[str, Any]) -> Constraint:
    """Rebuild a constraint from :func:`support_to_dict`."""
    kind = data.get("kind")
    if kind in _NAMED:
        return _NAMED[kind]
    if kind in _PARAMETRIC:
        cls, fields = _PARAMETRIC[kind]
        return cls(*(_tensor(data[field]) for field in fields))
    if kind == "stack":
        return constraints.stack([support_from_dict(part) for part in data["parts"]], data["dim"])
    if kind == "cat":
        return constraints.cat([support_from_dict(part) for part in data["parts"]], data["dim"], data["lengths"])
    raise ValueError(f"expected a support of kind {_KNOWN}, got {kind!r}")


def unconstrained_to(support: Constraint) -> Transform:
    """The bijection from unconstrained space onto the support."""
    return biject_to(support)


def bijection_of(support: Constraint | None) -> Transform | None:
    """From unconstrained space onto the support, or None for real data."""
    return None if support is None or support is constraints.real else unconstrained_to(support)


def to_free(
    x: Tensor, support: Constraint | None, event_shape: torch.Size, with_log_det: bool
) -> tuple[Tensor, Tensor | float]:
    """Data ``(*batch, *event_shape)`` in unconstrained space, flattened.

    Returns:
        ``(*batch, D)``, and ``log|det dx/dfree|`` of the bijection, ``(*batch,)``, zero if it is not wanted.
    """
    batch = x.shape[: x.ndim - len(event_shape)]
    bijection = bijection_of(support)
    if bijection is None:
        return x.reshape(*batch, event_shape.numel()), 0.0
    free = bijection.inv(x)
    log_det = _log_det(bijection, free, x, len(event_shape)) if with_log_det else 0.0
    return free.reshape(*batch, bijection.inverse_shape(event_shape).numel()), log_det


def from_free(
    free: Tensor, support: Constraint | None, event_shape: torch.Size, with_log_det: bool
) -> tuple[Tensor, Tensor | float]:
    """The inverse of :func:`to_free`, with the same log-determinant."""
    batch = free.shape[:-1]
    bijection = bijection_of(support)
    if bijection is None:
        return free.reshape(*batch, *event_shape), 0.0
    free = free.reshape(*batch, *bijection.inverse_shape(event_shape))
    x = bijection(free)
    return x, _log_det(bijection, free, x, len(event_shape)) if with_log_det else 0.0


def _log_det(bijection: Transform, free: Tensor, x: Tensor, event_dim: int) -> Tensor:
    log_det = bijection.log_abs_det_jacobian(free, x)
    # What torch leaves to be summed is what its result has beyond the batch: a stack's declared event axes do not
    # say, because torch does not sum over the stacked axis.
    extra = log_det.ndim - (x.ndim - event_dim)
    return log_det.flatten(-extra).sum(-1) if extra else log_det


def outside(support: Constraint, x: Tensor) -> Tensor:
    """Indices of the rows of ``x`` (shape ``(N, *event)``) that are not strictly inside the support.

    A value on the boundary has no finite unconstrained image, so it counts as outside.
    """
    checked = (support.check(x).reshape(len(x), -1)).all(-1)
    inside = checked & _off_boundary(support, x).reshape(len(x), -1).all(-1)
    return torch.nonzero(~inside).flatten()


def _off_boundary(support: Constraint, x: Tensor) -> Tensor:
    if isinstance(support, constraints.stack):
        parts = zip(support.cseq, x.unbind(support.dim), strict=True)
        return torch.stack([_off_boundary(part, value) for part, value in parts], support.dim)
    if isinstance(support, constraints.cat):
        parts = zip(support.cseq, x.split(list(support.lengths), support.dim), strict=True)
        return torch.cat([_off_boundary(part, value) for part, value in parts], support.dim)
    if isinstance(support, type(constraints.simplex)):
        return x > 0
    lower = getattr(support, "lower_bound", -torch.inf)
    upper = getattr(support, "upper_bound", torch.inf)
    return (x > lower) & (x < upper)


def _plain(value: float | Tensor) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) else value
