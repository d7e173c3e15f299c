"""Histories of tiny models use one thread of torch, and restore the number afterwards."""

from tests.algorithms.conftest import one_thread

__all__ = ["one_thread"]
