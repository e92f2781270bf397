"""Engines of this library that take many data sets in one batch.

Each data set has particles, chains, metric and jumps of its own; step size, trajectory length and temperatures are
shared. Chains start from the prior or from SMC, never from the truth, which would hide chains that do not
converge.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ...infer.engines.hmc import HMC
from ...infer.engines.mcmc import MCMC
from ...infer.engines.smc import SMC
from ...infer.model.many import ManyDataSets


@dataclass(frozen=True)
class ManySMC:
    """Tempered SMC for many data sets at once.

    Args:
        particles: per data set; all of them become draws.
        islands: per data set, at least 2.
        block: most data sets in one batch.
        options: of `ifpyro.SMC`.

    Example:
        >>> ifpyro.calibration.ManySMC(particles=128, islands=2)
        ManySMC(particles=128, islands=2, block=100, options={})
    """

    particles: int = 256
    islands: int = 4
    block: int = 100
    options: dict[str, Any] = field(default_factory=dict)

    def sample(self, density: ManyDataSets, seed: int) -> Tensor:
        """Draws of every data set, ``(S, 1, particles, dim)``: its islands one after the other, by their evidence."""
        count = density.families
        smc = SMC(
            density,
            self.particles * count,
            num_islands=self.islands * count,
            seed=seed,
            progress=False,
            **self.options,
        )
        return smc.run_density(density).pooled(self.particles * count).reshape(count, 1, self.particles, -1)


@dataclass(frozen=True)
class ManyHMC:
    """Hamiltonian Monte Carlo for many data sets at once.

    Args:
        chains: per data set.
        warmup: transitions before, which tune.
        draws: per chain.
        particles: per data set, of the SMC pass that finds starting points.
        init: ``"smc"``, or ``"prior"`` (posteriors with one mode only).
        block: most data sets in one batch.
        options: of `ifpyro.HMC`.

    Example:
        >>> ifpyro.calibration.ManyHMC(chains=2, draws=50)
        ManyHMC(chains=2, warmup=150, draws=50, particles=128, init='smc', block=100, options={})
    """

    chains: int = 4
    warmup: int = 150
    draws: int = 100
    particles: int = 128
    init: Literal["smc", "prior"] = "smc"
    block: int = 100
    options: dict[str, Any] = field(default_factory=dict)

    def sample(self, density: ManyDataSets, seed: int) -> Tensor:
        """Draws of every data set, ``(S, chains, draws, dim)``."""
        count = density.families
        mcmc = MCMC(
            HMC(density, **self.options),
            self.draws,
            self.warmup,
            self.chains * count,
            init=self.init,
            smc_particles=self.particles * count,
            seed=seed,
            progress=False,
        )
        return mcmc.run().positions().reshape(count, self.chains, self.draws, -1)
