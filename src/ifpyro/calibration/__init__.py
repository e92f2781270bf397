"""Is a posterior calibrated? Tests that work with any function from data to draws, and say how sure they are.

`sbc` asks whether an engine samples the posteriors of its own model; `coverage` and `tarp` take truths and draws from
anywhere, real data included; `latent_coverage` asks whether a flow's latent holds the probability it should.
"""

from .coverage import Coverage, coverage
from .figures import ecdf_differences
from .latent import LatentCoverage, latent_coverage
from .simulated.engines import ManyHMC, ManySMC
from .simulated.problems import Simulator
from .simulated.result import SBC
from .simulated.sbc import sbc
from .tarp import Tarp, tarp

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
