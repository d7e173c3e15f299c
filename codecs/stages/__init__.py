"""The steps that a codec pipeline is made of: ``hadamard(4096) | quantize(4) | entropy``."""
