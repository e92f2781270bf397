"""From draws to ArviZ: what samplers return, read, diagnosed and named."""
