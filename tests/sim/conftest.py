"""Histories of tiny models leave torch's threads to other tests, and the number as it was."""

from tests.algorithms.conftest import one_thread

__all__ = ["one_thread"]
