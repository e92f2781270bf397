"""Patches of the photographs that scikit-learn and scikit-image bring along: some for training, others held out."""

import numpy as np
import torch
from skimage import data as skimage_data
from sklearn.datasets import load_sample_images
from torch import Tensor

HELD_OUT = ("chelsea", "flower")
PARTS = ("train", "validation", "places", "photographs")
GRAIN = 0.01  # sd of the noise that stands for the camera's, on a scale from 0 (black) to 1 (white)


def photographs() -> dict[str, Tensor]:
    """Name -> image ``(3, H, W)`` between 0 and 1, at half its resolution."""
    china, flower = load_sample_images().images
    left, right = skimage_data.stereo_motorcycle()[:2]
    images = {"china": china, "flower": flower, "motorcycle": left, "motorcycle, other eye": right}
    images |= {name: getattr(skimage_data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    return {name: _half(torch.as_tensor(np.array(image))) for name, image in images.items()}


def patches(size: int, rows: int, part: str, *, seed: int = 0) -> Tensor:
    """Square patches at random places, half of them mirrored, with grain: ``(rows, 3, size, size)``.

    No pixel is in two parts.

    Args:
        size: pixels along an edge.
        rows: number of patches, the same from every photograph.
        part: ``"train"``: of the left three quarters of the photographs that are trained on; ``"validation"``: of
            the upper half of their last quarter; ``"places"``: of its lower half; ``"photographs"``: of photographs
            that are not trained on.
        seed: of places, mirrors and grain.
    """
    generator = torch.Generator().manual_seed(seed + 10_000 * PARTS.index(part))
    images = [_cut(image, part) for name, image in photographs().items() if (name in HELD_OUT) == (part == PARTS[-1])]
    found = []
    for image in images:
        windows = image.unfold(1, size, 1).unfold(2, size, 1)  # (3, h, w, size, size)
        h, w = windows.shape[1:3]
        count = -(-rows // len(images))
        top = torch.randint(h, (count,), generator=generator)
        left = torch.randint(w, (count,), generator=generator)
        chosen = windows[:, top, left].movedim(1, 0)
        mirrored = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).expand_as(chosen)
        found.append(torch.where(mirrored, chosen.flip(-1), chosen))
    stack = torch.cat(found)
    stack = stack[torch.randperm(len(stack), generator=generator)[:rows]]
    return stack + GRAIN * torch.randn(stack.shape, generator=generator)


def _cut(image: Tensor, part: str) -> Tensor:
    """The region of a photograph that belongs to a part."""
    h, w = image.shape[1:]
    edge, middle = 3 * w // 4, h // 2
    rows = {"validation": slice(middle), "places": slice(middle, h)}.get(part, slice(h))
    columns = {"train": slice(edge), "photographs": slice(w)}.get(part, slice(edge, w))
    return image[:, rows, columns]


def _half(image: Tensor) -> Tensor:
    channels = image.movedim(-1, 0).float() / 255
    return torch.nn.functional.avg_pool2d(channels.unsqueeze(0), 2)[0]
