"""Constrained data: what a user may say about the values of an event, its plain-data form for files, and its chart.

A support is a torch constraint, one name, or one of either for every column. All of them become torch constraints of a
few kinds with exact bounds (:func:`as_support`), and these a :class:`~ifpyro.data.charts.Chart`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from .circle import Circular, circular, exact_number
from .parts import chart_of

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
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "circular": (Circular, ("period", "cut")),
}
_KNOWN = [*_NAMED, *_PARAMETRIC, "stack", "cat"]
_SIMPLEX = type(constraints.simplex)
_WORDS = {**_NAMED, "unit": constraints.unit_interval, "circular": circular()}
NAMES = tuple(_WORDS)
"""Supports that can be given by name."""


def as_support(support: Any, event_shape: Sequence[int], names: Sequence[Any] | None = None) -> Constraint | None:
    """What a user said about the data's values, as a constraint that can be saved; None for real data.

    Args:
        support: a torch or Pyro constraint, such as a distribution's ``.support``; a name among `NAMES`; a list with
            one of them for every column (every entry of the last axis); or a dictionary of them by the column's name or
            index, in which columns that are not mentioned are real. None for real data.
        event_shape: of the data.
        names: of the columns, where the data have names.

    Raises:
        ValueError: if the support is unknown, has impossible bounds, or does not fit the event.
    """
    if isinstance(support, Mapping):
        support = _by_name(support, event_shape, names)
    if isinstance(support, list | tuple):
        columns = event_shape[-1] if len(event_shape) else 0
        if len(support) != columns:
            raise ValueError(
                f"support expects one entry a column where it is a list: {columns} of them, got {len(support)}; give "
                "'real' for columns without bounds, or a dictionary of those with"
            )
        support = constraints.cat([_exact(_word(part)) for part in support], -1, [1] * columns)
    support = _exact(_word(support))
    chart = chart_of(support, event_shape)
    return None if chart.is_real else support


def support_to_dict(support: Constraint) -> dict[str, Any]:
    """Plain data from which :func:`support_from_dict` rebuilds the constraint, exactly.

    Raises:
        ValueError: for a constraint that has no plain form.
    """
    support = _exact(support)
    for name, constraint in _NAMED.items():
        if support is constraint or (type(support) is type(constraint) and name in ("real", "simplex")):
            return {"kind": name}
    if isinstance(support, constraints.stack):
        return {"kind": "stack", "dim": support.dim, "parts": [support_to_dict(c) for c in support.cseq]}
    if isinstance(support, constraints.cat):
        parts = [support_to_dict(c) for c in support.cseq]
        return {"kind": "cat", "dim": support.dim, "lengths": list(support.lengths), "parts": parts}
    name, fields = next((name, fields) for name, (cls, fields) in _PARAMETRIC.items() if type(support) is cls)
    return {"kind": name, **{field: _plain(getattr(support, field)) for field in fields}}


def support_from_dict(data: dict[str, Any]) -> Constraint:
    """Rebuild a constraint from :func:`support_to_dict`.

    Raises:
        ValueError: if the data describe no support.
    """
    kind = data.get("kind") if isinstance(data, dict) else None
    try:
        if isinstance(kind, str) and kind in _NAMED:
            return _NAMED[kind]
        if isinstance(kind, str) and kind in _PARAMETRIC:
            cls, fields = _PARAMETRIC[kind]
            return _exact(cls(*(_number_of(data[field]) for field in fields)))
        if kind == "stack":
            return _exact(constraints.stack([support_from_dict(part) for part in data["parts"]], data["dim"]))
        if kind == "cat":
            parts = [support_from_dict(part) for part in data["parts"]]
            return _exact(constraints.cat(parts, data["dim"], data["lengths"]))
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ValueError(f"expected the plain form of a support, got {data!r} ({error})") from error
    raise ValueError(f"expected a support of kind {_KNOWN}, got {kind!r}")


# -- what users give ----------------------------------------------------------------------------------------------


def _word(support: Any) -> Any:
    if not isinstance(support, str):
        return support
    if support not in _WORDS:
        raise ValueError(f"support expects a torch constraint or one of the names {', '.join(NAMES)}; got {support!r}")
    return _WORDS[support]


def _by_name(support: Mapping[Any, Any], event_shape: Sequence[int], names: Sequence[Any] | None) -> list[Any]:
    columns = event_shape[-1] if len(event_shape) else 0
    known = {name: index for index, name in enumerate(names or ())}
    parts: list[Any] = [constraints.real] * columns
    for key, part in support.items():
        index = known.get(key, key)
        if isinstance(index, bool) or not isinstance(index, int) or not -columns <= index < columns:
            are = (
                f"the columns {list(known)}" if known else f"column indices 0 to {columns - 1} (the data have no names)"
            )
            raise ValueError(f"support expects {are} as keys, got {key!r}")
        parts[index] = part
    return parts


def _exact(support: Any) -> Constraint:
    """The same constraint as one of the few kinds that are known, with bounds that are floats or double tensors."""
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if support is None or isinstance(support, type(constraints.real)):
        return constraints.real
    if type(support).__name__ == "_SoftplusPositive":  # Pyro's: the same set as torch's
        return constraints.positive
    if isinstance(support, _SIMPLEX):
        return support
    if isinstance(support, constraints.stack):
        return constraints.stack([_exact(part) for part in support.cseq], int(support.dim))
    if isinstance(support, constraints.cat):
        return constraints.cat(
            [_exact(part) for part in support.cseq], int(support.dim), [int(n) for n in support.lengths]
        )
    if isinstance(support, Circular):
        return Circular(support.period, support.cut)
    found = next(((cls, fields) for cls, fields in _PARAMETRIC.values() if type(support) is cls), None)
    if found is None and not any(support is constraint for constraint in _NAMED.values()):
        raise ValueError(_unknown(support))
    if found is None or any(support is constraint for constraint in _NAMED.values()):
        return support
    return _with_bounds(support, *found)


def _with_bounds(support: Constraint, cls: Any, fields: tuple[str, ...]) -> Constraint:
    bounds = [exact_number(getattr(support, field), f"support {_name_of(cls)}: {field}") for field in fields]
    ends = dict(zip(fields, bounds, strict=True))
    lower = torch.as_tensor(ends.get("lower_bound", -math.inf), dtype=torch.double)
    upper = torch.as_tensor(ends.get("upper_bound", math.inf), dtype=torch.double)
    try:
        ordered = bool((lower < upper).all())
    except RuntimeError as error:
        raise ValueError(
            f"support expects bounds that broadcast, got shapes {lower.shape} and {upper.shape}"
        ) from error
    if not ordered:
        raise ValueError(f"support expects a lower bound below the upper one, got {support}")
    if all(isinstance(bound, float) for bound in bounds):  # one bound for all, which may be none
        lowest, highest = float(lower), float(upper)
        if math.isinf(lowest) and math.isinf(highest):
            return constraints.real
        if math.isinf(highest) and len(bounds) == 2:
            return constraints.greater_than(lowest)
        if math.isinf(lowest) and len(bounds) == 2:
            return constraints.less_than(highest)
    return cls(*bounds)


def _name_of(cls: Any) -> str:
    return next(name for name, (known, _) in _PARAMETRIC.items() if known is cls)


def _unknown(support: Any) -> str:
    if isinstance(support, type):
        known = any(cls is support for cls, _ in _PARAMETRIC.values())
        name = _name_of(support) if known else support.__name__
        return f"support expects a constraint with its bounds, such as interval(0.0, 1.0); got the class {name} itself"
    if isinstance(support, type(constraints.dependent) | constraints.dependent_property):
        return (
            f"support expects a constraint, got {support!r} of a distribution's class, which depends on its "
            "parameters; pass the .support of an instance, such as Uniform(0.0, 2.0).support"
        )
    if getattr(support, "is_discrete", False) is True:
        return (
            f"support expects continuous values, got {support!r}, which is discrete; a flow has a density: add uniform "
            "noise of one unit to whole numbers, and give the interval in which they then lie"
        )
    if not isinstance(support, Constraint) and hasattr(support, "support"):
        return f"support expects a constraint, got the distribution {support}; pass its .support"
    return (
        f"support expects one of the torch constraints {_KNOWN}, ifpyro.circular(period), or a name "
        f"({', '.join(NAMES)}), got {support!r}"
    )


# -- plain data ---------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value  # JSON has no infinity


def _number_of(value: Any) -> Any:
    if isinstance(value, list):
        return torch.tensor(_floats(value), dtype=torch.double)
    return None if value is None else float(value)


def _floats(value: Any) -> Any:
    return [_floats(entry) for entry in value] if isinstance(value, list) else float(value)
