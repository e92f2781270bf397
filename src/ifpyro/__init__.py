"""Inflationary flows as Pyro priors: train on samples, infer on the Gaussian latent, read the answer in ArviZ."""

import importlib
from typing import Any

from . import datasets
from .check import check
from .fidelity import fidelity
from .flow import InflationaryFlow
from .infer import HMC, MCMC, SMC, EllipticalSlice, linear_posterior
from .infer.reparam import reparam
from .pool import Pool
from .pretrained import from_denoiser
from .prior import FlowTransform
from .schedule import Schedule
from .storage import load_flow as load
from .training import fit
from .verdict import CheckResult

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
        from .arviz import to_arviz

        return to_arviz
    if name == "calibration":  # SciPy's statistics likewise
        return importlib.import_module(".calibration", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
