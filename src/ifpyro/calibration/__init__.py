"""Is a posterior calibrated? Tests that work with any function from data to draws, and say how sure they are."""

from ifpyro.calibration.coverage import Coverage, coverage
from ifpyro.calibration.latent import LatentCoverage, latent_coverage

__all__ = ["Coverage", "LatentCoverage", "coverage", "latent_coverage"]
