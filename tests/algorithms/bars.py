"""A small problem of images for FedGKT, and its clients and server without a network between."""

import torch

from fedmq.algorithms.base import Client, Result, Task
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.problems.resnets import EDGES, SERVERS, initialised
from fedmq.algorithms.toolkit.flat_model import FlatModel
from tests.algorithms.tiny import Tiny

TINY = {"edge": "tiny", "server": "tiny", "batch_size": 4, "max_samples": 50}


class Bars(Tiny):
    """Images of 8x8 with a bright row, column or diagonal; client k has 6 + 4k."""

    shape = (1, 8, 8)
    classes = 3

    def points(self, seed, n):
        rng = torch.Generator().manual_seed(seed)
        y = torch.randint(3, (n,), generator=rng)
        at = torch.randint(8, (n,), generator=rng)
        x = torch.randn(n, 1, 8, 8, generator=rng) * 0.3
        for image, label, place in zip(x, y, at, strict=True):
            row, column, diagonal = image[0, place], image[0, :, place], image[0].diagonal()
            (row, column, diagonal)[label].add_(2.0)
        return Examples(x, y)

    def client(self, index):
        return self.points(100 + index, 6 + 4 * index)

    def client_test(self, index):
        return self.points(200 + index, 5 + index)


def train(algorithm, problem, state, index=0, local=None, seed=7, payload=None):
    payload = algorithm.task(state, index) if payload is None else payload
    client = Client(index, problem, problem.client(index), local, seed)
    trained = algorithm.train(Task(state.version, payload), client)
    return trained.payload, trained.local_state


def commit(algorithm, state, results):
    """Return the version that results by client make, in this order."""
    gathered = algorithm.new_accumulator(state)
    for index, payload in results.items():
        result = Result(index, 0, payload, len(payload.features["ids"]))
        gathered = algorithm.accumulate(gathered, state, result, 1.0)
    return algorithm.commit(state, gathered, 1.0)


def one_round(algorithm, problem, state, local=None):
    """Return the next state and what the clients keep."""
    local = local or {}
    both = {k: train(algorithm, problem, state, k, local.get(k)) for k in range(problem.clients)}
    state = commit(algorithm, state, {k: result for k, (result, _) in both.items()})
    return state, {k: kept for k, (_, kept) in both.items()}


def bits(payload):
    """Return everything in a payload, comparable."""
    groups = {
        f"{group}.{name}": (each.dtype, tuple(each.shape), each.numpy().tobytes())
        for group in ("weights", "exact", "features", "logits")
        for name, each in getattr(payload, group).items()
    }
    return groups, dict(payload.numbers)


def edge_with(algorithm, problem, local):
    """Return the edge that a client keeps, in eval mode."""
    model = FlatModel(initialised(EDGES[algorithm.edge], 0, problem.shape, problem.classes))
    model.load(local.exact["weights"], local.exact["counters"])
    return model.module.eval()


def server_of(algorithm, state):
    """Return the server network of a state, in eval mode."""
    module = initialised(SERVERS[algorithm.server], 0, state.features, state.classes)
    module.load_state_dict(algorithm.tensors(state))
    return module.eval()
