"""The cells of ``benchmarks/reproduce.py``: each runs configurations and checks the result."""
