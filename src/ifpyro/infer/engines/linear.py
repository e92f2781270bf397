r"""Posterior of a flow prior under a linear observation with Gaussian noise, by noising and denoising in turn.

For ``y = A x + sigma e``, such as in-painting, deblurring or tomography. An auxiliary noised ``x_eta = x + eta n``
whose noise is part of the observation's makes both conditionals easy (split Gibbs sampling; Vono, Dobigeon & Chainais
2019; with a diffusion prior Wu et al. 2024). With ``kappa = 1 / |A|``, ``eta = kappa sigma``,

.. math::

    x_\eta \mid x, y &= u + \kappa^2 A^T (y + e' - A u), \qquad u = x + \eta n, \quad
                       e' \sim N(0, \sigma^2 (I - \kappa^2 A A^T)), \\
    x \mid x_\eta &\quad \text{drawn by the diffusion's own reverse process, from noise } \eta \text{ to none.}

The invariant law of ``x`` is the posterior itself, not a relaxation of it: no gradient is taken, nothing is tuned, and
a sweep costs one short reverse process. Sweeps begin with more noise and anneal: at ``sigma' > sigma`` they sample the
posterior tempered with ``beta = (sigma / sigma')^2``, and where noise hides all structure one sweep forgets everything.

Later sweeps forget less: along a direction that nothing is seen of, in which the posterior has standard deviation
``s``, one at noise ``eta`` keeps ``s^2 / (s^2 + eta^2)`` of a deviation, so that hidden pixels walk in steps of
``eta``. There are therefore several sweeps at the last levels, and ``x_eta``, whose law given ``x`` and ``y`` is
Gaussian, is over-relaxed (Adler 1981): it lands on the other side of its mean, which leaves its law as it is and lets
the walk keep its direction,

.. math:: x_\eta' = \mu(x) - \rho\, (x_\eta - \mu(x)) + \sqrt{1 - \rho^2}\, (\text{fresh noise of } x_\eta \mid x, y).

The prior is that of the stochastic reverse process with the flow's network: the flow's own, as far as network and
steps are exact.

Where the posterior has well separated modes, a draw stays in that to which annealing brought it, and the modes' weights
can be far off (``benchmarks/truth_mixture.py`` measures it): :class:`ifpyro.SMC` is for those.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...core.precision import full_precision
from ...flow.flow import InflationaryFlow

_NODES = 4097
_ANNEALING = 0.5  # ratio of neighbouring noise levels far above the final one
_NEAR = 2  # octaves above the final noise in which a sweep does not forget where it started: there are
_SWEEPS = 10  # in each of them
_OVER = 0.7  # over-relaxation: nearer 1 walks on for longer, but then directions that forget at once swing for longer


@dataclass(frozen=True)
class _Level:
    """One noise level: the same standard deviation ``eta`` on all axes, in the flow's angles."""

    eta: float
    embedding: Tensor
    cos: Tensor
    sin: Tensor


@full_precision()
def linear_posterior(
    flow: InflationaryFlow,
    operator: Tensor,
    y: Tensor,
    sd: float,
    *,
    draws: int = 64,
    sweeps: int = 20,
    ratio: float = 0.75,
    start: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> Tensor:
    r"""Independent draws of ``x ~ flow`` given ``y ~ Normal(A x, sd)``.

    Args:
        flow: a flow with the same noise on every axis (``Schedule.details_first(power=1)``), on real data.
        operator: ``A``, shape ``(m, D)``, on the flattened event.
        y: observations, ``(m,)``, or ``(*batch, m)``: several are cheaper together than one after the other.
        sd: standard deviation ``sigma`` of the noise.
        draws: number of draws for each observation; each is a chain of its own.
        sweeps: at the final noise, after annealing.
        ratio: of neighbouring noise levels, in annealing and in the reverse process: nearer 1 is more exact.
        start: where the chains begin, ``(*batch, draws, *event_shape)``, such as draws of an earlier call that are to
            go on or draws of another sampler: all sweeps are then at the final noise. By default nowhere, with
            annealing.
        seed: of all randomness.
        batch_size: most rows denoised at once.
        progress: show a progress bar over sweeps.

    Returns:
        ``(*batch, draws, *event_shape)``.

    Raises:
        ValueError: on shapes that do not fit, a flow with a support or unequal noise, or numbers out of range.
    """
    _check(flow, operator, y, sd, draws, sweeps, ratio)
    if start is not None and start.shape != (*y.shape[:-1], draws, *flow.event_shape):
        raise ValueError(
            f"linear_posterior expects start of shape {(*y.shape[:-1], draws, *flow.event_shape)}, one event for each "
            f"of {draws} draws, got {tuple(start.shape)}"
        )
    batch, dim = y.shape[:-1], flow.latent_dim
    generator = torch.Generator(flow.device).manual_seed(seed)
    target = y.reshape(-1, 1, y.shape[-1]).expand(-1, draws, -1).reshape(-1, y.shape[-1])
    squares, axes = torch.linalg.eigh(operator.double() @ operator.double().T)
    kappa = float(squares.max()) ** -0.5
    left = (1 - kappa**2 * squares).clamp(min=0).sqrt().to(y)  # of I - kappa^2 A A^T, on these axes
    axes = axes.to(y)

    ladder, last = _ladder(flow, kappa * sd, ratio)
    plan = [*(_annealing(last, ratio) if start is None else []), *([last] * sweeps)]

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=y.dtype, device=y.device)

    x = flow.basis.from_standard(normal(torch.Size([len(target), dim]))) if start is None else start.reshape(-1, dim)
    noised, before = x, -1
    with torch.no_grad():
        for k in tqdm(plan, disable=not progress, desc="noise and denoise"):
            mean = x + kappa**2 * (target - x @ operator.T) @ operator
            fresh = ladder[k].eta * normal(x.shape)
            noise = (normal(target.shape) * left) @ axes.T * (ladder[k].eta / kappa)
            fresh = fresh + kappa**2 * (noise - fresh @ operator.T) @ operator
            if k == before:
                fresh = _OVER * (mean - noised) + math.sqrt(1 - _OVER**2) * fresh
            noised, before = mean + fresh, k
            x = torch.cat([_denoise(flow, rows, ladder[k:], generator) for rows in noised.split(batch_size)])
    return x.reshape(*batch, draws, *flow.event_shape)


