"""Python: start runs and sweeps from a script or a notebook, and read their results."""
