"""Amortised posteriors: one training on a model's own simulations answers for every data set, and is made exact."""

from .amortise import amortise
from .posterior import AmortisedPosterior
from .refined import Refined

__all__ = ["AmortisedPosterior", "Refined", "amortise"]
