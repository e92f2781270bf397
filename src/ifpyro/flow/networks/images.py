r"""Networks on images: a convolutional network sees image space, whatever the axes of the flow.

A flow's state ``y`` lives on the axes of its basis, ``W``, in units of standard deviations; a convolution wants pixels.
:class:`ImageVelocity` therefore turns the state into the noised image, scaled to variance one, asks the network, and
turns the answer back:

.. math:: F(y, t) = \sin\theta \odot W^T N\!\left( \frac{W (s \odot y / \cos\theta)}{c(t)},\; t \right), \qquad
          c^2 = \frac1D \sum_j \frac{s_j^2}{\cos^2\theta_j} .

``N = 0`` is the linear (Wiener) denoiser ``x_0/s = cos theta y``: with ``F`` so parametrised the denoised state is
``cos theta y + sin^2 theta W^T N``. What the network adds vanishes where there is no noise, and an untrained network
that returns zero leaves the flow a Gaussian. With equal noise on all axes (``details_first``, any schedule in a basis
of one scale) the image is data plus white noise, as in Karras et al. (2022).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.basis import Basis
from ..axes.schedule import Angles
from .conditional import GivenVelocity
from .mlp import MLP
from .velocity import FramedVelocity, Velocity

_TIMES = 30.0  # radians of the fastest feature of time; with the 1000 of the DDPM family no fixed grid could follow it


class ImageVelocity(FramedVelocity):
    """The velocity of a network that maps noised images and times to images.

    Args:
        network: called as ``network(image, time)`` with images ``(n, *event_shape)`` of variance about one and times
            ``(n,)`` between 0 (data) and 30, spread as the square root of the flow's; returns images of the same
            shape. No batch normalisation. To start as a Gaussian its last layer must start at zero.
        event_shape: ``(C, H, W)``, or any other shape that the network takes.
        spec: plain data with which :func:`build_velocity` makes the network again; without it, ``ifpyro.load``
            takes an instance.
    """

    def __init__(self, network: nn.Module, event_shape: Sequence[int], spec: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.network = network
        self.event_shape = torch.Size(event_shape)
        self._spec = spec

    def attach(self, basis: Basis, angles: Angles) -> None:
        """Learn the axes; see :meth:`Velocity.attach`."""
        if basis.dim != self.event_shape.numel():
            raise ValueError(
                f"expected a flow of {self.event_shape.numel()} axes for images {tuple(self.event_shape)}, got "
                f"{basis.dim}"
            )
        super().attach(basis, angles)

    def embed(self, t: Tensor) -> Tensor:
        """The network's time, the gain of every axis into the image, and the sines: ``(m, 1 + 2 D)``."""
        basis, angles = self.frame()
        theta = angles(t)
        gain = basis.scale.to(theta) / theta.cos()
        gain = gain / gain.square().mean(-1, keepdim=True).sqrt()
        return torch.cat([_TIMES * t.sqrt().unsqueeze(-1), gain, theta.sin()], -1).to(basis.scale)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Velocity ``F`` of shape ``(n, D)``."""
        basis, _ = self.frame()
        time, gain, sine = embedding.split([1, basis.dim, basis.dim], -1)
        batch = y.shape[:-1]  # training puts rows that share a time on an axis of their own
        image = basis.rotate_back(y * gain).reshape(-1, *self.event_shape)
        out = self.network(image, time.squeeze(-1).expand(batch).reshape(-1))
        return sine * basis.rotate(out.reshape(*batch, basis.dim))

    def spec(self) -> dict[str, Any] | None:
        """What :func:`build_velocity` needs, or None."""
        return self._spec


class _UNet(nn.Module):
    """A U-Net of ``diffusers`` on images whose ``patch`` x ``patch`` squares are stacked as channels."""

    def __init__(self, event_shape: Sequence[int], channels: Sequence[int], layers: int, patch: int, groups: int):
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError("unet() needs diffusers: pip install 'ifpyro[images]'") from error
        depth, height, width = event_shape
        self.patch = patch
        self.net: Any = UNet2DModel(
            sample_size=(height // patch, width // patch),
            in_channels=depth * patch**2,
            out_channels=depth * patch**2,
            layers_per_block=layers,
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            norm_num_groups=groups,
            add_attention=False,
        )
        nn.init.zeros_(self.net.conv_out.weight)
        nn.init.zeros_(self.net.conv_out.bias)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        small = nn.functional.pixel_unshuffle(image, self.patch)
        return nn.functional.pixel_shuffle(self.net(small, time, return_dict=False)[0], self.patch)


def unet(
    event_shape: Sequence[int],
    channels: Sequence[int] = (32, 64),
    *,
    layers: int = 1,
    patch: int = 1,
    groups: int = 8,
) -> ImageVelocity:
    """The velocity of a U-Net (``UNet2DModel`` of the diffusers library), zero until it is trained.

    Args:
        event_shape: images ``(C, H, W)``; ``H`` and ``W`` divisible by ``patch * 2^(len(channels) - 1)``.
        channels: of every resolution, each divisible by ``groups``.
        layers: residual blocks at every resolution.
        patch: squares of this size are stacked as channels before the first layer: a network ``patch^2`` times
            cheaper.
        groups: of the group normalisation.

    Raises:
        ImportError: without diffusers (``pip install 'ifpyro[images]'``).
        ValueError: on sizes that do not divide.
    """
    shape = torch.Size(event_shape)
    factor = patch * 2 ** (len(channels) - 1)
    if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"unet expects images (C, H, W) with H and W divisible by patch * 2^(levels - 1) = {factor}, got "
            f"{tuple(shape)}"
        )
    if any(c % groups for c in channels):
        raise ValueError(f"unet expects channels divisible by groups={groups}, got {tuple(channels)}")
    options = {"channels": list(channels), "layers": layers, "patch": patch, "groups": groups}
    spec = {"kind": "unet", "event_shape": list(shape), **options}
    return ImageVelocity(_UNet(shape, channels, layers, patch, groups), shape, spec)


def build_velocity(spec: dict[str, Any]) -> Velocity:
    """The module that :meth:`Velocity.spec` described."""
    options = dict(spec)
    kind = options.pop("kind", None)
    makers: dict[str, Callable[..., Velocity]] = {"mlp": MLP, "unet": unet, "given": _given}
    if kind not in makers:
        raise ValueError(f"expected a network of kind {sorted(makers)}, got {kind!r}")
    return makers[kind](**options)


def _given(inner: dict[str, Any], size: int) -> Velocity:
    return GivenVelocity(build_velocity(inner), torch.zeros(size))
