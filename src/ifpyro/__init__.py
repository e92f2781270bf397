"""Inflationary flows as Pyro priors: train on samples, infer on the Gaussian latent, read the answer in ArviZ."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .core.errors import BatchingError, ConvergenceWarning, IfpyroError, ModelError, PoolError
from .core.pool import Pool
from .core.version import __version__ as __version__
from .data import datasets
from .data.circle import circular
from .flow.axes.basis import Basis
from .flow.axes.schedule import Schedule
from .flow.conditional import ConditionalFlow
from .flow.decoder import Decoder
from .flow.distribution import ConditionalFlowTransform, FlowTransform
from .flow.file import load_flow as load
from .flow.flow import InflationaryFlow, LogProbEstimate
from .flow.networks.mlp import MLP
from .flow.networks.velocity import Velocity
from .flow.pretrained import from_denoiser
from .flow.solver.fidelity import fidelity
from .flow.solver.grid import Grid
from .infer import HMC, MCMC, SMC, EllipticalSlice, linear_posterior
from .infer.model.reparam import reparam
from .training import Recipe, fit

if _TYPE_CHECKING:
    from . import calibration
    from .amortised.amortise import amortise
    from .checks.checking import check
    from .checks.result import CheckResult
    from .infer.results.arviz import to_arviz

_LATER = {  # what takes seconds to import, and what training and sampling do not need
    "CheckResult": ".checks.result",
    "amortise": ".amortised.amortise",
    "calibration": ".calibration",
    "check": ".checks.checking",
    "to_arviz": ".infer.results.arviz",
}

__all__ = [
    "HMC",
    "MCMC",
    "MLP",
    "SMC",
    "Basis",
    "BatchingError",
    "CheckResult",
    "ConditionalFlow",
    "ConditionalFlowTransform",
    "ConvergenceWarning",
    "Decoder",
    "EllipticalSlice",
    "FlowTransform",
    "Grid",
    "IfpyroError",
    "InflationaryFlow",
    "LogProbEstimate",
    "ModelError",
    "Pool",
    "PoolError",
    "Recipe",
    "Schedule",
    "Velocity",
    "amortise",
    "calibration",
    "check",
    "circular",
    "datasets",
    "fidelity",
    "fit",
    "from_denoiser",
    "linear_posterior",
    "load",
    "reparam",
    "to_arviz",
]


def __getattr__(name: str) -> _Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(_LATER[name], __name__)
    return module if name == "calibration" else getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
