"""The posterior of a flow prior under a linear observation with Gaussian noise, ``y = A x + e``: in-painting, missing
entries, deblurring, tomography.

Up to 32 axes the draws are those of the flow's own posterior, up to the Monte Carlo error of their number, at any
noise: importance sampling, or tempered SMC where that does not suffice, from the posterior of the flow's Gaussian or
from the prior, whichever is nearer (:mod:`ifpyro.infer.engines.linear_densities`). Beyond, where a log-density costs
too much, they come from the stochastic reverse process (:mod:`ifpyro.infer.engines.linear_reverse`), which is exact for
a Gaussian flow alone. The result says which it was.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...core.arguments import check_count, check_fraction
from ...core.errors import ConvergenceWarning
from ...flow.flow import InflationaryFlow
from ..results.convergence import Verdict, observation_check
from .linear_densities import AGREEMENT, FromGaussian, FromPrior
from .linear_observation import LinearObservation
from .linear_reverse import reverse_process
from .smc import SMC
from .tempering import effective_fraction, systematic_resample

EXACT_UP_TO = 32
"""Axes up to which draws are exact by default: a minute for one observation, at most."""

PARTICLES = 256
"""Least number of draws from which those asked for are resampled."""

ISLANDS = 4
MOST_PER_PARTICLE = 64
"""Most draws of the reference for each particle: they need no gradients, and so many cost less than tempering."""

LITTLE_LEARNED = 300.0
"""Standard deviation of the log-likelihood over the prior, in nats, up to which tempering from the prior is quicker."""

_PILOT = 16  # evaluations with which the references are compared
_MATCHED = 64  # draws on which a surrogate is compared with the flow


class LinearDraws(Tensor):
    """Draws of :func:`linear_posterior`: a tensor ``(*batch, draws, *event_shape)`` that knows how it was made.

    What is computed from it is a plain tensor.

    Attributes:
        exact: whether the draws are those of the flow's posterior up to Monte Carlo error; if not, they are those of an
            approximation whose error no number of draws removes.
        method: how they were made, in words.
        log_evidence: ``log p(y)`` under the flow for every observation, ``(*batch,)``; None where it is not known.
    """

    exact: bool
    method: str
    log_evidence: Tensor | None

    @classmethod
    def of(cls, draws: Tensor, exact: bool, method: str, log_evidence: Tensor | None = None) -> "LinearDraws":
        """The draws with what is known of them."""
        made = draws.as_subclass(cls)
        made.exact, made.method, made.log_evidence = exact, method, log_evidence
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As for any tensor, with a plain tensor as the result."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def linear_posterior(
    flow: InflationaryFlow,
    operator: Any,
    y: Any,
    sd: Any,
    *,
    adjoint: Any = None,
    draws: int = 64,
    exact: bool | None = None,
    sweeps: int = 10,
    ratio: float = 0.75,
    seed: int = 0,
    batch_size: int = 1024,
    progress: bool = True,
) -> LinearDraws:
    r"""Draws of ``x ~ flow`` given ``y ~ Normal(A x, sd)``.

    Args:
        flow: a flow on real data.
        operator: ``A``: a matrix ``(m, D)`` on the flattened event, an array or tensor of any number type; a boolean
            mask of the event's shape, True where an entry is seen; or a linear callable from events ``(n,
            *event_shape)`` to observations ``(n, *observed_shape)``.
        y: observations, ``(*batch, m)``, or ``(*batch, *observed_shape)``: any number of them. With a mask also whole
            events, whose hidden entries may be anything.
        sd: standard deviation of the noise, a positive number or one for every entry of ``y``.
        adjoint: the transpose of a callable operator, from observations to events; autograd's by default.
        draws: number of draws for each observation.
        exact: True for draws of the flow's own posterior, which take ``D`` products of the network's Jacobian an
            evaluation; False for the approximate reverse process, some hundred evaluations a draw. By default exact up
            to 32 axes.
        sweeps: of the reverse process, how often a noise level is noised and denoised: more come nearer to the
            posterior.
        ratio: of the reverse process, between neighbouring noise levels, below 1: nearer 1 comes nearer.
        seed: of all randomness; the same seed gives the same draws.
        batch_size: most rows that the network sees at once; bounds memory.
        progress: show a progress bar, over observations or noise levels.

    Returns:
        ``(*batch, draws, *event_shape)``, a tensor with attributes: ``exact``, ``method``, ``log_evidence`` (see
        :class:`LinearDraws`). Draws of an observation come from one population: they are equally weighted, and nearly
        independent.

    Raises:
        TypeError: on an operator that is neither numbers, nor a mask, nor callable.
        ValueError: on shapes that do not fit, noise that is not positive, an operator that is not linear, a flow with a
            support, or numbers out of range.

    Example:
        >>> operator, y = torch.tensor([[1.0, 1.0]]), torch.tensor([0.3])  # the sum of the coordinates was seen
        >>> draws = ifpyro.linear_posterior(flow, operator, y, 0.5, draws=400, seed=0, progress=False)
        >>> draws.exact
        True
        >>> abs(draws.sum(-1).mean() - 0.457) < 0.12  # exact: 0.457
        tensor(True)
        >>> row = torch.tensor([1.0, torch.nan])  # a row of a table with a gap
        >>> ifpyro.linear_posterior(flow, ~row.isnan(), row, 0.01, seed=0, progress=False).shape
        torch.Size([64, 2])
    """
    draws, sweeps = check_count("draws", draws, 1), check_count("sweeps", sweeps, 1)
    ratio, batch_size = check_fraction("ratio", ratio), check_count("batch_size", batch_size, 1)
    exact = _is_exact(flow, exact)
    seen = LinearObservation.read(flow, operator, y, sd, adjoint)
    generator = torch.Generator(flow.device).manual_seed(seed)
    shape = (*seen.batch, draws, *flow.event_shape)
    if not exact:
        x = reverse_process(
            flow,
            seen,
            draws=draws,
            sweeps=sweeps,
            ratio=ratio,
            generator=generator,
            batch_size=batch_size,
            progress=progress,
        )
        residual = (seen.y[:, None] - seen.forward(x.double()).reshape(len(seen.y), draws, -1)) / seen.sd
        verdict = Verdict([observation_check(residual)])
        if not verdict.converged:
            warnings.warn(verdict.message("linear_posterior's draws"), ConvergenceWarning, stacklevel=2)
        method = f"reverse process, {sweeps} sweeps, noise levels a factor {ratio:g} apart"
        return LinearDraws.of(x.to(flow.dtype).reshape(shape), False, method)
    found, evidence, methods, troubled = [], [], set(), []
    for row in tqdm(seen.y, disable=not progress, desc="observations"):
        x, log_evidence, method, trouble = _posterior(flow, seen._replace(y=row[None]), draws, generator, batch_size)
        found.append(x)
        troubled += [trouble] if trouble else []
        evidence.append(log_evidence)
        methods.add(method)
    if troubled:
        said = (
            f"the draws of {len(troubled)} of {len(seen.y)} observations may not be trusted; the first: {troubled[0]}"
        )
        warnings.warn(said, ConvergenceWarning, stacklevel=2)
    x = torch.stack(found) if found else torch.empty(0, device=flow.device)
    evidences = torch.tensor(evidence, dtype=torch.double).reshape(seen.batch)
    return LinearDraws.of(x.to(flow.dtype).reshape(shape), True, "; ".join(sorted(methods)), evidences)


def _posterior(
    flow: InflationaryFlow, seen: LinearObservation, draws: int, generator: torch.Generator, batch_size: int
) -> tuple[Tensor, float, str, str]:
    """Flattened draws ``(draws, D)`` given one observation, its log-evidence, how they were made, and what is wrong."""
    particles = ISLANDS * math.ceil(max(draws, PARTICLES) / ISLANDS)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    start = _start(flow, seen, generator, batch_size)

    def run() -> tuple[SMC, Tensor, Tensor]:
        sampler = SMC(start, particles, num_islands=ISLANDS, prior_draws=MOST_PER_PARTICLE, seed=seed, progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # all observations are summed up in the end
            sampler.run()
        q = sampler.positions().flatten(0, 1)
        log_weight = sampler.island_log_evidence.repeat_interleave(particles // ISLANDS)
        if isinstance(start, FromGaussian) and start.evaluations is not None:
            with torch.no_grad():
                gap = start.log_ratio(q, None).double() - start(q)[1].double()
            log_weight = log_weight + gap.nan_to_num(-torch.inf)
        return sampler, q, log_weight

    sampler, q, log_weight = run()
    if isinstance(start, FromGaussian) and float(effective_fraction(log_weight)) < AGREEMENT / 2:
        start.evaluations = None
        sampler, q, log_weight = run()
    index = systematic_resample(log_weight[None], generator, draws)[0]
    index = index[torch.randperm(draws, generator=generator, device=index.device)]
    with torch.no_grad():
        x = start.events(q[index])
    log_evidence = float(log_weight.logsumexp(0)) - math.log(particles)
    how = "importance sampling" if sampler.stages[-1].moves == 0 else "tempered SMC"
    origin = "the Gaussian's posterior" if isinstance(start, FromGaussian) else "the prior"
    return x, log_evidence + start.log_reference, f"{how} from {origin}", sampler.attributes.get("convergence", "")


def _start(
    flow: InflationaryFlow, seen: LinearObservation, generator: torch.Generator, batch_size: int
) -> FromGaussian | FromPrior:
    """The nearer reference, as far as draws of both tell."""
    near, far = FromGaussian(flow, seen, batch_size), FromPrior(flow, seen, batch_size)
    with torch.no_grad():
        q = near.sample_prior(PARTICLES, generator)
        near.evaluations = _PILOT
        log_ratio = near(q)[1]
        chosen = systematic_resample(log_ratio.nan_to_num(-torch.inf)[None], generator, _MATCHED)[0]
        near.match(q[chosen])
        log_likelihood = far(far.sample_prior(PARTICLES, generator))[1]
    shares = [float(effective_fraction(w.nan_to_num(-torch.inf))) for w in (log_ratio, log_likelihood)]
    enough = 2 / MOST_PER_PARTICLE
    if max(shares) >= enough:
        return near if shares[0] >= shares[1] else far
    return far if float(log_likelihood.std()) < LITTLE_LEARNED else near


def _is_exact(flow: InflationaryFlow, exact: bool | None) -> bool:
    """Whether draws are to be exact, refused where they cannot be."""
    if not isinstance(flow, InflationaryFlow):
        raise TypeError(f"linear_posterior expects a flow, got {type(flow).__name__}; train one with ifpyro.fit")
    if flow.bijection() is not None:
        raise ValueError(
            "linear_posterior expects a flow on real data: y is linear in the data themselves, which have a support; "
            "use ifpyro.SMC with a Pyro model"
        )
    if exact and flow.latent_dim > flow.exact_up_to:
        raise ValueError(
            f"exact=True expects a flow whose log-density is exact, of at most {flow.exact_up_to} axes, got "
            f"{flow.latent_dim}; use ifpyro.SMC with a Pyro model, or raise flow.exact_up_to"
        )
    return flow.latent_dim <= min(EXACT_UP_TO, flow.exact_up_to) if exact is None else exact
