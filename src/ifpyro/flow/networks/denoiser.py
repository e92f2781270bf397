r"""The velocity of a flow from a pretrained denoiser, whatever it was trained to predict.

A diffusion network ``N`` sees ``alpha (x_0 + sigma n)`` with the same noise on every pixel, and predicts a linear
combination of image and noise:

.. math:: N \approx E[\, p \, x_0 + q \, n \mid \alpha (x_0 + \sigma n) \,].

==============  ==================  ===================================================================
prediction      ``p, q``            networks
==============  ==================  ===================================================================
``"x0"``        1, 0                denoisers ``D(x; sigma)`` (Karras et al. 2022), azula
``"epsilon"``   0, 1                Ho et al. (2020)
``"v"``         ``-sigma alpha``,   Salimans & Ho (2022); with noise scale ``sigma alpha``, signal ``alpha``
                ``alpha``
``"flow"``      -1, 1               flow matching from data to noise (Lipman et al. 2023)
``"edm"``       ``sigma alpha/d``,  ``F`` inside EDM's denoiser, ``alpha = c_in = 1 / sqrt(sigma^2 + d^2)``,
                ``-d alpha``        ``d`` being its ``sigma_data``; ``"edm_v"`` is ``-F``
==============  ==================  ===================================================================

On the axes of the flow, in the symbols of :mod:`ifpyro.flow.axes.schedule`, equal noise on every pixel is equal noise
on every axis, ``sigma = s_j tan theta_j`` for all ``j``, and the network's input is ``W (alpha s y / cos theta)`` apart
from the mean. Together the input and the output determine estimates of ``x_0`` and of ``n``, and so the velocity ``F_j
= E[sin theta_j x_0/s_j - cos theta_j n_j]``:

.. math:: F = \frac{\alpha}{\alpha q - \sigma \alpha p}
              \left[ (q \tan\theta + p\,s) \odot y - \frac{W^T N}{\cos\theta} \right] .

This is ``-N`` for a v-prediction of standardised data. Dividing by ``sigma alpha`` (``x0``) or ``cos theta``
(``epsilon``) amplifies the network's errors at the data end or the noise end; that lies in the parametrisation.

The noise being the same on every axis, the schedule must be one with ``eta_j = sigma``: ``details_first(power=1)`` on
any axes, or any schedule that gives all axes one angle where they share one scale.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..axes.basis import Basis
from ..axes.schedule import Angles
from .noise import Noise
from .velocity import FramedVelocity

PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "v": lambda alpha, sigma: (-alpha * sigma, alpha),
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
    "edm": lambda alpha, sigma: (sigma * alpha / _sd(alpha, sigma), -_sd(alpha, sigma) * alpha),
    "edm_v": lambda alpha, sigma: (-sigma * alpha / _sd(alpha, sigma), _sd(alpha, sigma) * alpha),
}
"""Name -> ``(p, q)`` of what a network predicts."""

SYNONYMS = {"sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}  # of the diffusers library
_TOLERANCE = 1e-5  # relative, of noise levels


def _sd(alpha: Tensor, sigma: Tensor) -> Tensor:
    """EDM's ``sigma_data``, of ``alpha = c_in``."""
    return (alpha.double().pow(-2) - sigma.double().square()).sqrt().to(alpha)


def check_prediction(prediction: str) -> str:
    """The name in this module of what a network predicts.

    Raises:
        ValueError: on an unknown one.
    """
    name = SYNONYMS.get(prediction, prediction)
    if name not in PREDICTIONS:
        raise ValueError(f"prediction expects one of {sorted({*PREDICTIONS, *SYNONYMS})}, got {prediction!r}")
    return name


