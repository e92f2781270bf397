"""Inflationary flows as Pyro priors."""

from .fidelity import fidelity
from .flow import InflationaryFlow
from .prior import FlowTransform
from .schedule import Schedule

__version__ = "0.1.0"

__all__ = ["FlowTransform", "InflationaryFlow", "Schedule", "fidelity"]
