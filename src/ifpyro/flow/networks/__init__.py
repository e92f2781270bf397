"""Velocities: the contract, the networks that fulfil it, and pretrained denoisers."""
