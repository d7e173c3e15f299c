"""What each reproducible algorithm makes of the same results, on whatever CPU this is.

``python -m tests.algorithms.folding`` prints a line an algorithm and schedule: its name, and a
digest of three versions.
"""

import dataclasses

import numpy as np
import torch
from torch import nn

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.algorithms.registry import ALGORITHMS
from fedmq.algorithms.schedules import find_schedule
from fedmq.nodes.run.digests import digest_of

CLIENTS = 4
VARIANTS = {
    "feddropout": [{"absent": "zero"}, {"absent": "holders"}],
    "fedrep": [{"head": 1}],
    "personalised-fedavg": [{"switch": 100}, {"switch": 1}],
}
SEVERAL = ("fedavg", "feddropout")
"""Those that are run under each schedule, with a model of more than 65,536 weights."""
SCHEDULES = {
    "rounds": {"late": "discount", "staleness": "polynomial(0.3)"},
    "buffered": {"staleness": "inverse_sqrt"},
    "stream": {"mixing": 0.37, "staleness": "hinge(3, 1)"},
}


class Layers(Problem):
    """Two layers with BatchNorm between them; ``width`` 400 is enough for compiled sums."""

    clients, classes = CLIENTS, 10

    def __init__(self, width):
        self.width = width

    def model(self):
        first = nn.Linear(200, self.width)
        return nn.Sequential(first, nn.BatchNorm1d(self.width), nn.Linear(self.width, 10))

    def public(self):
        return Examples(torch.zeros(20, 200), torch.zeros(20, dtype=torch.int64))

    def client(self, index):
        raise NotImplementedError

    test = loss = metrics = client


def drawn(tensors, rng):
    """Return other values for floating-point tensors: those of a CPU would be its own."""
    return {
        name: torch.from_numpy(abs(rng.standard_normal(tuple(each.shape), np.float32)))
        if each.is_floating_point()
        else each
        for name, each in tensors.items()
    }


def first_state(algorithm, of, rng):
    saved = algorithm.save(algorithm.start(of))
    if "means" in saved.exact:  # of outputs: nobody has said anything
        return algorithm.load(of, saved)
    other = dataclasses.replace(
        saved, weights=drawn(saved.weights, rng), exact=drawn(saved.exact, rng)
    )
    return algorithm.load(of, other)


def result_of(algorithm, state, client, version, reply, rng):
    """Return a result as a client could have sent it."""
    task = algorithm.task(state, client)
    numbers = {"reply": reply, **task.numbers}
    if algorithm.name == "personalised-fedavg":
        numbers["phase"] = "fedavg" if version < algorithm.switch else "reptile"
    logits = {}
    if "logits" in task.logits:
        key = "ids" if algorithm.name == "codistillation" else "counts"
        rows = rng.random((20 if key == "ids" else 10, 10))
        rows = (rows / rows.sum(axis=1, keepdims=True)).astype(np.float32)
        keys = torch.arange(20) if key == "ids" else torch.full((10,), 3)
        logits = {"logits": torch.from_numpy(rows), key: keys}
    counted = {k: each for k, each in task.exact.items() if not each.is_floating_point()}
    payload = Payload(drawn(task.weights, rng), counted, numbers, logits=logits)
    return Result(client, client % 3, payload, 20 + client)


def fold(algorithm, schedule):
    """Return a digest of three versions, each of all clients' results."""
    rng = np.random.default_rng(7)
    of = Layers(400 if algorithm.name in SEVERAL else 5)
    state = first_state(algorithm, of, rng)
    reply = algorithm.fixed_reply or schedule.reply
    found = []
    for version in range(3):
        gathered, weights = algorithm.new_accumulator(state), 0.0
        for client in range(CLIENTS):
            result = result_of(algorithm, state, client, version, reply, rng)
            weight = schedule.weight(20 + client, result.staleness)
            gathered = algorithm.accumulate(gathered, state, result, weight)
            weights += weight
        state = algorithm.commit(state, gathered, schedule.divisor(weights, CLIENTS))
        found.append(dict(algorithm.tensors(state)))
        found.append([algorithm.task(state, client) for client in range(CLIENTS)])
    return digest_of([found, dataclasses.asdict(algorithm)])


def main():
    for name, kind in ALGORITHMS.items():
        if not kind.reproducible:
            continue
        for variant in VARIANTS.get(name, [{}]):
            chosen = [each for each in SCHEDULES if each in kind.schedules]
            for other in chosen if name in SEVERAL else chosen[:1]:
                seeded = {"seed": 0} if "seed" in kind.__dataclass_fields__ else {}
                schedule = find_schedule(other)(**SCHEDULES[other])
                digest = fold(kind(**variant, **seeded), schedule)
                print(name, *variant.values(), other, digest)  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
