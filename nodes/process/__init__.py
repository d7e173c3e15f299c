"""Signals, output streams, logs and terminal text of every process."""
