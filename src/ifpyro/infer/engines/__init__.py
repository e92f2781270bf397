"""Samplers: kernels, moves, adaptation, and the algorithms built from them."""
