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
``Straight``      flow matching's ``(1 - t) x_0 + t n``    ``steps * t``, ``1 - t``  (Lipman et al. 2023; diffusers)
``LogSigmas``     ``(sigma_min, sigma_max, sigma_data)``   ``log(sigma) / 4``, ``1 / sqrt(sigma^2 + sigma_data^2)``: the
                                                           network inside EDM's denoiser (diffusers)
================  =======================================  ==========================================================
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

_PLACEHOLDER = 1e-6  # share of signal that stands for none: sigma is a thousand
_NODES = 65  # times at which a schedule is looked at
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
            exactly 1 at the beginning, where there is no noise, and at the end those of zero, or a tiny placeholder for
            it that is above the entry before, as in schedulers of diffusers with zero terminal SNR, are left out; times
            keep counting from the first entry.

    Example:
        >>> from ifpyro.flow.networks.noise import Table
        >>> path = Table(torch.linspace(0.999, 0.01, 100))
        >>> round(path.sigma_min, 3), round(path.sigma_max, 3)
        (0.032, 9.95)
    """

    def __init__(self, alphas_cumprod: Any) -> None:
        shares = torch.as_tensor(alphas_cumprod, dtype=torch.double).detach().cpu()
        first = 0
        if shares.ndim == 1 and len(shares):
            while len(shares) > 1 and (shares[-1] == 0 or shares[-2] <= shares[-1] < _PLACEHOLDER):
                shares = shares[:-1]
            first = int((shares == 1).to(torch.int8).cumprod(0).sum())
            shares = shares[first:]
        inside = shares.ndim == 1 and len(shares) > 1 and float(shares.min()) > 0 and float(shares.max()) < 1
        if not inside or not bool((shares.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod expects a decreasing table (T,) of shares of signal in (0, 1), so that sigma "
                f"increases, got shape {tuple(shares.shape)}"
                + (f" from {shares[0]:.6g} to {shares[-1]:.6g}" if inside else "")
            )
        self.shares, self.first = shares, first
        sigma = ((1 - shares) / shares).sqrt()
        self.sigma_min, self.sigma_max = float(sigma[0]), float(sigma[-1])
        self._time = PchipInterpolator(sigma.log().numpy(), first + np.arange(len(sigma), dtype=np.float64))

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The index, between entries too, and ``1 / sqrt(1 + sigma^2)``."""
        clamped = sigma.clamp(self.sigma_min, self.sigma_max)
        time = torch.as_tensor(self._time(clamped.log().cpu().numpy()))
        return time.to(sigma), (1 + sigma.square()).rsqrt()

    def to_dict(self) -> dict[str, Any]:
        """The table."""
        return {"kind": "table", "alphas_cumprod": [1.0] * self.first + self.shares.tolist()}


