"""The cells of ``benchmarks/reproduce.py``: what each runs, and how it is judged."""
