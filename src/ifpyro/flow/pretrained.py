"""Pretrained denoisers as flows, without training: :func:`from_denoiser`."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.files import reading
from ..core.precision import full_precision
from ..data.samples import as_samples
from .axes.basis import Basis, kind_for
from .axes.schedule import Schedule
from .axes.separable import fits
from .flow import InflationaryFlow
from .networks.denoiser import DenoiserVelocity, check_prediction, flat
from .networks.noise import LogSigmas, Noise, Sigmas, Straight, as_noise, noise_from_dict
from .solver.grid import Grid, cheap_grid
from .solver.steps import take
from .tuning import choose_grid

_ROWS = 256  # drawn from the flow to tune the solver, where there are no samples
_POWER = 0.12  # deviation of the latents' mean square from 1 that is worth a warning
_KURTOSIS = 0.3  # and of their kurtosis from 3
_ENTRIES = 4096  # of latents, of which these are taken
_EVALUATIONS = 32  # for one of them: the equation, not the map, will do
_ROWS_AN_AXIS = 4  # for "auto" to take all eigenvectors of the samples' covariance


@torch.inference_mode(False)  # tensors made in such a block would be of no use outside
def from_denoiser(
    denoiser: Any,
    noise: Any = None,
    *,
    prediction: str | None = None,
    samples: Any = None,
    event_shape: Sequence[int] | None = None,
    mean: Any = None,
    sigma_data: float | None = None,
    basis: str | Basis = "auto",
    schedule: Schedule | None = None,
    rescale: tuple[Any, Any] = (1.0, 0.0),
    reference: str = "",
    grid: Grid | None = None,
    tolerance: float = 1e-3,
    progress: bool = True,
) -> InflationaryFlow:
    """A flow from a pretrained diffusion network: encode, decode, densities and a Pyro prior, without training.

    The map is the network's probability-flow ODE between its smallest and its largest noise, so the density is that of
    data with the smallest noise added (and shrunk back to the data's variance). The largest should drown the data: the
    latent is N(0, I) up to what is left of them, ``cos(theta)`` at the end, which is less with axes and scales from
    ``samples``. See :mod:`ifpyro.flow.networks.denoiser` for the equations and :mod:`ifpyro.flow.networks.noise` for
    what ``noise`` may be. The network is frozen and without dropout in the flow, and not changed itself; its weights
    are shared. ::

        flow = ifpyro.from_denoiser(net, (0.002, 80.0), samples=images)  # D(x; sigma), as of EDM
        flow = ifpyro.from_denoiser(net, table, prediction="epsilon", samples=images)  # DDPM, alphas_cumprod
        flow = ifpyro.from_denoiser(DDPMPipeline.from_pretrained(name), rescale=(2.0, -1.0), reference=name)
        flow = ifpyro.from_denoiser(azula_denoiser, samples=images)

    Args:
        denoiser: the network, called with images ``(n, *event_shape)`` and times ``(n,)`` (see
            :class:`~ifpyro.flow.networks.denoiser.DenoiserVelocity`); a diffusers pipeline of a network ``unet`` and a
            ``scheduler`` on pixels; or an azula denoiser. A network with further inputs, such as a class label, is
            wrapped in a module that fixes them.
        noise: ``(sigma_min, sigma_max)`` where noise is the network's time; a table ``alphas_cumprod``; a diffusers
            scheduler, one that has a table, of flow matching, or EDM's; a callable from times in ``[0, 1]`` to
            ``(alpha, sigma)``. Pipelines and azula's denoisers bring their own.
        prediction: ``"x0"`` (or ``"sample"``), ``"epsilon"``, ``"v"`` (or ``"v_prediction"``), ``"flow"``. By default
            what the scheduler's ``prediction_type`` says, ``"flow"`` for flow matching, and ``"x0"`` for denoisers with
            sigmas and of azula.
        samples: data, ``(N, *event_shape)``, preferably with rows that the network was not trained on: they give mean,
            axes and scales, the solver is tuned on them, and a network that predicts worse than a Gaussian is reported.
        event_shape: of one data point, where neither samples nor a pipeline tell.
        mean: of the data, a number or an array of the event's shape, without samples; zero of the network by default.
        sigma_data: standard deviation of the data, without samples: 0.5 of the network's units by default, as for
            images between -1 and 1.
        basis: the axes of the latent, ``"pca"``, ``"separable"``, ``"low_rank"``, ``"identity"`` or a
            :class:`~ifpyro.flow.axes.basis.Basis`. By default chosen by the shape and number of samples; without
            samples ``"identity"``.
        schedule: one with equal noise on all axes; the whole range of the network's noise by default.
        rescale: ``(factor, shift)``, numbers or arrays that broadcast to an event: the network sees
            ``factor * x + shift`` of your data, ``(2, -1)`` for data in [0, 1] and a network on [-1, 1].
        reference: where the network can be found again (a path, a name on a hub), kept in the flow's file.
        grid: of the solver; by default tuned to ``tolerance``.
        tolerance: accepted error of the solver, in standard deviations of the data (see :mod:`ifpyro.flow.tuning`).
        progress: show a progress bar while the solver is tuned, which takes up to ``D`` products of the network's
            Jacobian an evaluation up to 128 axes, on fewer rows the more axes there are; ``grid`` leaves it out.

    Returns:
        The flow. ``save`` writes everything but the network: its reference and a checksum of its weights, which
        ``ifpyro.load(path, network=...)`` verifies. ``report["denoiser"]`` tells the network's error with samples, and
        the moments of their latents.

    Warns:
        UserWarning: if samples say that the network is worse than a Gaussian, that their latents have another variance
            than one, as under a wrong table, or that the largest noise does not drown them.

    Raises:
        TypeError: if ``noise`` or ``samples`` are not what is expected.
        ValueError: on an unknown prediction, noise that does not increase, shapes that do not fit, or axes on which
            the network's noise is not equal.

    Example:
        >>> class Denoiser(torch.nn.Module):
        ...     def forward(self, noisy, sigma):
        ...         return noisy / (1 + sigma.unsqueeze(-1) ** 2)
        ...
        >>> normal = ifpyro.from_denoiser(Denoiser(), (0.002, 80.0), event_shape=(2,), sigma_data=1.0)
        >>> normal.log_prob(torch.zeros(2))
        tensor(-1.838)
    """
    network, path, predicts, shape = _open(denoiser, noise, prediction)
    x = None if samples is None else as_samples(samples)
    shape = _event_shape(shape, event_shape, x)
    velocity = DenoiserVelocity(network, path, predicts, shape, rescale, reference)
    like = _like(network, x)
    axes = (
        copy.deepcopy(basis) if isinstance(basis, Basis) else _axes(basis, x, shape, velocity, mean, sigma_data, like)
    )
    axes = axes.to(like)
    schedule = schedule or _whole_range(path, axes.scale)
    flow = InflationaryFlow(axes, schedule, velocity.to(like), event_shape=shape, grid=grid)
    rows = None if x is None else x.to(like)
    _check_finite(flow)
    if rows is not None:
        flow.report["denoiser"] = _regression_error(flow, rows)
    if grid is None:
        flow.grid = Grid(24)
        seen = flow.sample(_few(flow), seed=0) if rows is None else rows
        choose_grid(flow, seen, tolerance, _bounded(flow), progress=progress)
    if rows is not None:
        flow.report["denoiser"]["latents"] = _latent_moments(flow, rows)
    return flow


def restore(spec: dict[str, Any], denoiser: Any, path: str | Path) -> DenoiserVelocity:
    """The velocity that :meth:`DenoiserVelocity.spec` described, with the network that it refers to.

    Args:
        spec: plain data from a file.
        denoiser: what :func:`from_denoiser` was given as its first argument.
        path: the file.

    Raises:
        ValueError: if it is another network, or the file does not say what a denoiser is.
    """
    named = f" {spec['reference']!r}" if spec.get("reference") else ""
    if denoiser is None:
        raise ValueError(
            f"this flow refers to a pretrained network{named} and does not contain it; load that network and pass it "
            "as load(..., network=...)"
        )
    network, given, _ = _unpack(denoiser)
    with reading(path, "a flow"):
        continuous = spec["noise"]["kind"] == "continuous"
        noise = noise_from_dict(spec["noise"], as_noise(given) if continuous else None)
        shape = [int(size) for size in spec["event_shape"]]
        factor, shift = spec["rescale"]
        velocity = DenoiserVelocity(network, noise, spec["prediction"], shape, (factor, shift), spec["reference"])
        expected = str(spec["checksum"])
    if (found := velocity.spec()["checksum"]) != expected:
        raise ValueError(
            f"expected the network{named} with the weights it had when the flow was saved (sha256 "
            f"{expected[:12]}...), got other weights ({found[:12]}...); a flow is only valid with its own"
        )
    return velocity


def _open(
    denoiser: Any, noise: Any, prediction: str | None
) -> tuple[Callable[..., Any], Noise, str, tuple[int, ...] | None]:
    """Network, noise, prediction and perhaps event shape of whatever was given."""
    network, own, shape = _unpack(denoiser)
    source = own if noise is None else noise
    if source is None:
        raise ValueError(
            "expected the noise of the denoiser's times: noise=(sigma_min, sigma_max) for D(x; sigma), such as "
            "(0.002, 80.0) for EDM, or the table alphas_cumprod (or scheduler) of its training"
        )
    path = as_noise(source)
    config = getattr(source, "config", None)
    stated = None if config is None else config.get("prediction_type")
    if isinstance(path, LogSigmas) and stated is not None:
        stated = {"epsilon": "edm", "v_prediction": "edm_v"}.get(stated, stated)  # of the network inside the denoiser
    implied = "flow" if isinstance(path, Straight) else None
    own_x0 = isinstance(path, Sigmas) or (own is not None and noise is None and stated is None)
    if prediction is None and stated is None and implied is None and not own_x0:
        raise ValueError("expected prediction='epsilon', 'v', 'x0' or 'flow': nothing tells what the network predicts")
    name = check_prediction(prediction or stated or implied or "x0")
    if stated is not None and check_prediction(stated) != name:
        raise ValueError(f"prediction={prediction!r} contradicts the scheduler, which says {stated!r}")
    return network, path, name, shape


def _unpack(denoiser: Any) -> tuple[Callable[..., Any], Any, tuple[int, ...] | None]:
    """The network, the noise that comes with it and the event shape, the latter two perhaps None."""
    if hasattr(denoiser, "unet") and hasattr(denoiser, "scheduler"):
        extra = [part for part in ("vae", "vqvae", "text_encoder") if getattr(denoiser, part, None) is not None]
        if extra:
            raise ValueError(
                f"expected a pipeline of a network and a scheduler on pixels, got one with {extra}; pass a module that "
                "fixes the further inputs, and the scheduler as noise="
            )
        network, noise = denoiser.unet, denoiser.scheduler
    else:
        network = denoiser
        noise = denoiser.schedule if callable(getattr(denoiser, "schedule", None)) else None
    if not callable(network):
        raise TypeError(f"expected a network, a diffusers pipeline or an azula denoiser, got {type(denoiser).__name__}")
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if size is None:
        return network, noise, None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return network, noise, (network.config.in_channels, *sides)


def _event_shape(known: Sequence[int] | None, given: Sequence[int] | None, x: Tensor | None) -> torch.Size:
    shapes = [torch.Size(s) for s in (given, None if x is None else x.shape[1:], known) if s is not None]
    if not shapes:
        raise ValueError("expected event_shape=(C, H, W) or samples: nothing tells the shape of a data point")
    # What a network was configured for is a default only: convolutions take other sizes.
    if given is not None and x is not None and shapes[0] != shapes[1]:
        raise ValueError(f"expected samples of event shape {tuple(shapes[0])}, got {tuple(shapes[1])}")
    return shapes[0]


def _like(network: Callable[..., Any], x: Tensor | None) -> Tensor:
    """An empty tensor with the flow's dtype (at least single precision) and device."""
    own = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
    source = next((v for v in (x, own) if v is not None), torch.empty(0))
    dtype = source.dtype if source.dtype in (torch.float32, torch.double) else torch.float32
    return torch.empty(0, dtype=dtype, device=source.device if own is None else own.device)


def _axes(
    kind: str,
    x: Tensor | None,
    shape: torch.Size,
    velocity: DenoiserVelocity,
    mean: Any,
    sigma_data: float | None,
    like: Tensor,
) -> Basis:
    """Axes in the network's units, where its noise is the same in all directions, as a basis of the user's data."""
    factor, shift = flat(velocity.rescale[0], shape), flat(velocity.rescale[1], shape)
    if not bool((factor > 0).all()):
        raise ValueError(f"rescale=(factor, shift) expects factors > 0, got {velocity.rescale[0]}")
    if x is not None:
        if mean is not None or sigma_data is not None:
            raise ValueError("expected mean and sigma_data, or samples from which they are measured, not both")
        rows = x.flatten(1)
        seen = rows * factor.to(rows) + shift.to(rows)
        if kind == "auto" and kind_for("auto", seen.shape[1]) == "pca" and len(seen) < _ROWS_AN_AXIS * seen.shape[1]:
            few = "separable" if fits(shape) else "low_rank"
            kind = few if len(seen) > 16 and seen.shape[1] > 1 else "identity"
        found = Basis.choose(seen, kind, event_shape=shape).to(factor)
        return Basis((found.mean - shift) / factor, found.rotation, found.scale, 1 / factor).to(like)
    if kind not in ("auto", "identity"):
        raise ValueError(f"basis={kind!r} is found from data: it expects samples, or give a Basis")
    centre = -shift / factor if mean is None else flat(mean, shape)
    sd = 0.5 if sigma_data is None else float(sigma_data) * float(factor.square().mean().sqrt())
    if not (math.isfinite(sd) and sd > 0):
        raise ValueError(f"sigma_data expects a positive number, got {sigma_data!r}")
    return Basis(centre, factor.new_zeros(len(factor), 0), torch.full_like(factor, sd), 1 / factor).to(like)


def _whole_range(path: Noise, scale: Tensor) -> Schedule:
    """Equal noise on all axes, from the network's smallest to its largest."""
    s = scale.detach().double()
    start, end = math.atan(path.sigma_min / float(s.min())), math.atan(path.sigma_max / float(s.max()))
    if start >= end:
        raise ValueError(
            f"the denoiser's noise, {path.sigma_min:.4g} to {path.sigma_max:.4g}, does not span axes with standard "
            f"deviations from {s.min():.4g} to {s.max():.4g}; use basis='low_rank' or 'identity'"
        )
    return Schedule.details_first(power=1.0, start=start, end=end, octaves=0.5)


def _few(flow: InflationaryFlow) -> int:
    return max(4, min(_ROWS, _ROWS * 128**2 // flow.latent_dim**2))


def _bounded(flow: InflationaryFlow) -> int:
    """Rows to tune the solver on: where Newton's method is at work, an evaluation is ``D`` products for each."""
    return max(16, min(_ROWS, _ROWS * 16 // flow.latent_dim))


def _check_finite(flow: InflationaryFlow) -> None:
    """Refuse a network that returns NaN or infinity for plain noise, at some time."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, flow.latent_dim, generator=generator, dtype=torch.double).to(flow.basis.scale)
    t = torch.linspace(0, 1, 5, dtype=torch.double, device=flow.device)
    sigma = flow.basis.scale[0].double() * flow.angles(t)[:, 0].to(flow.device).tan()
    with torch.no_grad():
        for embedding, level in zip(flow.velocity.embed(t), sigma.tolist(), strict=True):
            if not bool(flow.velocity(y, embedding).isfinite().all()):
                raise ValueError(
                    f"from_denoiser expects finite answers of the denoiser, got NaN or infinity at sigma {level:.4g}; "
                    "look at its weights and its precision, and at whether noise is the range it was trained for"
                )


def _latent_moments(flow: InflationaryFlow, x: Tensor) -> dict[str, float]:
    """Mean square and kurtosis of the latents of samples, with standard errors; warns where they are not 1 and 3."""
    z = flow.basis.to_standard(x[: max(16, _ENTRIES // flow.latent_dim)].flatten(1))
    with torch.no_grad(), full_precision():
        for step in flow.map.steps(z, cheap_grid(_EVALUATIONS, flow.grid)).to_latent:
            z = take(flow.velocity, step, z)
    z = z.double()
    squares, fourth = z.square().mean(1), z.pow(4).mean(1)
    power, root = float(squares.mean()), len(z) ** 0.5
    power_error = float(squares.std()) / root
    kurtosis, kurtosis_error = float(fourth.mean()) / power**2, float(fourth.std()) / root / power**2
    # By the larger of what a Gaussian's would be and what is seen: few rows of heavy tails do not know their own.
    power_error = max(power_error, (2 / z.numel()) ** 0.5)
    kurtosis_error = max(kurtosis_error, (24 / z.numel()) ** 0.5)
    if not abs(power - 1) < max(_POWER, 4 * power_error):
        warnings.warn(
            f"the samples' latents have a mean square of {power:.3g} where 1 is expected: is noise the table "
            "alphas_cumprod itself (not its roots, nor betas), and that of this network? Look at prediction and "
            "rescale too; samples on which the network was trained to excess also come out below 1",
            stacklevel=3,
        )
    elif not abs(kurtosis - 3) < max(_KURTOSIS, 3 * kurtosis_error):
        left = float(flow.angles(torch.ones(1, dtype=torch.double)).cos().square().max())
        warnings.warn(
            f"the samples' latents have a kurtosis of {kurtosis:.3g} where a Gaussian's is 3: the largest noise does "
            f"not drown the data (up to {100 * left:.2g}% of a latent's variance are theirs), so that draws of the "
            "flow are not those of the data; give a larger noise if the network knows it",
            stacklevel=3,
        )
    return {"power": power, "power_error": power_error, "kurtosis": kurtosis, "kurtosis_error": kurtosis_error}


def _regression_error(flow: InflationaryFlow, x: Tensor, rows: int = 512) -> dict[str, Any]:
    """Mean square of ``F`` against its regression target, and that of a Gaussian's ``F = 0``; warns if it is worse.

    At each time an axis counts by the square of its speed ``theta_j'``, as its error moves the state: what a network in
    pixels says of fine axes that are all noise already is amplified, and does nothing.
    """
    x = x[: max(8, min(rows, rows * 128 // flow.latent_dim))]
    v = flow.basis.to_standard(x.reshape(len(x), -1))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(v.shape, generator=generator, dtype=torch.double).to(v)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.double, device=flow.device)
    theta, embedding = flow.angles(t).to(v), flow.velocity.embed(t)
    weight = flow.angles.speed(t).square()
    weight = (weight / weight.mean(-1, keepdim=True)).to(v)
    error, gaussian = [], []
    with torch.no_grad():
        for angle, features, counts in zip(theta, embedding, weight, strict=True):
            target = angle.sin() * v - angle.cos() * noise
            found = flow.velocity(angle.cos() * v + angle.sin() * noise, features)
            error.append(float((counts * (found - target).square()).mean()))
            gaussian.append(float((counts * target.square()).mean()))
    if sum(error) > 1.5 * sum(gaussian):
        warnings.warn(
            f"the denoiser is worse than a Gaussian: mean square error {sum(error) / 5:.3g} of the velocity on samples "
            f"against {sum(gaussian) / 5:.3g}. Untrained? Otherwise look at prediction, noise and rescale",
            stacklevel=3,
        )
    return {"times": t.tolist(), "error": error, "error_gaussian": gaussian, "rows": len(x)}