class Continuous(Noise):
    """A schedule of scales over the times ``[0, 1]``.

    Args:
        scales: from times ``(m,)`` to the scales of signal and noise, ``alpha`` and ``sigma alpha``, each ``(m,)``;
            their ratio is positive and finite and increases with time. Where it stays as it is at the ends, as that of
            clipped times does, the network is not asked.

    Example:
        >>> from ifpyro.flow.networks.noise import Continuous
        >>> path = Continuous(lambda t: (1 - 0.99 * t, 0.01 + 0.99 * t))
        >>> path.sigma_min, round(path.sigma_max)
        (0.01, 100)
    """

    def __init__(self, scales: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.scales = scales
        ratio = self._ratio(torch.linspace(0, 1, _NODES, dtype=torch.double))
        self._check(ratio)
        self.sigma_min, self.sigma_max = float(ratio[0]), float(ratio[-1])
        ends = torch.stack([ratio[0], ratio[-1]])
        self._first = float(self._times(ends[:1], lambda value, sigma: value <= sigma)[0])
        self._last = float(self._times(ends[1:], lambda value, sigma: value < sigma)[0])

    @staticmethod
    def _check(ratio: Tensor) -> None:
        if bool((ratio.diff() < 0).all()) and bool(ratio.isfinite()[1:].all()):
            raise ValueError(
                "a noise schedule expects sigma / alpha increasing from data at time 0 to noise at 1, got it "
                f"from {ratio[0]:.3g} to {ratio[-1]:.3g}; reverse time: noise=lambda t: scales(1 - t) with a network "
                "lambda x, t: network(x, 1 - t), whose velocity, if it predicts one, changes its sign"
            )
        middle = ratio[1:-1]
        sound = bool(middle.isfinite().all()) and bool((middle.diff() > 0).all()) and bool(middle[0] > 0)
        if sound and not (ratio[0] > 0 and bool(ratio[-1].isfinite())):
            raise ValueError(
                "a noise schedule expects sigma / alpha positive and finite at all times in [0, 1], got "
                f"{ratio[0]:.3g} at 0 and {ratio[-1]:.3g} at 1; clip to [eps, 1 - eps]: noise=lambda t: "
                "scales(t.clamp(1e-3, 1 - 1e-3))"
            )
        steps, moving = ratio.diff(), ratio.diff().nonzero().flatten()
        rising = bool((steps >= 0).all()) and len(moving) and bool((steps[moving[0] : moving[-1] + 1] > 0).all())
        if not rising or not ratio[0] > 0 or not bool(ratio.isfinite().all()):
            raise ValueError(
                "a noise schedule expects (alpha, sigma) at times in [0, 1] with sigma / alpha positive, finite and "
                f"increasing, got ratios from {ratio[0]:.3g} to {ratio[-1]:.3g}"
            )

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The time by bisection, and the schedule's own ``alpha`` there."""
        time = self._times(sigma, lambda value, wanted: value < wanted).clamp(self._first, self._last)
        return time, self.scales(time)[0].to(sigma)

    def _times(self, sigma: Tensor, below: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The least times at which the ratio is not ``below`` the wanted ones."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            is_below = below(self._ratio(middle), sigma)
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return high

    def _ratio(self, t: Tensor) -> Tensor:
        alpha, noise = self.scales(t)
        return (noise / alpha).to(t)

    def to_dict(self) -> dict[str, Any]:
        """The ratios at a few times, by which the schedule is known again."""
        return {"kind": "continuous", "ratios": self._ratio(torch.linspace(0, 1, 9, dtype=torch.double)).tolist()}


class Straight(Noise):
    """Flow matching's straight path, ``(1 - t) x_0 + t n``, of a network whose time is ``steps * t``.

    Args:
        first: least ``t`` that the network was trained for.
        last: largest ``t``, below 1.
        steps: the network's time at ``t = 1``.
    """

    def __init__(self, first: float, last: float, steps: float) -> None:
        if not 0 < first < last < 1 or not 0 < steps < float("inf"):
            raise ValueError(
                f"a straight path expects 0 < first < last < 1 and steps > 0, got {first}, {last} and {steps}"
            )
        self.first, self.last, self.steps = float(first), float(last), float(steps)
        self.sigma_min, self.sigma_max = first / (1 - first), last / (1 - last)

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``steps * t`` and ``1 - t`` at ``t = sigma / (1 + sigma)``."""
        return self.steps * sigma / (1 + sigma), 1 / (1 + sigma)

    def to_dict(self) -> dict[str, Any]:
        """The two ends and the steps."""
        return {"kind": "straight", "straight": [self.first, self.last, self.steps]}


class LogSigmas(Noise):
    """The noise of the network ``F`` inside EDM's denoiser ``D = c_skip x + c_out F(c_in x, log(sigma) / 4)``.

    Args:
        sigma_min: smallest noise level that the network was trained for, in the units of its images.
        sigma_max: the largest.
        sigma_data: standard deviation of the data that the preconditioning assumes.
    """

    def __init__(self, sigma_min: float, sigma_max: float, sigma_data: float) -> None:
        if not 0 < sigma_min < sigma_max < float("inf") or not 0 < sigma_data < float("inf"):
            raise ValueError(
                "noise of EDM expects 0 < sigma_min < sigma_max and sigma_data > 0, got "
                f"({sigma_min}, {sigma_max}) and {sigma_data}"
            )
        self.sigma_min, self.sigma_max, self.sigma_data = float(sigma_min), float(sigma_max), float(sigma_data)

    def __call__(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``log(sigma) / 4`` and ``c_in``."""
        return sigma.log() / 4, (sigma.square() + self.sigma_data**2).rsqrt()

    def to_dict(self) -> dict[str, Any]:
        """The three numbers."""
        return {"kind": "log_sigmas", "sigmas": [self.sigma_min, self.sigma_max, self.sigma_data]}


def as_noise(noise: Any) -> Noise:
    """A path from what a user has: two sigmas, a table, a scheduler with ``alphas_cumprod``, or a callable.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the noise does not increase.
    """
    if isinstance(noise, Noise):
        return noise
    if (found := _of_scheduler(noise)) is not None:
        return found
    if isinstance(noise, tuple) and len(noise) == 2:
        return Sigmas(*noise)
    if callable(noise):
        return Continuous(noise)
    if isinstance(noise, Tensor | np.ndarray | list):
        return Table(noise)
    raise TypeError(
        "noise expects (sigma_min, sigma_max), a table alphas_cumprod, a diffusers scheduler (with alphas_cumprod, of "
        "flow matching, or EDM's), or a callable from times in [0, 1] to (alpha, sigma), got "
        f"{type(noise).__name__}"
    )


def _of_scheduler(noise: Any) -> Noise | None:
    """The path of a diffusers scheduler; None for anything else.

    Raises:
        ValueError: for one that means something else by its times than the three kinds that are known.
    """
    config = getattr(noise, "config", None) or {}
    name = type(noise).__name__
    if hasattr(noise, "precondition_noise") and "sigma_data" in config:
        found = noise.precondition_noise(torch.tensor([0.5, 2.0]))
        if not torch.allclose(found, torch.tensor([0.5, 2.0]).log() / 4):
            raise ValueError(
                f"noise of {name} expects the time log(sigma) / 4 of EDM, got another one; wrap the network as D(x; "
                "sigma) and give (sigma_min, sigma_max)"
            )
        return LogSigmas(config["sigma_min"], config["sigma_max"], config["sigma_data"])
    straight = hasattr(noise, "scale_noise") or config.get("use_flow_sigmas", False)
    if straight and "num_train_timesteps" in config:
        if config.get("invert_sigmas", False):
            raise ValueError(
                f"noise of {name} expects sigmas of noise, got invert_sigmas=True, whose time runs from noise to data; "
                "give the scheduler without it, and a network that reverses its time"
            )
        steps = config["num_train_timesteps"]
        ends = getattr(noise, "sigma_min", 1 / steps), getattr(noise, "sigma_max", 1.0)
        return Straight(max(float(ends[0]), 1e-6), min(float(ends[1]), 1 - 1 / steps), steps)
    if hasattr(noise, "alphas_cumprod"):
        return Table(noise.alphas_cumprod)
    return None


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
    if data["kind"] == "straight":
        return Straight(*data["straight"])
    if data["kind"] == "log_sigmas":
        return LogSigmas(*data["sigmas"])
    if not isinstance(given, Continuous) or not np.allclose(given.to_dict()["ratios"], data["ratios"], rtol=1e-6):
        raise ValueError(
            "expected the denoiser with the noise schedule it had when the flow was saved (sigma / alpha "
            f"{data['ratios'][0]:.6g} to {data['ratios'][-1]:.6g}), got another one or none; a network without "
            "one can carry it as its attribute 'schedule'"
        )
    return given
