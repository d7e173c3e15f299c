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
    from fedmq._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "fedmq.algorithms.base": "Algorithm",
            "fedmq.algorithms.problems.base": "Examples Problem",
            "fedmq.algorithms.schedules.base": "Schedule",
            "fedmq.codecs.base": "Codec",
        },
    )
