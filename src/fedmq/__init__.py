"""Asynchronous federated learning over a message queue, on a durable and replayable ledger.

The names here are the ones that a user's own problem, algorithm or codec needs. They are
imported on first use, so that ``import fedmq`` costs nothing and does not import torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = ["Algorithm", "Codec", "Examples", "Problem", "Schedule", "__version__"]

if TYPE_CHECKING:
    from fedmq.algorithms.base import Algorithm
    from fedmq.algorithms.problems.base import Examples, Problem
    from fedmq.algorithms.schedules.base import Schedule
    from fedmq.codecs.base import Codec
else:
    # Hidden from type checkers: a visible __getattr__ makes them accept any name.
    _HOMES = {
        "Algorithm": "fedmq.algorithms.base",
        "Codec": "fedmq.codecs.base",
        "Examples": "fedmq.algorithms.problems.base",
        "Problem": "fedmq.algorithms.problems.base",
        "Schedule": "fedmq.algorithms.schedules.base",
    }

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """List the public names beside what the module holds."""
        return sorted({*globals(), *__all__})
