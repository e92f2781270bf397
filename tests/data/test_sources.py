"""Data that are never loaded whole: the same flow as from memory, and the same errors."""

import h5py
import numpy as np
import pytest
import torch
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ifpyro
from flows_zoo import mixture_flow
from ifpyro.data import sources
from ifpyro.data.moments import Moments
from ifpyro.data.sources import ByIndex, Stream, open_source, row_hash
from ifpyro.flow.axes.basis import Basis
from ifpyro.training import Recipe, rows, streamed
from ifpyro.training import loop as run

OPTIONS = {
    "recipe": Recipe(max_steps=40, batch=64, shared=2, rate=2e-3, patience=1_000, check_every=10),
    "network": {"width": 16, "blocks": 1, "dropout": 0.0},
    "progress": False,
    "seed": 3,
}

LONGER = Recipe(max_steps=100, batch=128, shared=2, rate=2e-3, patience=1_000, check_every=50)


@pytest.fixture(scope="module")
def x():
    return mixture_flow(2, torch.float32).sample(700, seed=0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 50 rows, blocks of 200: everything has to be put together from pieces."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 50 * 8)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 200 * 8)


class Events(Dataset):
    def __init__(self, x):
        self.x, self.asked = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.x[i]


class Labelled(Events):
    def __getitem__(self, i):
        return self.x[i].numpy(), i % 3


class Passing(IterableDataset):
    def __init__(self, x):
        self.x, self.passes = x, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.x)


def memory_mapped(x, folder):
    np.save(folder / "x.npy", x.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


def stored(x, folder):
    path = folder / f"{len(list(folder.iterdir()))}.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=x.numpy(), chunks=(30, *x.shape[1:]))
    return h5py.File(path, "r")["x"]


BY_INDEX = {
    "memory-mapped": memory_mapped,
    "data set": lambda x, _: Events(x),
    "pairs": lambda x, _: Labelled(x),
    "tensor data set": lambda x, _: TensorDataset(x, torch.arange(len(x))),
}
STREAMS = {
    "iterable": lambda x, _: Passing(x),
    "loader": lambda x, _: DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=37),
    "shuffling loader": lambda x, _: DataLoader(TensorDataset(x), batch_size=37, shuffle=True),
    "HDF5": stored,
}


def loss(flow):
    return flow.report["training"]["validation_loss"]


def assert_close(a, b):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert loss(a) == pytest.approx(loss(b), rel=1e-4)


def test_moments_are_those_of_all_rows():
    """Chunk by chunk, far from zero, in single precision: as of one double precision tensor."""
    x = 1e3 + torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        5, 5, generator=torch.Generator().manual_seed(1)
    )
    moments = Moments(x[:10].mean(0))
    for chunk in x.split(77):
        moments.add(chunk)
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(x.double().T), rtol=1e-9, atol=1e-12)
    diagonal = Moments(x[:10].mean(0), full=False)
    diagonal.add(x)
    torch.testing.assert_close(diagonal.variance, moments.covariance.diagonal(), rtol=1e-9, atol=0)
    assert moments.count == 1000
    assert torch.equal(moments.low, x.min(0).values.double())
    assert torch.equal(moments.high, x.max(0).values.double())


@pytest.mark.parametrize("kind", BY_INDEX)
def test_the_same_flow_as_from_memory(x, tmp_path, kind):
    """Same seed, same split, same draws: what differs is the order in which sums are taken."""
    from_memory = ifpyro.fit(x, **OPTIONS)
    flow = ifpyro.fit(BY_INDEX[kind](x, tmp_path), **OPTIONS)
    assert_close(flow, from_memory)
    for key in ("rows", "validation_rows", "steps"):
        assert flow.report["training"][key] == from_memory.report["training"][key]
    assert flow.report["training"]["latents"]["mean"] == pytest.approx(
        from_memory.report["training"]["latents"]["mean"], rel=1e-3
    )


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_trains_and_never_sees_what_it_holds_out(x, tmp_path, monkeypatch, kind):
    seen = []
    original = run.velocity_loss

    def spy(network, data, *rest):
        if network.training:
            seen.append(data.reshape(-1, 2))
        return original(network, data, *rest)

    monkeypatch.setattr(run, "velocity_loss", spy)
    flow = ifpyro.fit(STREAMS[kind](x, tmp_path), **{**OPTIONS, "recipe": LONGER})
    report = flow.report["training"]
    assert report["rows"] + report["validation_rows"] == 700
    assert 40 < report["validation_rows"] < 100  # binomial, mean 70, standard deviation 8
    held_out = row_hash(x, 3) < 0.1
    seen = torch.cat(seen)
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(flow.basis.to_standard(x), seen, compute_mode=exact).min(1).values
    assert float(distance[held_out].min()) > 1e-5
    assert int((distance < 1e-5).sum()) == report["rows"]  # blocks have gone round the whole stream