class DenoiserVelocity(FramedVelocity):
    """The velocity that a pretrained network defines.

    The network is referred to, not owned. Its structure is copied, its weights are shared and frozen, and dropout is
    off, all without any change to the network that was given: training that one further would change the flow. A flow's
    ``state_dict`` and file do not contain the weights.

    Args:
        network: called as ``network(image, time)`` with images ``(n, *event_shape)`` and times ``(n,)``; returns a
            tensor of the images' shape, or something that has it as ``.sample`` (diffusers) or ``.mean`` (azula), or
            a tuple that begins with it. Each image must be treated on its own. Usually a module.
        noise: what its time means.
        prediction: what it predicts; see the module's docstring.
        event_shape: of one image.
        rescale: ``(factor, shift)``: the network sees ``factor * x + shift`` of data ``x``; each a number or
            broadcastable to an image.
        reference: where the network can be found again, for files.
    """

    factor: Tensor
    shift: Tensor

    def __init__(
        self,
        network: Callable[..., Any],
        noise: Noise,
        prediction: str,
        event_shape: Sequence[int],
        rescale: tuple[Any, Any] = (1.0, 0.0),
        reference: str = "",
    ) -> None:
        super().__init__()
        self.noise, self.prediction, self.reference = noise, check_prediction(prediction), reference
        self.event_shape = torch.Size(event_shape)
        self.rescale = rescale
        for name, value in zip(("factor", "shift"), rescale, strict=True):
            self.register_buffer(name, flat(value, self.event_shape), persistent=False)
        # In a tuple, where torch does not take it for a submodule whose weights are the flow's.
        self._network = (share(network),)
        self._forward_mode: bool | None = None

    @property
    def network(self) -> Callable[..., Any]:
        """The network, frozen."""
        return self._network[0]

    def attach(self, basis: Basis, angles: Angles) -> None:
        """Learn the axes, and refuse those on which the network's noise is not the schedule's.

        Raises:
            ValueError: if the schedule puts unequal noise on the axes, or noise for which the network was not trained.
        """
        dim = self.event_shape.numel()
        if basis.dim != dim or not torch.allclose(
            basis.unit.double() * self.factor.to(basis.unit.device).double(), torch.ones(()).double()
        ):
            raise ValueError(
                f"a denoiser of {tuple(self.event_shape)} expects a basis of {dim} columns measured "
                f"in units of 1/factor of rescale, got {basis.dim} columns, units {basis.unit.min():.4g} to "
                f"{basis.unit.max():.4g}; use ifpyro.from_denoiser"
            )
        t = torch.linspace(0, 1, 5, dtype=torch.double)
        eta = basis.scale.detach().double().cpu() * angles(t).tan()
        if not torch.allclose(eta, eta[:, :1], rtol=_TOLERANCE, atol=0):
            raise ValueError(
                "a denoiser of equal noise on all axes expects a schedule with eta_j the same for every axis: "
                "Schedule.details_first(power=1), or Schedule.preserving() in the basis 'identity'; got noise between "
                f"{eta[2].min():.4g} and {eta[2].max():.4g} at half time"
            )
        low, high = float(eta[0, 0]), float(eta[-1, 0])
        if low < self.noise.sigma_min * (1 - _TOLERANCE) or high > self.noise.sigma_max * (1 + _TOLERANCE):
            raise ValueError(
                f"expected a schedule within the noise that the denoiser knows, {self.noise.sigma_min:.6g} to "
                f"{self.noise.sigma_max:.6g}, got {low:.6g} to {high:.6g}; choose its start and end accordingly"
            )
        super().attach(basis, angles)

    def embed(self, t: Tensor) -> Tensor:
        """Time, ``alpha``, ``p``; for every axis the factors of input, ``y`` and answer: ``(m, 3 + 3 D)``."""
        basis, angles = self.frame()
        scale = basis.scale.double()
        theta = angles(t.to(scale.device))
        sigma = (scale[0] * theta[..., :1].tan()).squeeze(-1)
        time, alpha = self.noise(sigma)
        p, q = PREDICTIONS[self.prediction](alpha, sigma)
        time, alpha, p, q, sigma = (v.unsqueeze(-1) for v in (time, alpha, p, q, sigma))
        factor = alpha / (alpha * q - sigma * alpha * p)
        gain, linear = alpha * scale / theta.cos(), factor * (q * theta.tan() + p * scale)
        return torch.cat([time, alpha, p, gain, linear, factor / theta.cos()], -1).to(basis.scale)

    def forward(self, y: Tensor, embedding: Tensor) -> Tensor:
        """Velocity ``F`` of shape ``(n, D)``."""
        basis, _ = self.frame()
        dim, batch = basis.dim, y.shape[:-1]
        time, alpha, p, gain, linear, weight = embedding.split([1, 1, 1, dim, dim, dim], -1)
        mean = self.factor * basis.mean + self.shift  # in the network's units
        image = (basis.rotate_back(y * gain) + alpha * mean).reshape(-1, *self.event_shape)
        answer = self._ask(image, time.squeeze(-1).expand(batch).reshape(-1)).reshape(*batch, dim)
        return linear * y - weight * basis.rotate(answer - p * mean)

    def with_products(self, y: Tensor, embedding: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Velocity.with_products`; where layers of the network have no forward mode, by reverse mode twice.

        The transposed product ``J^T w`` is linear in ``w``; its own transpose is ``J v``.
        """
        if self._forward_mode is None:
            self._forward_mode = self._has_forward_mode()
        if self._forward_mode:
            return super().with_products(y, embedding, directions)
        count = len(directions)
        rows = y.expand(count, *y.shape).reshape(-1, y.shape[-1])
        times = embedding if embedding.ndim == 1 else embedding.repeat(count, 1)
        with sdpa_kernel(SDPBackend.MATH):  # attention that can be differentiated twice
            values, pull_back = torch.func.vjp(lambda state: self(state, times), rows)[:2]
            transposed = torch.func.vjp(lambda w: pull_back(w)[0], torch.zeros_like(values))[1]
            products = transposed(directions.reshape(rows.shape))[0]
        return values[: len(y)], products.reshape(directions.shape)

    def spec(self) -> dict[str, Any]:
        """Plain data with which :func:`ifpyro.load` knows the network again."""
        factor, shift = (torch.as_tensor(v, dtype=torch.double).tolist() for v in self.rescale)
        return {
            "kind": "denoiser",
            "reference": self.reference,
            "checksum": checksum(self.network),
            "noise": self.noise.to_dict(),
            "prediction": self.prediction,
            "event_shape": list(self.event_shape),
            "rescale": [factor, shift],
        }

    def _ask(self, image: Tensor, time: Tensor) -> Tensor:
        answer = self.network(image, time)
        for attribute in ("sample", "mean"):
            if not isinstance(answer, Tensor) and hasattr(answer, attribute):
                answer = getattr(answer, attribute)
        if isinstance(answer, tuple):
            answer = answer[0]
        if not isinstance(answer, Tensor) or answer.shape != image.shape:
            got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"expected the denoiser to return {tuple(image.shape)}, the shape of its images, got {got}; if it also "
                "predicts a variance, wrap it in a module that returns the mean alone"
            )
        return answer.to(image)

    def _has_forward_mode(self) -> bool:
        """Whether the network can be differentiated forwards, tried on one image."""
        basis, _ = self.frame()
        y = torch.zeros(1, basis.dim, dtype=basis.scale.dtype, device=basis.scale.device)
        with torch.no_grad():
            embedding = self.embed(torch.full((1,), 0.5, dtype=torch.double))[0]
            self(y, embedding)  # errors of the network itself are not those of a missing rule
            try:
                super().with_products(y, embedding, torch.ones_like(y).unsqueeze(0))
            except (NotImplementedError, RuntimeError):
                return False
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DenoiserVelocity":
        super()._apply(fn, recurse)
        if isinstance(self.network, nn.Module):
            self.network._apply(fn, recurse)
        return self


def share(network: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a module's structure with the same weights, frozen and in evaluation mode; a function as it is."""
    if not isinstance(network, nn.Module):
        return network
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    memo |= {id(b): b.detach() for b in network.buffers()}
    return copy.deepcopy(network, memo).eval()


def checksum(network: Callable[..., Any]) -> str:
    """SHA-256 of a module's parameters and buffers in single precision; of a function, of nothing."""
    digest = hashlib.sha256()
    state = network.state_dict() if isinstance(network, nn.Module) else {}
    for name in sorted(state):
        value = state[name].detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name}:{tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def flat(value: Any, event_shape: torch.Size) -> Tensor:
    """A number, or what broadcasts to an image, as ``(D,)`` in double precision.

    Raises:
        ValueError: if it does not broadcast.
    """
    value = torch.as_tensor(value, dtype=torch.double).cpu()
    try:
        return value.expand(event_shape).reshape(-1)
    except RuntimeError as error:
        raise ValueError(
            f"expected a number or something broadcastable to {tuple(event_shape)}, got shape {tuple(value.shape)}"
        ) from error
