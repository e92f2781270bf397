"""Files: tensors in safetensors with JSON metadata, written atomically, verified on reading. No pickle."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT_VERSION = 2


def write_tensors(path: str | Path, tensors: dict[str, Tensor], kind: str, header: dict[str, Any]) -> None:
    """Write tensors and plain data to one file; a crash leaves the old file or the new one, never half of one.

    Args:
        path: where to.
        tensors: what to write.
        kind: what the file is, checked by :func:`read_tensors`.
        header: JSON-serialisable data.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "format": f"ifpyro-{kind}",
        "format_version": str(FORMAT_VERSION),
        "header": json.dumps(header),
    }
    content = save(tensors, {**metadata, "sha256": _digest(tensors, metadata)})
    write_atomically(path, lambda file: file.write(content))


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one.

    Args:
        path: where to.
        write: writes the content to an open file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    return tensors, json.loads(metadata["header"])


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
