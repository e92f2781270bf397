"""The samplers that peers_posterior.py sets against each other, each with a clock to report to."""

import contextlib
import math
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import ifpyro
import ifpyro.infer.results.arviz  # its first import is no part of sampling
from peers_nsf import DATA, LATENT, NSFPosterior
from peers_reference import OBSERVED
from posterior import Problem

PARTICLES = {"moons": (2048, 4096), "scurve": (2048, 4096), "digits": (1024, 4096)}  # in four islands
WARMUP, OUR_WARMUP = 60, 20  # transitions; ours, which SMC starts and tunes, needs few


class TimeIsUp(BaseException):
    """Raised in a sampler when its time is up; not an Exception, which our drivers would report as a failing model."""


class Clock:
    """Processor seconds of one sampler, and where its draws go.

    Args:
        cap: processor seconds.
        send: takes a dictionary of seconds, values, log_weight, fresh and in_x.
    """

    def __init__(self, cap: float, send: Callable[[dict[str, Any]], None]) -> None:
        self.cap, self.send = cap, send
        self.start()

    def start(self) -> None:
        """Count from here. A compiled call that goes on long after the time is up ends the process."""
        self.began = time.process_time()
        limit = math.ceil(self.began + 1.1 * self.cap + 2)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))

    def tick(self) -> float:
        """Seconds so far.

        Raises:
            TimeIsUp: when they are spent.
        """
        seconds = time.process_time() - self.began
        if seconds > self.cap:
            raise TimeIsUp
        return seconds

    def report(self, values: Any, log_weight: Any = None, *, in_x: bool = False) -> None:
        """More draws, ``(chains, draws, D)``: latents, or data if ``in_x``."""
        self._send(self.tick(), values, log_weight, False, in_x)

    def report_run(self, values: Any, log_weight: Any = None, *, in_x: bool = False) -> None:
        """A finished run that stands alone; the next size starts now, if half of the time was not needed for this."""
        seconds = time.process_time() - self.began
        self._send(seconds, values, log_weight, True, in_x)
        if seconds > self.cap / 2:
            raise TimeIsUp
        self.start()

    def _send(self, seconds: float, values: Any, log_weight: Any, fresh: bool, in_x: bool) -> None:
        weight = None if log_weight is None else np.asarray(log_weight)
        self.send(
            {"seconds": seconds, "values": np.asarray(values), "log_weight": weight, "fresh": fresh, "in_x": in_x}
        )


def jax_sampler(make: str) -> Callable[..., None]:
    """One of peers_jax's generators."""

    def run(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
        import peers_jax

        columns, noise = OBSERVED[name]
        clock.start()  # JAX is imported
        target = peers_jax.target(problem.flow, columns, problem.y, noise)
        for block in getattr(peers_jax, make)(target, seed):
            (clock.report_run if block.fresh else clock.report)(block.z, block.log_weight)

    return run


def importance(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    while True:
        z = torch.randn(4096, problem.flow.latent_dim, generator=generator)
        with torch.no_grad():
            x = problem.flow.decode(z)
            clock.report(x.flatten(1)[None], problem.likelihood(x)[None], in_x=True)


def pyro_nuts(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
    _pyro(ifpyro.reparam(problem.model), "x_base", problem, clock, seed)


def pyro_nuts_nsf(label: str) -> Callable[..., None]:
    """The prior: a zuko NSF, trained beforehand."""

    def run(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
        nsf = NSFPosterior(name, label)
        clock.start()  # it is loaded
        _pyro(nsf.model, nsf.site, problem, clock, seed, nsf.draws_to_x)

    return run


def _pyro(
    model: Any,
    site: str,
    problem: Problem,
    clock: Clock,
    seed: int,
    to_x: Callable[[Tensor], Tensor] | None = None,
) -> None:
    def hook(kernel: Any, params: dict[str, Tensor], stage: str, index: int) -> None:
        clock.tick()
        if stage == "Sample":
            value = params[site].detach()[None, None]
            clock.report(value if to_x is None else to_x(value), in_x=to_x is not None)

    pyro.set_rng_seed(seed)
    MCMC(NUTS(model), num_samples=10**6, warmup_steps=WARMUP, hook_fn=hook, disable_progbar=True).run(problem.y)


def our_smc(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
    for particles in PARTICLES[name]:
        smc = ifpyro.SMC(problem.model, particles, seed=seed, progress=False)
        smc.run(problem.y)
        clock.report_run(smc.get_samples(group_by_chain=True)["x"].flatten(2), in_x=True)


def our_hmc(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
    _ours(ifpyro.HMC(problem.model), problem, clock, seed)


def our_elliptical(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
    _ours(ifpyro.EllipticalSlice(problem.model), problem, clock, seed)


def _ours(kernel: Any, problem: Problem, clock: Clock, seed: int) -> None:
    """64 chains from a short SMC pass; every transition after the warm-up is reported as it is made."""
    draw = kernel.draw

    def reporting(state: Any) -> Any:
        state, stats = draw(state)
        clock.report(kernel.positions(state)[:, None])
        return state, stats

    kernel.draw = reporting
    ifpyro.MCMC(kernel, 10**6, OUR_WARMUP, num_chains=64, seed=seed, progress=False).run(problem.y)


def our_hmc_in_jax(name: str, problem: Problem, clock: Clock, seed: int = 0) -> None:
    """Warm-up by our HMC in torch (its seconds count), then its transitions in JAX."""
    import peers_jax

    clock.start()
    kernel = ifpyro.HMC(problem.model)
    states: list[Any] = []
    freeze = kernel.freeze

    def stop(state: Any) -> Any:
        states.append(freeze(state))
        raise KeyboardInterrupt

    kernel.freeze = stop  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt), warnings.catch_warnings(action="ignore"):
        ifpyro.MCMC(kernel, 1, OUR_WARMUP, num_chains=64, seed=seed, progress=False).run(problem.y)
    proposal = kernel._proposal
    names = ("reference", "_factor", "_inverse", "_centre", "_log_det")
    fitted = None
    if proposal is not None:
        fitted = {n.strip("_"): getattr(proposal, n).numpy() for n in names}
        fitted |= {"bandwidth": np.asarray(proposal.bandwidth), "prior": np.asarray(0.1)}
    tuned = peers_jax.Tuned(
        start=states[0].q.numpy(),
        step_size=kernel._step.step_size,
        length=kernel._length.length,
        most_steps=kernel._most_steps,
        scale=kernel._metric.scale.numpy(),
        reference=fitted,
    )
    columns, noise = OBSERVED[name]
    target = peers_jax.target(problem.flow, columns, problem.y, noise, kernel._target.level)
    for block in peers_jax.our_hmc(target, seed, tuned):
        clock.report(block.z)


SAMPLERS: dict[str, Callable[..., None]] = {
    "ifpyro SMC": our_smc,
    "ifpyro HMC": our_hmc,
    "ifpyro elliptical slice": our_elliptical,
    "ifpyro HMC in JAX": our_hmc_in_jax,
    "importance sampling": importance,
    "Pyro NUTS": pyro_nuts,
    DATA: pyro_nuts_nsf(DATA),
    LATENT: pyro_nuts_nsf(LATENT),
    "NumPyro NUTS": jax_sampler("numpyro_nuts"),
    "BlackJAX ChEES": jax_sampler("blackjax_chees"),
    "BlackJAX tempered SMC": jax_sampler("blackjax_smc"),
}
