"""Inflationary flows as Pyro priors: train on samples, infer on the Gaussian latent, read the answer in ArviZ."""

import importlib
from typing import Any

from .checks.checking import check
from .checks.result import CheckResult
from .core.pool import Pool
from .data import datasets
from .flow.axes.schedule import Schedule
from .flow.distribution import FlowTransform
from .flow.file import load_flow as load
from .flow.flow import InflationaryFlow
from .flow.pretrained import from_denoiser
from .flow.solver.fidelity import fidelity
from .infer import HMC, MCMC, SMC, EllipticalSlice, linear_posterior
from .infer.model.reparam import reparam
from .training import fit

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "MCMC",
    "SMC",
    "CheckResult",
    "EllipticalSlice",
    "FlowTransform",
    "InflationaryFlow",
    "Pool",
    "Schedule",
    "calibration",
    "check",
    "datasets",
    "fidelity",
    "fit",
    "from_denoiser",
    "linear_posterior",
    "load",
    "reparam",
    "to_arviz",
]


def __getattr__(name: str) -> Any:
    if name == "to_arviz":  # ArviZ takes seconds to import, and training and sampling do not need it
        from .infer.results.arviz import to_arviz

        return to_arviz
    if name == "calibration":  # SciPy's statistics likewise
        return importlib.import_module(".calibration", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
