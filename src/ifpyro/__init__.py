"""Inflationary flows as Pyro priors: train on samples, infer on the Gaussian latent, read the answer in ArviZ."""

from .fidelity import fidelity
from .flow import InflationaryFlow
from .prior import FlowTransform
from .schedule import Schedule
from .storage import load_flow as load
from .training import fit

__version__ = "0.1.0"

__all__ = ["FlowTransform", "InflationaryFlow", "Schedule", "fidelity", "fit", "load"]
