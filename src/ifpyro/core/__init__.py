"""What every other package may use and what knows nothing of flows: arguments, arrays, random state, processes, files."""
