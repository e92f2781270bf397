"""From a Pyro model to a log-density of many draws, and back to the values of its sites."""
