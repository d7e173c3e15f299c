"""Training and evaluating: what a worker's core asks for, done in one place by all who drive it.

Programs, simulations and replays call `carry_out`: the same task, from the same state of its
client and on the same kind of device, comes to the same bytes.
"""

from __future__ import annotations

from fedmq.algorithms.rng import seeded
from fedmq.algorithms.toolkit.returned import result_of
from fedmq.nodes.errors import exits_as_errors
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.worker.core import Evaluate, Evaluated, Train, Trained


def carry_out(action: Train | Evaluate, setup: Setup, device: str) -> Trained | Evaluated:
    """Do what a worker's core asks for; whatever the model, the data and the loss draw is seeded.

    Returns:
        The event for the core; how long it took is the caller's to say.

    Raises:
        ReturnedError: a method of the problem or the algorithm returned what cannot be used.
        Exception: whatever those methods raise; ``exit()`` too is an error.
    """
    with exits_as_errors(), seeded(action.seed, device):
        if isinstance(action, Train):
            client = action.at(setup.problem, device)
            found = setup.algorithm.train(action.task, client)
            payload, local = result_of(found, f"{type(setup.algorithm).__name__}.train")
            return Trained(payload, local, 0.0, kind_of(device))
        return Evaluated(action.metrics(setup, device), kind_of(device))
