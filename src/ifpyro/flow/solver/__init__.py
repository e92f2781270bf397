"""The discrete map: grids, Runge-Kutta steps, their inverse and log-determinant, and how they are run."""
