"""How numbers are written: whole numbers, affine grids, flat and streamed tensors."""
