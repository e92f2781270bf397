"""What every other package may use and what knows nothing of flows: arguments, files, random state, processes."""
