"""Codecs: tensors to bytes and back, without any knowledge of sockets or algorithms."""