@pytest.mark.parametrize("kind", STREAMS)
def test_resuming_a_stream_equals_never_stopping(x, tmp_path, monkeypatch, kind):
    whole = ifpyro.fit(STREAMS[kind](x, tmp_path), **OPTIONS)
    original, calls = run.velocity_loss, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 27:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "velocity_loss", interrupted)
        stopped = ifpyro.fit(STREAMS[kind](x, tmp_path), checkpoint=tmp_path / "checkpoint", **OPTIONS)
    assert stopped.report["training"]["stopped"] == "interrupted"
    resumed = ifpyro.fit(STREAMS[kind](x, tmp_path), checkpoint=tmp_path / "checkpoint", **OPTIONS)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_stream_of_one_block_is_read_once_and_no_more(x, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2**20)
    data = Passing(x)
    ifpyro.fit(data, **OPTIONS)
    assert data.passes == 3  # its first row, the moments, the block


def test_only_chunks_are_ever_asked_for(tmp_path, monkeypatch):
    """Of a large array no piece larger than a chunk, the batch, or what is kept is ever read."""
    monkeypatch.setattr(streamed, "KEPT", 100)
    monkeypatch.setattr(streamed, "MOST_HELD_OUT", 120)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2000 * 8)
    x = torch.randn(30_000, 2, generator=torch.Generator().manual_seed(0))
    source = open_source(memory_mapped(x, tmp_path))
    fetched, original = [], source._fetch
    source._fetch = lambda index: fetched.append(original(index)) or fetched[-1]
    monkeypatch.setattr("ifpyro.training.fitting.open_source", lambda *_: source)
    flow = ifpyro.fit(x, **OPTIONS)
    assert flow.report["training"]["validation_rows"] == 120
    assert flow.report["training"]["rows"] == 30_000 - 120
    assert max(map(len, fetched)) == 2000
    whole = Basis.from_samples(x)
    torch.testing.assert_close(flow.basis.scale, whole.scale, rtol=0.01, atol=0)


def test_hashes_are_uniform_and_depend_on_content_alone(x):
    y = torch.randn(20_000, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    hashes = row_hash(y, 0)
    assert ((hashes >= 0) & (hashes < 1)).all()
    counts = torch.histc(hashes, 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert torch.equal(row_hash(y.flip(0), 0), hashes.flip(0))
    assert float((row_hash(y, 1) < 0.1)[hashes < 0.1].double().mean()) == pytest.approx(0.1, abs=0.03)


def test_support_and_given_validation_rows(x, tmp_path):
    y = torch.sigmoid(x)
    options = {**OPTIONS, "support": constraints.unit_interval, "validation": y[:60]}
    from_memory = ifpyro.fit(y, **options)
    for data in (memory_mapped(y, tmp_path), Events(y)):
        assert_close(ifpyro.fit(data, **options), from_memory)
    assert ifpyro.fit(Passing(y), **options).report["training"]["rows"] == 700


@pytest.mark.parametrize("kind", ["low_rank", "identity"])
def test_bases_of_large_events(tmp_path, kind):
    """Without a matrix of covariances, from the rows that are kept: here, all of them."""
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 1, 12)
    options = {**OPTIONS, "basis": kind, "max_steps": 2}
    flow, from_memory = ifpyro.fit(memory_mapped(x, tmp_path), **options), ifpyro.fit(x, **options)
    torch.testing.assert_close(flow.basis.scale, from_memory.basis.scale, rtol=1e-3, atol=0)
    given = ifpyro.fit(Events(x), **{**options, "basis": from_memory.basis})
    assert torch.equal(given.basis.scale, from_memory.basis.scale)


class Ragged(Events):
    def __getitem__(self, i):
        return self.x[i][: 1 + (i != 4)]


class Once(IterableDataset):
    def __init__(self, x):
        self.rest = iter(x)

    def __iter__(self):
        return self.rest


def spoilt(x, *indices):
    x = x.clone()
    x[list(indices), 1] = torch.nan
    return x


ERRORS = {
    "NaN, by index": (lambda x, d: memory_mapped(spoilt(x, 123, 140), d), ValueError, r"2 of .* rows \[123, 140\]"),
    "NaN, stream": (lambda x, _: Passing(spoilt(x, 123)), ValueError, r"1 of .* rows of x hold NaN .* rows \[123\]"),
    "ragged": (lambda x, _: Ragged(x), ValueError, r"item 0 has shape \(2,\) and item 4 has \(1,\)"),
    "dictionaries": (lambda x, _: Passing([{"image": r} for r in x]), TypeError, r"a dictionary of \['image'\]"),
    "strings": (lambda x, _: Passing(["a", "b"]), TypeError, "arrays of real numbers"),
    "nothing": (lambda x, _: Passing([]), ValueError, "the stream ended at once"),
    "empty data set": (lambda x, _: Events(x[:0]), ValueError, "at least one row"),
    "only once": (lambda x, _: Once(x), ValueError, "read again"),
    "constant": (lambda x, _: Events(torch.cat([x, x[:, :1] * 0 + 2], 1)), ValueError, r"columns \[2\]"),
    "too few": (lambda x, _: Events(x[:10]), ValueError, "at least 16 training rows"),
    "collinear": (lambda x, _: Events(torch.cat([x, x[:, :1]], 1)), ValueError, "collinear"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_where(x, tmp_path, case):
    make, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        ifpyro.fit(make(x, tmp_path), **OPTIONS)


def test_what_is_in_memory_stays_there(x):
    for data in (x, x.numpy(), x.tolist()):
        assert open_source(data) is None
    assert isinstance(open_source(Events(x)), ByIndex)
    assert isinstance(open_source(Passing(x)), Stream)
