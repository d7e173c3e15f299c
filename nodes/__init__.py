"""Programs: aggregator, worker, evaluator, cluster, the command line."""

from typing import TYPE_CHECKING

__all__ = [
    "Aggregator",
    "Chances",
    "Config",
    "ConfigError",
    "FolderInUse",
    "MessageError",
    "NodeError",
    "OwnCodeError",
    "Replay",
    "RunFailed",
    "Setup",
    "Simulation",
    "StorageError",
    "Worker",
    "build",
    "load",
    "parse",
    "set_up",
]

if TYPE_CHECKING:
    from fedmq.nodes.aggregator.core import Aggregator
    from fedmq.nodes.errors import (
        ConfigError,
        FolderInUse,
        MessageError,
        NodeError,
        OwnCodeError,
        RunFailed,
        StorageError,
    )
    from fedmq.nodes.replay.fold import Replay
    from fedmq.nodes.run.config import Config, build, load, parse
    from fedmq.nodes.run.setup import Setup, set_up
    from fedmq.nodes.simulation.chances import Chances
    from fedmq.nodes.simulation.virtual_run import Simulation
    from fedmq.nodes.worker.core import Worker
else:
    from fedmq._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "fedmq.nodes.aggregator.core": "Aggregator",
            "fedmq.nodes.errors": "ConfigError FolderInUse MessageError NodeError OwnCodeError "
            "RunFailed StorageError",
            "fedmq.nodes.replay.fold": "Replay",
            "fedmq.nodes.run.config": "Config build load parse",
            "fedmq.nodes.run.setup": "Setup set_up",
            "fedmq.nodes.simulation.chances": "Chances",
            "fedmq.nodes.simulation.virtual_run": "Simulation",
            "fedmq.nodes.worker.core": "Worker",
        },
    )
