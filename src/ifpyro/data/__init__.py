"""Samples on their way in: validated, read piece by piece, constrained to a support, or simulated with known density."""
