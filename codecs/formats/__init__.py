"""Representations of numbers: packed integers, affine grids, flat and streamed tensors."""
