"""The stages of codec pipelines: ``hadamard(4096) | quantize(4) | entropy``."""
