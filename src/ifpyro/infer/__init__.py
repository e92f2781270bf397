"""Posterior inference on the Gaussian latent, all chains in one batch."""

from ifpyro.infer.elliptical import EllipticalSlice
from ifpyro.infer.hmc import HMC
from ifpyro.infer.linear import linear_posterior
from ifpyro.infer.mcmc import MCMC
from ifpyro.infer.smc import SMC

__all__ = ["HMC", "MCMC", "SMC", "EllipticalSlice", "linear_posterior"]
