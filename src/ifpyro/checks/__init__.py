"""May a flow be trusted? Questions answered by rows of pass, warn or fail, and where a network errs."""
