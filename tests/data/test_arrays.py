"""What comes in, and the dtype in which it is held."""

from contextlib import contextmanager

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from torch.utils.data import DataLoader, Dataset, IterableDataset

import ifpyro
from ifpyro.data.arrays import as_real
from ifpyro.data.samples import as_samples
from ifpyro.training import Recipe

RECIPE = Recipe(max_steps=20, batch=64, shared=2, rate=2e-3, check_every=10)
OPTIONS = {"recipe": RECIPE, "network": {"width": 16, "blocks": 1}, "progress": False, "seed": 0}
X = np.random.default_rng(0).standard_normal((200, 2))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- dtypes ---------------------------------------------------------------------------------------------------------


def column(offset, sd, dtype=np.float64):
    return np.stack([(offset + sd * X[:, 0]).astype(dtype), X[:, 1].astype(dtype)], 1)


HELD = {
    "numpy": (X, torch.float32),
    "single precision": (X.astype(np.float32), torch.float32),
    "a double tensor": (torch.tensor(X), torch.float64),
    "half precision": (X.astype(np.float16), torch.float32),
    "a half tensor": (torch.tensor(X).bfloat16(), torch.float32),
    "extended precision": (X.astype(np.longdouble), torch.float32),
    "extended, with an offset": (column(2459123.4567, 0.02, np.longdouble), torch.float64),
    "Julian dates": (column(2459123.4567, 0.02), torch.float64),
    "modified Julian dates": (column(59123.4567, 100.0), torch.float32),
    "GPS seconds": (column(1126259462.4, 0.1), torch.float64),
    "a carrier frequency": (column(1.42e9, 20.0), torch.float64),
    "years": (column(2015, 1.0), torch.float32),
    "whole numbers": (np.round(1000 * X).astype(np.int64), torch.float32),
    "time stamps": ((1_700_000_000 + np.round(1000 * X)).astype(np.int64), torch.float64),
    "time stamps as a tensor": (torch.tensor(1_700_000_000 + np.round(1000 * X)).long(), torch.float64),
    "unsigned time stamps": ((1_700_000_000 + np.round(1000 * X)).astype(np.uint32), torch.float64),
    "large whole numbers that are held": (np.round(1e12 * X).astype(np.int64), torch.float32),
    "beyond single precision": (1e60 * X, torch.float64),
    "below single precision": (1e-42 * X, torch.float64),
    "booleans": (X > 0, torch.float32),
    "bytes": ((50 * X + 100).astype(np.uint8), torch.float32),
    "words": ((50 * X + 1000).astype(np.uint16), torch.float32),
    "a list": (X.tolist(), torch.float32),
    "a list of tensors": (list(torch.tensor(X, requires_grad=True)), torch.float32),
    "big-endian": (X.astype(">f8"), torch.float32),
    "big-endian integers": (np.round(1000 * X).astype(">i2"), torch.float32),
    "every other row, backwards": (np.repeat(X, 2, 0)[::-2], torch.float32),
    "a table": (pd.DataFrame(X), torch.float32),
    "a table of nullable numbers": (pd.DataFrame(X).convert_dtypes(), torch.float32),
    "masked, nothing of it": (np.ma.masked_greater(X, 1e9), torch.float32),
}


@pytest.mark.parametrize("name", HELD)
def test_the_dtype_holds_the_data(name):
    x, dtype = HELD[name]
    found = as_samples(x, hold=True)
    assert found.dtype == dtype
    if name == "a list of tensors":
        x = torch.stack(x).detach()
    wanted = np.asarray(x.double() if isinstance(x, torch.Tensor) else x, np.longdouble)
    sd = wanted.std(0)
    assert (np.abs(found.numpy() - wanted) <= 1e-3 * sd).all()
    assert as_samples(x, dtype=torch.float64).dtype == torch.float64


def test_the_default_dtype_decides_what_states_nothing():
    with default_dtype(torch.float64):
        assert as_real(X).dtype == torch.float64
        assert as_real(X.astype(np.float32)).dtype == torch.float32
        assert as_real(torch.tensor(X).float()).dtype == torch.float32
    with default_dtype(torch.float16):
        assert as_real(X).dtype == torch.float32


