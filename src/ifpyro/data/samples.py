"""Checking the samples a flow is trained on: every problem gets an error that says where it is and what to do."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .arrays import as_real
from .charts import Chart
from .parts import in_words

MINIMUM = 16  # rows; below, not even the covariance of two columns is usable


def as_samples(x: Any, name: str = "x", dtype: torch.dtype | None = None, *, hold: bool = False) -> Tensor:
    """``x`` as a real floating tensor of shape ``(N, *event)`` with finite entries; see :mod:`ifpyro.data.arrays`.

    Raises:
        TypeError: if it is not an array of real numbers.
        ValueError: if it has no event axis, entries that are masked or not finite (with the indices of their rows), or
            columns that the dtype cannot hold, where ``hold`` asks for that.
    """
    x = as_rows(x, name, dtype, hold=hold)
    refuse_not_finite(x, name)
    return x


def as_rows(x: Any, name: str = "x", dtype: torch.dtype | None = None, *, hold: bool = False) -> Tensor:
    """``x`` as a real floating tensor of shape ``(N, *event)``, whatever its entries.

    Raises:
        TypeError: if it is not an array of real numbers.
        ValueError: if it has no event axis; see also :func:`as_samples`.
    """
    rows = as_real(x, name, dtype, hold=hold)
    if rows.ndim < 2:
        raise ValueError(
            f"expected {name} of shape (N, *event), got {tuple(rows.shape)}; for N scalars pass {name}[:, None]"
        )
    if rows.shape[1:].numel() == 0:
        raise ValueError(f"expected {name} with at least one column, got shape {tuple(rows.shape)}")
    return rows


def column_names(x: Any) -> list[Any] | None:
    """The names of a table's columns, None where there are none."""
    columns = getattr(x, "columns", None)
    return None if columns is None or isinstance(x, Tensor) else list(columns)


def refuse_not_finite(x: Tensor, name: str = "x", first: int = 0) -> None:
    """Refuse rows with NaN or infinity.

    Args:
        x: rows, ``(n, *event)``.
        name: what they are called.
        first: the index of the first of them, where ``x`` is a part of something larger.

    Raises:
        ValueError: with the indices of the rows.
    """
    bad = first + torch.nonzero(~x.flatten(1).isfinite().all(-1)).flatten()
    if len(bad):
        raise ValueError(
            f"expected finite entries, but {len(bad)} of {_among(x, first)} rows of {name} hold NaN or infinity: rows "
            f"{some(bad)}; drop or impute them"
        )


def check_trainable(x: Tensor, *, full_rank: bool = True) -> None:
    """Refuse unconstrained, flattened samples ``(N, D)`` that no flow can be trained on.

    Args:
        x: the samples.
        full_rank: whether their covariance must have full rank.

    Raises:
        ValueError: on too few rows, or constant columns (with their indices).
    """
    check_count(len(x), x.shape[1] if full_rank else 0)
    check_columns(x.min(0).values, x.max(0).values, x.dtype)


def check_count(rows: int, columns: int) -> None:
    """Refuse too few rows for a number of columns.

    Raises:
        ValueError: with how many are needed.
    """
    least = max(MINIMUM, columns + 2)
    if rows < least:
        raise ValueError(
            f"expected at least {least} training rows for {columns} columns (the covariance must have full "
            f"rank), got {rows}; collect more, reduce the columns first, or use basis='low_rank' ('separable' for "
            "images), which needs fewer"
        )


def check_columns(low: Tensor, high: Tensor, dtype: torch.dtype) -> None:
    """Refuse constant columns, given the smallest and largest value of each, ``(D,)``.

    Args:
        low: smallest values.
        high: largest values.
        dtype: of the data, whose rounding is no variation.

    Raises:
        ValueError: with the indices of the columns.
    """
    rounding = 1e-7 if dtype.itemsize < 8 else 1e-13
    constant = torch.nonzero(high - low <= rounding * torch.maximum(low.abs(), high.abs())).flatten()
    if len(constant):
        raise ValueError(
            f"expected columns that vary, but columns {some(constant)} of the flattened data are constant; drop "
            "them, or dequantise them (add uniform noise of one unit of resolution)"
        )


def to_unconstrained(x: Tensor, chart: Chart, name: str = "x", first: int = 0) -> Tensor:
    """Samples ``(N, *event)`` inside a support as flat rows ``(N, D)`` in unconstrained space.

    Args:
        x: the samples.
        chart: of the support.
        name: what they are called.
        first: the index of the first of them, where ``x`` is a part of something larger.

    Raises:
        ValueError: if rows are outside the support or on its boundary (with their indices).
    """
    bad = first + torch.nonzero(~chart.inside(x)).flatten()
    if len(bad):
        raise ValueError(
            f"expected every row of {name} strictly inside the support {in_words(chart.support)}, but {len(bad)} rows "
            f"are outside or on its boundary: rows {some(bad)}; drop them, shrink them inwards, or choose another "
            "support"
        )
    return chart.to_free(x).flatten(1)


def split(x: Tensor, validation: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training and validation rows: a random fraction of ``x``, or the given held-out rows.

    Raises:
        ValueError: if the fraction is not in (0, 1) or leaves no rows, or held-out rows have another event shape.
    """
    if isinstance(validation, Real):
        held_out = held_out_count(len(x), validation)
        order = torch.randperm(len(x), generator=generator).to(x.device)
        return x[order[held_out:]], x[order[:held_out]]
    return x, given_rows(validation, x.shape[1:], x.dtype).to(x.device)


def held_out_count(rows: int, fraction: Any) -> int:
    """How many of ``rows`` a fraction holds out, at least one.

    Raises:
        ValueError: if the fraction is not in (0, 1).
    """
    if isinstance(fraction, bool) or not 0 < fraction < 1:
        raise ValueError(
            f"validation expects a fraction in (0, 1) or held-out rows, got {fraction}; training stops early on "
            "these rows, so some are needed"
        )
    return max(1, round(rows * fraction))


def given_rows(validation: Any, event_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Held-out rows that the user gave.

    Raises:
        TypeError: if they are not an array of real numbers.
        ValueError: if there are none, or they have another event shape.
    """
    rows = as_samples(validation, "validation", dtype)
    if rows.shape[1:] != event_shape or len(rows) == 0:
        raise ValueError(
            f"expected validation rows of event shape {tuple(event_shape)}, got an array of shape {tuple(rows.shape)}"
        )
    return rows


def _among(x: Tensor, first: int) -> str:
    return f"{len(x)}" if first == 0 else f"the {len(x)} from {first} on of the"


def some(indices: Tensor) -> str:
    """The first ten of indices, for a message."""
    shown = ", ".join(str(i) for i in indices[:10].tolist())
    return f"[{shown}, ...]" if len(indices) > 10 else f"[{shown}]"
