r"""What comes in: any array of real numbers as a tensor, in a precision that holds it.

The dtype of a flow is decided here. Tensors of single or double precision keep theirs, and so do arrays of single
precision. Everything else (NumPy's double precision, which is its default and no statement, integers, half precision,
lists, tables) becomes torch's default dtype; double precision instead, where single precision cannot hold a column,
that is, where rounding to it,

.. math:: \tfrac12 \epsilon \max_i |x_i|,

moves values by more than a thousandth of the column's standard deviation (times of day in Julian dates, frequencies in
Hz), or where the column leaves the range of single precision.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERATED = 1e-3
"""Rounding, in standard deviations of a column, up to which a dtype holds it."""

_CHUNK = 65_536  # rows that are converted at a time to see whether they can be held
_STATED = (torch.float32, torch.float64)


def as_real(x: Any, name: str = "x", dtype: torch.dtype | None = None, *, hold: bool = False) -> Tensor:
    """``x`` as a real floating tensor without gradients, whatever its shape and entries.

    Args:
        x: a tensor, an array (a masked one too, if nothing in it is masked), a table, or a list of numbers.
        name: what it is called.
        dtype: of the result; by default as this module says.
        hold: whether to refuse columns that the dtype cannot hold.

    Raises:
        TypeError: if it is not a dense array of real numbers.
        ValueError: if entries are masked, rows have unequal lengths, or no dtype holds a column.
    """
    if isinstance(x, Tensor):
        x = _dense(x.detach(), name)
        stated = x.dtype in _STATED
    else:
        array = as_array(x, name)
        stated = array.dtype == np.float32
        x = torch.from_numpy(array)
    if dtype is None:
        dtype = x.dtype if stated else _default(x)
    lost = _lost(x, dtype) if hold else []
    if lost:
        remedy = "subtract an offset first" if dtype == torch.float64 else "pass dtype=torch.float64"
        raise ValueError(
            f"expected columns of {name} that {dtype} can hold, but rounding to it moves columns {lost[:10]} of the "
            f"flattened data by more than a thousandth of their standard deviation; {remedy}"
        )
    return x.to(dtype)


def as_array(x: Any, name: str = "x") -> np.ndarray:
    """``x`` as a writable array of real numbers that torch can read.

    Raises:
        TypeError: if it holds anything else.
        ValueError: if entries are masked, or rows have unequal lengths.
    """
    array = _array(x, name)
    kind = array.dtype.kind
    if kind not in "fiub":
        raise TypeError(f"expected {name} to be an array of real numbers, got dtype {array.dtype}; {_advice(array)}")
    if kind == "f" and array.dtype.itemsize > 8:  # extended precision
        wanted: np.dtype[Any] = np.dtype(np.float64)
    elif kind == "u" and array.dtype.itemsize > 1:  # of which torch knows little
        wanted = np.dtype({2: np.int32, 4: np.int64, 8: np.float64}[array.dtype.itemsize])
    else:
        wanted = array.dtype.newbyteorder("=")
    native = np.ascontiguousarray(array, dtype=wanted).reshape(array.shape)
    return native if native.flags.writeable else native.copy()


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse what no flow can be made of.

    Raises:
        ValueError: unless it is single or double precision, or None.
    """
    if dtype is not None and dtype not in _STATED:
        raise ValueError(f"dtype expects torch.float32, torch.float64 or None, got {dtype!r}")


def _default(x: Tensor) -> torch.dtype:
    default = torch.get_default_dtype()
    if default not in _STATED:
        default = torch.float32
    return torch.float64 if _lost(x, default) else default


def _lost(x: Tensor, dtype: torch.dtype) -> list[int]:
    """The flattened columns that a dtype cannot hold."""
    narrow = x.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)
    if narrow or x.dtype == dtype or x.ndim < 2 or x.numel() == 0:
        return []
    parts = x.flatten(1).split(_CHUNK)
    extremes = [(part.amin(0), part.amax(0), part.sum(0)) for part in map(_finite, parts)]
    lows, highs, sums = (torch.stack(column) for column in zip(*extremes, strict=True))
    low, high, mean = lows.amin(0), highs.amax(0), sums.sum(0) / len(x)
    squares = torch.stack([(_finite(part) - mean).square().sum(0) for part in parts]).sum(0)
    largest, sd = torch.maximum(low.abs(), high.abs()), (squares / len(x)).sqrt()
    rounded = 0.5 * torch.finfo(dtype).eps * largest > TOLERATED * sd
    out_of_range = (largest > torch.finfo(dtype).max / 16) | (sd < 1e3 * torch.finfo(dtype).tiny)
    return torch.nonzero((high > low) & (rounded | out_of_range)).flatten().tolist()


def _finite(x: Tensor) -> Tensor:
    """In double precision, with zero in place of what is refused elsewhere."""
    return torch.nan_to_num(x.double(), 0.0, 0.0, 0.0)


def _dense(x: Tensor, name: str) -> Tensor:
    if x.is_complex():
        raise TypeError(f"expected {name} to be real, got {x.dtype}; stack real and imaginary parts as columns")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"expected {name} to be a dense tensor, got layout {x.layout}; use {name}.to_dense()")
    if x.is_meta:
        raise TypeError(f"expected {name} to hold data, got a tensor on the meta device")
    return x.dequantize() if x.is_quantized else x


def _array(x: Any, name: str) -> np.ndarray:
    if isinstance(x, list | tuple) and x and all(isinstance(part, Tensor) for part in x):
        x = [_dense(part.detach(), name).cpu().numpy() for part in x]
    if isinstance(x, list | tuple) and any(isinstance(part, np.ma.MaskedArray) for part in x):
        x = np.ma.stack([np.ma.asarray(part) for part in x])
    try:
        array = x if isinstance(x, np.ndarray) else np.asarray(x)
        if array.dtype.kind == "O" and hasattr(x, "to_numpy"):  # a table whose missing values are objects
            array = x.to_numpy(dtype=float, na_value=np.nan)
    except (ValueError, TypeError) as error:
        raise TypeError(
            f"expected {name} to be an array of real numbers, but it cannot be made one ({error}); rows must have one "
            "length, and entries must be numbers"
        ) from error
    if isinstance(array, np.ma.MaskedArray):
        _refuse_masked(array, name)
        array = array.data
    return array


def _refuse_masked(array: np.ma.MaskedArray, name: str) -> None:
    masked = np.ma.getmaskarray(array)
    if masked.any():
        rows = np.flatnonzero(masked.reshape(len(masked), -1).any(1)) if masked.ndim else np.array([0])
        shown = ", ".join(map(str, rows[:10].tolist())) + (", ..." if len(rows) > 10 else "")
        raise ValueError(
            f"expected no masked entries, but {len(rows)} of {len(masked) if masked.ndim else 1} rows of {name} hold "
            f"some: rows [{shown}]; drop or impute them"
        )


def _advice(array: np.ndarray) -> str:
    if array.dtype.kind in "Mm":
        return "subtract a reference time and divide by a unit: (t - t.min()) / numpy.timedelta64(1, 's')"
    if array.dtype.kind == "V":
        return "stack its fields: numpy.lib.recfunctions.structured_to_unstructured"
    if array.dtype.kind == "c":
        return "stack real and imaginary parts as columns"
    if array.ndim == 0 and array.dtype.kind == "O":
        return "pass a dense array"
    return "encode categories as numbers and drop identifiers first"
