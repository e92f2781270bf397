"""Samples on their way in: validated, read piece by piece, constrained, or simulated with a known density."""
