"""Files: tensors in safetensors with JSON metadata, written atomically, verified on reading. No pickle."""

import hashlib
import json
import math
import os
import platform
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .arguments import check_path

FORMAT_VERSION = 2

_writing: set[str] = set()  # temporary files of this process that are being written
_writing_lock = threading.Lock()


def write_tensors(path: str | Path, tensors: dict[str, Tensor], kind: str, header: dict[str, Any]) -> None:
    """Write tensors and plain data to one file; a crash leaves the old file or the new one, never half of one.

    Args:
        path: where to.
        tensors: what to write.
        kind: what the file is, checked by :func:`read_tensors`.
        header: JSON-serialisable data. Numbers that are not finite are kept, although JSON has none.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "format": f"ifpyro-{kind}",
        "format_version": str(FORMAT_VERSION),
        "header": json.dumps(_strict(header), allow_nan=False),
    }
    content = save(tensors, {**metadata, "sha256": _digest(tensors, metadata)})
    write_atomically(path, lambda file: file.write(content))


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one.

    What a killed process left half written beside it is removed.

    Args:
        path: where to.
        write: writes the content to an open file.

    Raises:
        OSError: if it cannot be written; the message names ``path``.
    """
    path = Path(path)
    _remove_left_over(path)
    temporary = _temporary(path)
    with _writing_lock:
        _writing.add(temporary.name)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        with _writing_lock:
            _writing.discard(temporary.name)


def try_to_write(write: Callable[[], Any], left: str) -> bool:
    """Write in the middle of long work, which goes on, with a warning, if a disk is full or a folder gone.

    Args:
        write: writes a file.
        left: what goes on without it, for the warning: ``"training goes on"``.

    Returns:
        whether it was written.
    """
    try:
        write()
    except OSError as error:
        warnings.warn(f"{error}; {left}, and what was written before stays", stacklevel=3)
        return False
    return True


def check_writable(path: str | Path) -> Path:
    """``path``, refused now if nothing could be written there after hours of work.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if ``path`` is a folder.
        OSError: if nothing can be written in its folder.
    """
    path = check_path("the file to write", path)
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"expected to write {path}, but there is no folder {folder}; make it first")
    if path.is_dir():
        raise ValueError(f"expected a file to write, but {path} is a folder")
    probe = _temporary(path)
    try:
        with open(probe, "xb") as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise type(error)(error.errno, f"expected to write {path}, but cannot: {error.strerror or error}") from error
    finally:
        probe.unlink(missing_ok=True)
    return path


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that says who is writing it."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex}.tmp")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32]


def _remove_left_over(path: Path) -> None:
    """Remove temporary files of ``path`` whose writer, a process of this machine, is gone."""
    if os.name != "posix":
        return  # elsewhere one cannot ask whether a process lives without disturbing it
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{_host()}-(\d+)-[0-9a-f]{{32}}\.tmp")
    try:
        names = os.listdir(path.parent)
    except OSError:
        return  # writing will say what is wrong
    for name in names:
        if (found := pattern.fullmatch(name)) is None:
            continue
        writer = int(found[1])
        with _writing_lock:
            lives = name in _writing if writer == os.getpid() else _lives(writer)
        if not lives:
            path.with_name(name).unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's, or not for us to know
    return True


def _strict(value: Any) -> Any:
    """Plain data without the numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _loose(value: dict[str, Any]) -> Any:
    return float(value["float"]) if value.keys() == {"float"} and isinstance(value["float"], str) else value


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Say of what a file's header lacks, or has of another kind, that the file is not a flow, a checkpoint, ...

    A checksum shows damage, not what somebody has written on purpose.

    Raises:
        ValueError: for whatever goes wrong inside the block; the message names the file.
    """
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
        AssertionError,
    ) as error:
        raise ValueError(
            f"{path} does not hold {what} of this ifpyro ({type(error).__name__}: {error}); write it again"
        ) from error


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, not one of ours, of another kind, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file written by ifpyro at {path}, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); the file is damaged or was not written by ifpyro"
        ) from error
    found = metadata.get("format")
    if found != f"ifpyro-{kind}":
        raise ValueError(f"expected a file of format 'ifpyro-{kind}', but {path} says {found!r}")
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, newer than the {FORMAT_VERSION} that this ifpyro reads; upgrade "
            "ifpyro"
        )
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content does not match the checksum written with it")
    with reading(path, f"a {kind}"):
        header = json.loads(metadata["header"], object_hook=_loose)
        if not isinstance(header, dict):
            raise ValueError(f"its header is no dictionary but {type(header).__name__}")
    return tensors, header


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
