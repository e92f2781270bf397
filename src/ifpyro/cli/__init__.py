"""The command line, its jobs and the demonstration."""
