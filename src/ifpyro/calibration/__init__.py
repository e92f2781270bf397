"""Is a posterior calibrated? Tests that work with any function from data to draws, and say how sure they are.

`sbc` asks whether an engine samples the posteriors of its own model; `coverage` and `tarp` take truths and draws from
anywhere, real data included; `latent_coverage` asks whether a flow's latent holds the probability it should.
"""

from ifpyro.calibration.coverage import Coverage, coverage
from ifpyro.calibration.engines import ManyHMC, ManySMC
from ifpyro.calibration.latent import LatentCoverage, latent_coverage
from ifpyro.calibration.pictures import ecdf_differences
from ifpyro.calibration.problems import Simulator
from ifpyro.calibration.result import SBC
from ifpyro.calibration.sbc import sbc
from ifpyro.calibration.tarp import Tarp, tarp

__all__ = [
    "SBC",
    "Coverage",
    "LatentCoverage",
    "ManyHMC",
    "ManySMC",
    "Simulator",
    "Tarp",
    "coverage",
    "ecdf_differences",
    "latent_coverage",
    "sbc",
    "tarp",
]
