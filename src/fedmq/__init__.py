"""Asynchronous federated learning over a message queue, on a durable and replayable ledger.

The names here start runs and read their results, or are those that a user's own problem, algorithm
or codec needs. They are imported on first use, so that ``import fedmq`` costs nothing and does not
import torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "Algorithm",
    "Codec",
    "Config",
    "ConfigError",
    "Examples",
    "NodeError",
    "Problem",
    "Run",
    "RunFailed",
    "Schedule",
    "Sweep",
    "__version__",
    "load",
    "run",
    "simulate",
    "sweep",
]

if TYPE_CHECKING:
    from fedmq.algorithms.base import Algorithm
    from fedmq.algorithms.problems.base import Examples, Problem
    from fedmq.algorithms.schedules.base import Schedule
    from fedmq.codecs.base import Codec
    from fedmq.nodes.api.run import Run, load
    from fedmq.nodes.api.running import run, simulate
    from fedmq.nodes.api.sweep import sweep
    from fedmq.nodes.api.sweep_results import Sweep
    from fedmq.nodes.errors import ConfigError, NodeError, RunFailed
    from fedmq.nodes.run.config import Config
else:
    from fedmq._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "fedmq.algorithms.base": "Algorithm",
            "fedmq.algorithms.problems.base": "Examples Problem",
            "fedmq.algorithms.schedules.base": "Schedule",
            "fedmq.codecs.base": "Codec",
            "fedmq.nodes.api.run": "Run load",
            "fedmq.nodes.api.running": "run simulate",
            "fedmq.nodes.api.sweep": "sweep",
            "fedmq.nodes.api.sweep_results": "Sweep",
            "fedmq.nodes.errors": "ConfigError NodeError RunFailed",
            "fedmq.nodes.run.config": "Config",
        },
    )
