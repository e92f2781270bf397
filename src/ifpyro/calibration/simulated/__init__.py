"""Simulation-based calibration: problems that simulate themselves, engines that solve many, and the results."""
