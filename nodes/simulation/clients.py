"""The clients of a run's configuration, for its simulation."""

from __future__ import annotations

import torch

from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.problems.quadratic import QuadraticProblem
from fedmq.algorithms.tasks import Payload
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.messages.payloads import pack
from fedmq.nodes.population.population import Population
from fedmq.nodes.population.table import SimulationTable
from fedmq.nodes.run.setup import Setup

_CHANGE = 0.01
"""Size of an update's values; only a stage that compresses them losslessly depends on it."""


def population_of(setup: Setup) -> Population:
    """Return the clients that ``[simulation]`` describes.

    Raises:
        ConfigError: a spec or a file cannot be used, the problem has no labels that availability
            could depend on, or there are more nodes than clients.
        DataError: the data set, which the numbers of examples or the labels need, is missing.
    """
    problem, config = setup.problem, setup.config
    table = config.simulation or SimulationTable()
    if table.nodes is not None and table.nodes > problem.clients:
        raise ConfigError(
            f"simulation.nodes: expected at most problem.clients, {problem.clients}, "
            f"got {table.nodes}"
        )
    try:
        return Population(
            table,
            problem.clients,
            config.run.seed,
            problem.client_size,
            problem.label_position,
            message_bytes(setup),
        )
    except AlgorithmError as error:
        raise ConfigError(f"simulation.availability: {error}") from None


def message_bytes(setup: Setup) -> tuple[int, int] | None:
    """Return the bytes of the payloads of a task and of a result of the real model.

    Under ``learner = "curve"`` the messages of the run are tiny, so their transfer takes the time
    of these. For a task the first model is encoded, for a result a random update.

    Returns:
        None if the run trains the real model.
    """
    if not isinstance(setup.problem, QuadraticProblem):
        return None
    model = setup.algorithm.start(setup.problem.real)
    task = setup.algorithm.task(model, 0)
    rng = torch.Generator().manual_seed(0)
    update = {
        name: _CHANGE * torch.randn(weights.shape, generator=rng)
        for name, weights in task.weights.items()
    }
    down, up = pack(task, setup.downlink, 0), pack(Payload(update), setup.uplink, 0)
    return sum(each.size for each in down.blobs), sum(each.size for each in up.blobs)
