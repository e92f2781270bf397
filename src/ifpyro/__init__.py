"""Inflationary flows as Pyro priors."""

__version__ = "0.1.0"
