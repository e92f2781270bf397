r"""What the time of a pretrained diffusion network means: its noise, and the scale of the image that it is shown.

A diffusion network sees ``alpha (x_0 + sigma n)``, ``n ~ N(0, I)``, at a time of its own. ``sigma``, the ratio of noise
to signal, identifies the place on every such path; the network's time and ``alpha`` follow from it:

================  =======================================  ==========================================================
path              given as                                 time, ``alpha``
================  =======================================  ==========================================================
``Sigmas``        ``(sigma_min, sigma_max)``               ``sigma``, 1  (Karras et al. 2022)
``Table``         ``alphas_cumprod``, one entry a step     its index, between entries by monotone cubics in
                                                           ``log sigma``; ``1 / sqrt(1 + sigma^2)``  (Ho et al. 2020)
``Continuous``    ``t -> (alpha, sigma alpha)`` on [0, 1]  ``t``, ``alpha(t)``  (azula's schedules)
================  =======================================  ==========================================================
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

_HALVINGS = 60  # of [0, 1]: to the last bit in double precision


class Noise(ABC):
    """A path of noise levels, from ``sigma_min`` to ``sigma_max``."""

    sigma_min: float
    sigma_max: float

    @abstractmethod
    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's time and ``alpha`` at noise levels ``sigma`` of shape ``(m,)``, in double precision."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a file."""


class Sigmas(Noise):
    """The noise level is the time: ``D(x; sigma)``.

    Args:
        sigma_min: smallest noise level that the network was trained for, in the units of its images.
        sigma_max: the largest.

    Example:
        >>> from ifpyro.flow.networks.noise import Sigmas
        >>> time, alpha = Sigmas(0.002, 80.0)(torch.tensor([0.5]))
        >>> time, alpha
        (tensor([0.500]), tensor([1.]))
    """

    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        if not 0 < sigma_min < sigma_max < float("inf"):
            raise ValueError(
                f"noise=(sigma_min, sigma_max) expects 0 < sigma_min < sigma_max, got ({sigma_min}, {sigma_max})"
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``sigma`` itself, and 1."""
        return sigma, torch.ones_like(sigma)

    def to_dict(self) -> dict[str, Any]:
        """The two ends."""
        return {"kind": "sigmas", "sigmas": [self.sigma_min, self.sigma_max]}


class Table(Noise):
    """A discrete variance-preserving schedule, made continuous.

    Args:
        alphas_cumprod: shares of signal in the variance, ``alpha^2`` at the times ``0, 1, ...``: decreasing. Entries of
            zero at the end, where there is no signal left, are dropped.

    Example:
        >>> from ifpyro.flow.networks.noise import Table
        >>> path = Table(torch.linspace(0.999, 0.01, 100))
        >>> round(path.sigma_min, 3), round(path.sigma_max, 3)
        (0.032, 9.95)
    """

    def __init__(self, alphas_cumprod: Any) -> None:
        shares = torch.as_tensor(alphas_cumprod, dtype=torch.double).detach().cpu()
        if shares.ndim == 1 and len(shares):
            shares = shares[: len(shares) - int((shares.flip(0).cumsum(0) == 0).sum())]
        inside = shares.ndim == 1 and len(shares) > 1 and float(shares.min()) > 0 and float(shares.max()) < 1
        if not inside or not bool((shares.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod expects a decreasing table (T,) of shares of signal in (0, 1), so that sigma "
                f"increases, got shape {tuple(shares.shape)}" + (f" from {shares[0]:.6g} to {shares[-1]:.6g}" * inside)
            )
        self.shares = shares
        sigma = ((1 - shares) / shares).sqrt()
        self.sigma_min, self.sigma_max = float(sigma[0]), float(sigma[-1])
        self._time = PchipInterpolator(sigma.log().numpy(), np.arange(len(sigma), dtype=np.float64))

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The index, between entries too, and ``1 / sqrt(1 + sigma^2)``."""
        clamped = sigma.clamp(self.sigma_min, self.sigma_max)
        time = torch.as_tensor(self._time(clamped.log().cpu().numpy()))
        return time.to(sigma), (1 + sigma.square()).rsqrt()

    def to_dict(self) -> dict[str, Any]:
        """The table."""
        return {"kind": "table", "alphas_cumprod": self.shares.tolist()}


class Continuous(Noise):
    """A schedule of scales over the times ``[0, 1]``.

    Args:
        scales: from times ``(m,)`` to the scales of signal and noise, ``alpha`` and ``sigma alpha``, each ``(m,)``;
            their ratio increases with time.

    Example:
        >>> from ifpyro.flow.networks.noise import Continuous
        >>> path = Continuous(lambda t: (1 - 0.99 * t, 0.01 + 0.99 * t))
        >>> path.sigma_min, round(path.sigma_max)
        (0.01, 100)
    """

    def __init__(self, scales: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.scales = scales
        ratio = self._ratio(torch.linspace(0, 1, 65, dtype=torch.double))
        if not bool((ratio.diff() > 0).all()) or not ratio[0] > 0 or not bool(ratio.isfinite().all()):
            raise ValueError(
                "a noise schedule expects (alpha, sigma) at times in [0, 1] with sigma / alpha positive, finite and "
                f"increasing, got ratios from {ratio[0]:.3g} to {ratio[-1]:.3g}"
            )
        self.sigma_min, self.sigma_max = float(ratio[0]), float(ratio[-1])

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The time by bisection, and the schedule's own ``alpha`` there."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = self._ratio(middle) < sigma
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high, self.scales(high)[0].to(sigma)

    def _ratio(self, t: Tensor) -> Tensor:
        alpha, noise = self.scales(t)
        return (noise / alpha).to(t)

    def to_dict(self) -> dict[str, Any]:
        """The ratios at a few times, by which the schedule is known again."""
        return {"kind": "continuous", "ratios": self._ratio(torch.linspace(0, 1, 9, dtype=torch.double)).tolist()}


def as_noise(noise: Any) -> Noise:
    """A path from what a user has: two sigmas, a table, a scheduler with ``alphas_cumprod``, or a callable.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the noise does not increase.
    """
    if isinstance(noise, Noise):
        return noise
    if hasattr(noise, "alphas_cumprod"):
        return Table(noise.alphas_cumprod)
    if isinstance(noise, tuple) and len(noise) == 2:
        return Sigmas(*noise)
    if callable(noise):
        return Continuous(noise)
    if isinstance(noise, Tensor | np.ndarray | list):
        return Table(noise)
    raise TypeError(
        "noise expects (sigma_min, sigma_max), a table alphas_cumprod, a scheduler that has one, or a callable from "
        f"times in [0, 1] to (alpha, sigma), got {type(noise).__name__}"
    )


def noise_from_dict(data: dict[str, Any], given: Noise | None) -> Noise:
    """Rebuild a path from :meth:`Noise.to_dict`.

    Args:
        data: the plain data.
        given: the path that came with the network; a continuous one is compared to the file, since only the network
            has it.

    Raises:
        ValueError: if it is needed and does not fit.
    """
    if data["kind"] == "sigmas":
        return Sigmas(*data["sigmas"])
    if data["kind"] == "table":
        return Table(data["alphas_cumprod"])
    if not isinstance(given, Continuous) or not np.allclose(given.to_dict()["ratios"], data["ratios"], rtol=1e-6):
        raise ValueError(
            "expected the denoiser with the noise schedule it had when the flow was saved (sigma / alpha "
            f"{data['ratios'][0]:.6g} to {data['ratios'][-1]:.6g}), got another one or none; a network without "
            "one can carry it as its attribute 'schedule'"
        )
    return given
