"""Tensors to bytes and back. Knows no sockets and no algorithms."""
