"""Files: what is refused before work begins, and what crashes leave behind."""

import json
import os
import subprocess
import sys
import uuid

import pytest
import torch
from safetensors import safe_open

from ifpyro.core.files import check_writable, read_tensors, reading, try_to_write, write_atomically, write_tensors


def strays(path):
    return sorted(file.name for file in path.parent.iterdir() if file.name != path.name)


def left_by(path, process, host=None):
    """The name that a process gives to what it is writing."""
    with pytest.MonkeyPatch.context() as patch:
        names = []
        patch.setattr("os.getpid", lambda: process)
        if host is not None:
            patch.setattr("platform.node", lambda: host)
        write_atomically(path, lambda file: names.append(os.path.basename(file.name)))
    path.unlink()
    return path.with_name(names[0])


def test_what_a_killed_process_left_is_removed_at_the_next_write(tmp_path):
    path = tmp_path / "flow"
    killed = "import os, signal, sys; from ifpyro.core.files import write_atomically; "
    killed += "write_atomically(sys.argv[1], lambda file: os.kill(os.getpid(), signal.SIGKILL))"
    subprocess.run([sys.executable, "-c", killed, str(path)], check=False, env={**os.environ, "PYTHONPATH": "src"})
    assert len(strays(path)) == 1
    write_atomically(path, lambda file: file.write(b"whole"))
    assert strays(path) == []
    assert path.read_bytes() == b"whole"


def test_what_others_are_writing_stays(tmp_path):
    path = tmp_path / "flow"
    alive, elsewhere = left_by(path, os.getppid()), left_by(path, 1, "another")
    mine, other = left_by(path, os.getpid()), tmp_path / f".flow2.{uuid.uuid4().hex}.tmp"
    for file in (alive, elsewhere, mine, other):
        file.write_bytes(b"half")

    def write(file):
        write_atomically(path, lambda inner: inner.write(b"inner"))  # as another thread might
        file.write(b"outer")

    write_atomically(path, write)
    assert path.read_bytes() == b"outer"
    # an earlier process may have had the number of this one, as it does in a container that was started again
    assert strays(path) == sorted(file.name for file in (alive, elsewhere, other))


def test_what_cannot_be_written_is_noticed_first(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_writable(tmp_path / "no" / "file")
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    assert check_writable(str(tmp_path / "file")) == tmp_path / "file"
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"expected to write .*file, but cannot: No space left"):
        check_writable(tmp_path / "file")
    with pytest.raises(OSError, match="file cannot be written: No space left"):
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert list(tmp_path.iterdir()) == []


def test_writing_on_the_way_warns_and_goes_on(tmp_path):
    done = []
    assert try_to_write(lambda: done.append(1), "work goes on")
    with pytest.warns(UserWarning, match="cannot be written: .*; work goes on"):
        assert not try_to_write(lambda: write_atomically(tmp_path / "no" / "file", lambda _: None), "work goes on")
    with pytest.raises(ZeroDivisionError):  # a fault is no full disk
        try_to_write(lambda: 1 / 0, "work goes on")


def test_headers_are_strict_json_and_keep_what_json_lacks(tmp_path):
    header = {"a": [float("inf"), {"b": (-float("inf"), 1.0)}], "float": "x", "c": None}
    write_tensors(tmp_path / "file", {"x": torch.zeros(1)}, "test", {**header, "nan": float("nan")})

    def refuse(text):
        raise AssertionError(text)

    with safe_open(tmp_path / "file", framework="pt") as file:
        json.loads(file.metadata()["header"], parse_constant=refuse)
    found = read_tensors(tmp_path / "file", "test")[1]
    assert found.pop("nan") != found.get("nan", 0)
    assert found == {"a": [float("inf"), {"b": [-float("inf"), 1.0]}], "float": "x", "c": None}


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), RecursionError("x"), OverflowError("x"), MemoryError()]
)
def test_whatever_a_forged_header_causes_names_the_file(error):
    with (
        pytest.raises(ValueError, match="some/file does not hold a flow of this ifpyro"),
        reading("some/file", "a flow"),
    ):
        raise error
    with pytest.raises(ValueError, match="some/file: three"), reading("some/file", "a flow"):
        raise ValueError("three")


@pytest.mark.parametrize("header", ["[" * 100_000, "[1]", "{", "3"])
def test_a_header_of_another_kind_is_refused(tmp_path, monkeypatch, header):
    monkeypatch.setattr("ifpyro.core.files.json.dumps", lambda value, **options: DUMPS(value, **options))
    path = tmp_path / "file"

    def forged(value, **options):
        return header if options.get("allow_nan") is False else DUMPS(value, **options)

    monkeypatch.setattr("ifpyro.core.files.json.dumps", forged)
    write_tensors(path, {"x": torch.zeros(1)}, "test", {})
    with pytest.raises(ValueError, match="file"):
        read_tensors(path, "test")


DUMPS = json.dumps
