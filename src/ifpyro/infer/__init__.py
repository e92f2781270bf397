"""Posterior inference on the Gaussian latent, all chains in one batch."""

from .engines.elliptical import EllipticalSlice
from .engines.hmc import HMC
from .engines.linear import linear_posterior
from .engines.mcmc import MCMC
from .engines.smc import SMC

__all__ = ["HMC", "MCMC", "SMC", "EllipticalSlice", "linear_posterior"]
