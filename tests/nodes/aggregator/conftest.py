"""These tests train models of six weights, as those of the algorithms do."""

from tests.algorithms.conftest import one_thread

__all__ = ["one_thread"]
