"""Data files for the command line: ``.npy``, ``.npz``, zarr, or a folder of images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IN_MEMORY = 2**30
"""Bytes up to which an array is loaded whole; larger ones are read piece by piece."""

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def open_data(
    path: str | Path, *, key: str | None = None, size: Sequence[int] | None = None, grey: bool = False, seed: int = 0
) -> Any:
    """What is in a file or folder, as :func:`ifpyro.fit` takes it; large data stay on disk.

    Args:
        path: ``x.npy``, ``x.npz``, a zarr array or group (a folder), or a folder of images.
        key: which array of a ``.npz`` or a zarr group, where there are several.
        size: height and width to which images are brought.
        grey: one channel instead of red, green and blue.
        seed: of the noise that dequantises images.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it holds no such data, or several arrays and no ``key``.
        ImportError: if a library is missing that reads them; the message says how to install it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected data at {path}, found nothing there")
    if path.suffix == ".npy":
        return _small(_numpy(path, mmap_mode="r"), path)
    if path.suffix == ".npz":
        archive = _numpy(path)
        if not hasattr(archive, "files"):  # an array under the name of an archive
            return _small(archive, path)
        with archive:
            name = _one_of({name: name for name in archive.files}, path, key)
            with _read_by_numpy(path):
                return _small(archive[name], path)
    if path.suffix == ".zarr" or any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")):
        return _zarr(path, key)
    if path.is_dir():
        return ImageFolder(path, size=size, grey=grey, seed=seed)
    raise ValueError(f"expected a .npy or .npz file, a zarr store or a folder of images, got {path}")


def load_rows(data: Any, rows: int, seed: int) -> Any:
    """At most ``rows`` random rows of what :func:`open_data` gave, in memory."""
    if getattr(data, "ndim", 1) == 0:
        return data  # whoever takes it says what is wrong with a lone number
    count = len(data) if hasattr(data, "__len__") else data.shape[0]
    if count <= rows:
        index = np.arange(count)
    else:
        index = np.sort(np.random.default_rng(seed).choice(count, rows, replace=False))
    if isinstance(data, ImageFolder):
        return torch.stack([data[int(i)] for i in index])
    picked = data.oindex[index] if hasattr(data, "oindex") else data[index]
    return np.array(picked)


class ImageFolder(Dataset[Tensor]):
    """Images in a folder and the folders in it, as tensors ``(C, H, W)`` in (0, 1).

    A grey value ``v`` in 0..255 becomes ``(v + u) / 256`` with ``u`` uniform, the same at every reading: without that
    noise the density of whole numbers would be infinite.

    Args:
        path: the folder.
        size: height and width: images are scaled until they cover it, and their middle is cut out; by default those of
            the first image.
        grey: one channel instead of three.
        seed: of the noise.

    Raises:
        ImportError: without Pillow.
        ValueError: if the folder holds no images, or one of them cannot be read.
    """

    def __init__(
        self, path: str | Path, *, size: Sequence[int] | None = None, grey: bool = False, seed: int = 0
    ) -> None:
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise ImportError("images are read by Pillow; install it with: pip install 'ifpyro[data]'") from error
        self._open, self._fit = Image.open, ImageOps.fit
        self.files = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in PICTURES)
        if not self.files:
            raise ValueError(f"expected a folder with images ({' '.join(PICTURES)}), found none in {path}")
        self._mode, self._seed = "L" if grey else "RGB", seed
        self._size = self._image(0).size if size is None else (int(size[1]), int(size[0]))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        image = self._image(i)
        if image.size != self._size:
            image = self._fit(image, self._size)
        values = np.asarray(image, dtype=np.float32).reshape(self._size[1], self._size[0], -1)
        noise = np.random.default_rng([self._seed, i]).random(values.shape, dtype=np.float32)
        return torch.from_numpy(((values + 1e-3 + 0.998 * noise) / 256).transpose(2, 0, 1).copy())

    def _image(self, i: int) -> Any:
        try:
            with self._open(self.files[i]) as file:
                return file.convert(self._mode)
        except OSError as error:
            raise ValueError(f"{self.files[i]} cannot be read as an image ({error})") from error


def _numpy(path: Path, **options: Any) -> Any:
    with _read_by_numpy(path):
        return np.load(path, allow_pickle=False, **options)


@contextmanager
def _read_by_numpy(path: Path) -> Iterator[None]:
    """What NumPy, zipfile or zlib say of a file that they cannot read, as one kind of error that names the file.

    A damaged archive shows itself only when an array is taken out of it, and in a dozen different ways.
    """
    try:
        yield
    except MemoryError as error:
        raise ValueError(
            f"{path} says that it holds more than fits into memory; it is damaged, or too large"
        ) from error
    except Exception as error:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a NumPy file of numbers ({told})") from error


def _small(x: Any, path: Path) -> np.ndarray:
    with _read_by_numpy(path):
        if not isinstance(x, np.ndarray):
            raise ValueError(f"it holds {type(x).__name__}")
        if x.dtype.kind not in "biuf":
            raise ValueError(f"it holds {x.dtype}, which are no real numbers")
        return np.array(x) if x.nbytes <= IN_MEMORY else x


def _one_of(arrays: Any, path: Path, key: str | None) -> Any:
    names = sorted(map(str, arrays))
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        asked = "found several" if key is None else f"found no {key!r}"
        raise ValueError(f"expected the name of one array in {path} (--key), {asked}: {', '.join(names) or 'none'}")
    return arrays[key]


def _zarr(path: Path, key: str | None) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError("zarr stores are read by zarr; install it with: pip install 'ifpyro[data]'") from error
    try:
        found: Any = zarr.open(str(path), mode="r")
    except Exception as error:  # zarr 2 and 3 raise different things
        raise ValueError(f"{path} cannot be read as a zarr store ({error})") from error
    if not hasattr(found, "shape"):
        found = _one_of(dict(found.arrays()), path, key)
    if found.nbytes > IN_MEMORY:
        return found
    try:
        return np.asarray(found[...])
    except Exception as error:  # a damaged chunk: every codec has errors of its own
        raise ValueError(f"{path} cannot be read as a zarr store ({error})") from error