def _annealing(last: int, ratio: float) -> list[int]:
    """Levels of the sweeps before those at the final noise."""
    stride = max(1, round(math.log(_ANNEALING) / math.log(ratio)))
    near = max(0, last - round(_NEAR * math.log(2) / -math.log(ratio)))
    repeats = max(1, round(_SWEEPS * -math.log2(ratio)))
    return [*range(0, near, stride), *(k for k in range(near, last) for _ in range(repeats))]


def _denoise(flow: InflationaryFlow, x: Tensor, ladder: list[_Level], generator: torch.Generator) -> Tensor:
    """Draws of the data given data with noise of the ladder's first level: the reverse process down the ladder.

    Means are exact at any step. The variance takes that of ``x_0`` given the state from the identity ``E[(target -
    F)^2] = 1 - E[F^2]`` on every axis, averaged over rows.
    """
    basis, evaluated = flow.basis, flow.evaluated_velocity()
    state = basis.to_standard(x) * ladder[0].cos
    for now, after in zip(ladder, [*ladder[1:], None], strict=True):
        velocity = evaluated(state, now.embedding)
        clean = now.cos * state + now.sin * velocity
        spread = now.sin.square() * (1 - velocity.square().mean(0)).clamp(0.02, 1)
        xi = torch.randn(state.shape, generator=generator, dtype=x.dtype, device=x.device)
        if after is None:
            return basis.from_standard(clean + spread.sqrt() * xi)
        keep = (after.eta / now.eta) ** 2
        tangent = after.sin / after.cos
        mean = (1 - keep) * clean + keep * state / now.cos
        variance = (1 - keep) ** 2 * spread + (1 - keep) * tangent.square()
        state = after.cos * (mean + variance.sqrt() * xi)
    raise AssertionError("unreachable: a ladder has a last level")


def _ladder(flow: InflationaryFlow, sd: float, ratio: float) -> tuple[list[_Level], int]:
    """Noise levels a factor ``ratio`` apart, and the index of ``sd`` among them: from twice the data's largest scale to
    the noise floor, or to where all that is left to resolve lies below a fifth of the smallest scale."""
    scale, t = flow.basis.scale.double(), torch.linspace(0, 1, _NODES, dtype=torch.double, device=flow.device)
    log_eta = torch.log(scale[0] * flow.angles(t)[:, 0].tan())
    low = max(float(log_eta[0]), math.log(0.2 * float(scale.min())))
    high = min(float(log_eta[-1]), math.log(2 * float(scale.max())))
    step = -math.log(ratio)
    centre = min(max(math.log(sd), low), high)
    up, down = int((high - centre) / step), int((centre - low) / step)
    wanted = centre + step * torch.arange(up, -down - 1, -1, dtype=torch.double, device=flow.device)
    right = torch.searchsorted(log_eta, wanted).clamp(1, _NODES - 1)
    share = (wanted - log_eta[right - 1]) / (log_eta[right] - log_eta[right - 1])
    times = t[right - 1] + share.clamp(0, 1) * (t[right] - t[right - 1])
    theta, embedding = flow.angles(times), flow.velocity.embed(times)
    eta = (scale[0] * theta[:, 0].tan()).tolist()
    cos, sin = theta.cos().to(flow.basis.scale), theta.sin().to(flow.basis.scale)
    return [_Level(*parts) for parts in zip(eta, embedding, cos, sin, strict=True)], up


def _check(flow: Any, operator: Tensor, y: Tensor, sd: float, draws: int, sweeps: int, ratio: float) -> None:
    dim = flow.latent_dim
    if flow.bijection() is not None:
        raise ValueError("linear_posterior expects a flow on real data: y is linear in the data themselves")
    if operator.ndim != 2 or operator.shape[1] != dim or y.shape[-1:] != operator.shape[:1]:
        raise ValueError(
            f"linear_posterior expects an operator of shape (m, {dim}) and y of shape (*batch, m), got "
            f"{tuple(operator.shape)} and {tuple(y.shape)}"
        )
    if not (sd > 0 and 0 < ratio < 1 and draws >= 1 and sweeps >= 1):
        raise ValueError(
            f"linear_posterior expects sd > 0, 0 < ratio < 1, draws >= 1 and sweeps >= 1, got sd={sd}, ratio={ratio}, "
            f"draws={draws}, sweeps={sweeps}"
        )
    middle = torch.tensor([0.5], dtype=torch.double)
    eta = (flow.basis.scale.double().cpu() * flow.basis.unit.double().cpu()) * flow.angles(middle)[0].tan()
    if not torch.allclose(eta, eta[:1], rtol=1e-4, atol=0.0):
        raise ValueError(
            "linear_posterior expects a flow that puts the same noise on every axis and column, got noise between "
            f"{float(eta.min()):.3g} and {float(eta.max()):.3g} at half time; train it with "
            "Schedule.details_first(power=1) and own_units=False"
        )
