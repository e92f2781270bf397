"""The map between data and a Gaussian latent: its axes, networks and solver, its density, distribution and file."""