def test_a_dtype_that_cannot_hold_a_column_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"torch.float32 can hold, .* columns \[0\] .* pass dtype=torch.float64"):
        ifpyro.fit(column(2459123.4567, 0.02), dtype=torch.float32, **OPTIONS)
    nanoseconds = 1_700_000_000_000_000_000 + np.round(1000 * X).astype(np.int64)
    with pytest.raises(ValueError, match=r"torch.float64 can hold, .* columns \[0, 1\] .* subtract an offset first"):
        ifpyro.fit(nanoseconds, **OPTIONS)
    with pytest.raises(ValueError, match=r"dtype expects torch.float32, torch.float64 or None, got torch.float16"):
        ifpyro.fit(X, dtype=torch.float16, **OPTIONS)
    with pytest.raises(ValueError, match=r"dtype expects .* got 'float64'"):
        ifpyro.fit(X, dtype="float64", **OPTIONS)


def test_julian_dates_are_learnt():
    x = column(2459123.4567, 0.02)
    flow = ifpyro.fit(x, **OPTIONS)
    assert flow.dtype == torch.float64
    draws = flow.sample(2000, seed=0)[:, 0]
    assert len(draws.unique()) == 2000
    assert abs(float(draws.mean()) - x[:, 0].mean()) < 5 * 0.02 / np.sqrt(200)
    assert float(draws.std()) == pytest.approx(0.02, rel=0.2)
    torch.testing.assert_close(flow.decode(flow.encode(x)), torch.tensor(x), rtol=0, atol=1e-7)


def test_time_stamps_are_learnt():
    stamps = HELD["time stamps"][0]
    flow = ifpyro.fit(stamps, **OPTIONS)
    assert len(flow.sample(4000, seed=0)[:, 0].unique()) == 4000
    assert flow.log_prob(stamps).isfinite().all()


