"""Posterior inference on the Gaussian latent, all chains in one batch."""
