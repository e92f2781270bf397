"""Data files that are damaged: one kind of error, which names the file."""

import io
import zipfile

import numpy as np
import pytest

from ifpyro.cli.main import main
from ifpyro.data.files import open_data

ROWS = np.random.default_rng(0).normal(size=(40, 3)).astype("f4")


def written(path, ending):
    if ending == "npy":
        np.save(path, ROWS)
    elif ending == "npz":
        np.savez(path, x=ROWS)
    else:
        np.savez_compressed(path, x=ROWS)
    return path.read_bytes()


@pytest.mark.parametrize("ending", ["npy", "npz", "compressed.npz"])
def test_damaged_anywhere_is_read_or_refused(tmp_path, ending):
    """Flipped bits, cuts and insertions; what still reads has plain numbers in it."""
    path = tmp_path / f"x.{ending}"
    content, rng = written(path, ending), np.random.default_rng(1)
    told = []
    for trial in range(400):
        damaged = bytearray(content)
        # Headers and directories, at both ends, are where it is most interesting.
        at = int(rng.integers(0, 160)) if trial % 2 else int(rng.integers(max(0, len(content) - 160), len(content)))
        if trial % 5 == 0:
            damaged = damaged[:at]
        elif trial % 5 == 1:
            damaged[at:at] = bytes(rng.integers(0, 256, 3, dtype=np.uint8))
        else:
            damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            found = open_data(path)
        except ValueError as error:
            told.append(str(error))
        else:
            assert found.dtype.kind in "biuf"
    assert len(told) > 100
    assert all(str(path) in text and len(text) < 1000 for text in told)


def header(text):
    """A .npy file that says of itself what it likes."""
    body = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def archive(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


HOSTILE = {
    "huge.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 1000), }"),
    "negative.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 3), }"),
    "no shape.npy": header("{'descr': '<f8', 'fortran_order': False, }"),
    "code.npy": header("__import__('os').getcwd()"),
    "deep.npy": header("(" * 5000),
    "record.npy": header("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,), }") + b"\0" * 8,
    "strings.npy": header("{'descr': '<U4', 'fortran_order': False, 'shape': (1,), }") + b"\0" * 16,
    "empty.npy": b"",
    "empty.npz": b"",
    "no arrays.npz": archive(),
    "not an array.npz": archive(x=b"hello"),
    "text.npz": b"hello" * 100,
    "pickle.npy": b"\x80\x04\x95" + b"\0" * 40,
    "empty array.npz": archive(**{"x.npy": b""}),
    "huge.npz": archive(**{"x.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999, 99), }")}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_exit_with_2_and_one_line(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    assert main(["fit", str(tmp_path / name), "--out", str(tmp_path / "flow"), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert str(tmp_path / name) in captured.err


def test_an_array_under_the_name_of_an_archive(tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, ROWS)
    assert np.array_equal(open_data(tmp_path / "x.npz"), ROWS)
    np.savez(tmp_path / "y.npz", a=ROWS, b=2 * ROWS)
    assert np.array_equal(open_data(tmp_path / "y.npz", key="b"), 2 * ROWS)