def test_rounding_is_no_variation_in_double_precision_either():
    x = np.stack([X[:, 0], 5.0 + 1e-15 * X[:, 1]], 1)
    with pytest.raises(ValueError, match=r"columns \[1\] of the flattened data are constant"):
        ifpyro.fit(x, dtype=torch.float64, **OPTIONS)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_fit_does_not_depend_on_the_default_dtype(dropout):
    options = {**OPTIONS, "network": {"width": 16, "blocks": 1, "waves": 1, "dropout": dropout}}
    x = torch.tensor(X).float()
    flow = ifpyro.fit(x, **options)
    with default_dtype(torch.float64):
        again = ifpyro.fit(x, **options)
        assert again.dtype == torch.float32
        assert torch.equal(again.sample(5, seed=1), flow.sample(5, seed=1))
    for name, value in flow.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def test_the_dtype_changes_the_precision_alone():
    single, double = (ifpyro.fit(X, dtype=dtype, **OPTIONS) for dtype in (torch.float32, torch.float64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.log_prob(X).double(), double.log_prob(X), rtol=0, atol=2e-3)


# -- what cannot come in --------------------------------------------------------------------------------------------


def masked(shape=(200, 2), rows=(3, 150)):
    x = np.ma.masked_array(np.resize(X, shape), np.zeros(shape, bool))
    x[list(rows)] = np.ma.masked
    x.data[list(rows)] = -999.0
    return x


BAD = {
    "masked entries": (masked(), ValueError, r"no masked entries, but 2 of 200 rows of x hold some: rows \[3, 150\]"),
    "masked events": (masked((200, 2, 2)), ValueError, r"rows \[3, 150\]; drop or impute them"),
    "masked rows in a list": (list(masked()), ValueError, r"rows \[3, 150\]"),
    "missing in a table": (
        pd.DataFrame(X).mask(np.abs(X) > 3).convert_dtypes(),
        ValueError,
        r"3 of 200 rows of x hold NaN",
    ),
    "unequal rows": ([[1.0, 2.0], [1.0]] * 20, TypeError, "cannot be made one .* one length"),
    "dates": (np.array(["2020-01-01"] * 40, "M8[s]").reshape(20, 2), TypeError, r"numpy.timedelta64\(1, 's'\)"),
    "records": (np.zeros(20, [("a", "f8"), ("b", "f8")]), TypeError, "structured_to_unstructured"),
    "text in a table": (pd.DataFrame({"a": ["x"] * 20, "b": [1.0] * 20}), TypeError, "array of real numbers"),
    "complex": (X + 1j, TypeError, "stack real and imaginary parts as columns"),
    "sparse": (torch.tensor(X).to_sparse(), TypeError, r"a dense tensor, got layout torch.sparse_coo; use x.to_dense"),
    "sparse rows": (torch.tensor(X).to_sparse_csr(), TypeError, "a dense tensor, got layout torch.sparse_csr"),
    "nested": (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), TypeError, "a dense tensor"),
    "meta": (torch.zeros(40, 2, device="meta"), TypeError, "to hold data, got a tensor on the meta device"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_come_in(name):
    x, kind, message = BAD[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        ifpyro.fit(x, **OPTIONS)


def test_masked_rows_are_refused_wherever_data_come_in():
    flow = ifpyro.fit(X, **OPTIONS)
    for use in (
        lambda x: ifpyro.fit(X, validation=x, **OPTIONS),
        lambda x: ifpyro.check(flow, x),
        lambda x: ifpyro.check(flow, X, train=x),
        flow.log_prob,
        flow.encode,
    ):
        with pytest.raises(ValueError, match=r"masked entries, but 2 of 200 rows"):
            use(masked())


# -- data that are never loaded whole -------------------------------------------------------------------------------


class Items(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i]


class Passing(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def memmap(x, folder):
    np.asarray(x).tofile(folder / "x.bin")
    return np.memmap(folder / "x.bin", dtype=x.dtype, mode="r", shape=x.shape)


def hdf5(x, folder):
    path = folder / f"{len(list(folder.iterdir()))}.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x, chunks=(50, 2))
    return h5py.File(path, "r")["x"]


def stored(x, folder):
    array = zarr.open(str(folder / "x.zarr"), mode="w", shape=x.shape, chunks=(50, 2), dtype=x.dtype)
    array[:] = x
    return zarr.open(str(folder / "x.zarr"), mode="r")


SOURCES = {
    "memmap": memmap,
    "hdf5": hdf5,
    "zarr": stored,
    "data set": lambda x, folder: Items(x),
    "stream": lambda x, folder: Passing(x),
    "loader": lambda x, folder: DataLoader(Items(x.astype(x.dtype.newbyteorder("="))), batch_size=40),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_of_any_byte_order_and_offset(name, tmp_path):
    recipe = {**OPTIONS, "recipe": Recipe(max_steps=2, batch=64, shared=2, rate=2e-3, check_every=10)}
    flow = ifpyro.fit(SOURCES[name](X.astype(">f8"), tmp_path), **recipe)
    assert flow.dtype == (torch.float64 if name == "loader" else torch.float32)  # a loader makes tensors
    dates = column(2459123.4567, 0.02, ">f8")
    flow = ifpyro.fit(SOURCES[name](dates, tmp_path), **recipe)
    assert flow.dtype == torch.float64
    assert float(flow.basis.mean[0]) == pytest.approx(2459123.4567, abs=0.01)
    if name != "loader":
        assert ifpyro.fit(SOURCES[name](X.astype(">f4"), tmp_path), **recipe).dtype == torch.float32
        with pytest.raises(ValueError, match=r"torch.float32 can hold, .* columns \[0\]"):
            ifpyro.fit(SOURCES[name](dates, tmp_path), dtype=torch.float32, **recipe)


def test_validation_and_check_take_any_byte_order():
    flow = ifpyro.fit(X.astype(">f8"), validation=X[:50].astype(">f4"), **OPTIONS)
    assert ifpyro.check(flow, X.astype(">f8"), store=False).rows
