"""Problems and results for the tests of pFedHN."""

import torch
from torch import nn

from fedmq.algorithms.base import Client, Payload, Result, Task
from fedmq.algorithms.pfedhn.algorithm import PFedHN
from fedmq.algorithms.problems.base import Examples
from fedmq.nodes.messages.payloads import RAW, pack
from tests.algorithms.tiny import Tiny


class Local(Tiny):
    """Clients with test data of their own; two layers, so that one can stay at a client."""

    held_out = 1

    def module(self):
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

    def client_test(self, index):
        return self.points(200 + index, 20)


class Tracked(Local):
    """With what a hypernetwork does not make: running statistics, a count, a frozen bias."""

    def module(self):
        module = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2)
        )
        module[0].bias.requires_grad_(requires_grad=False)
        return module


class SameTest(Local):
    """Tested on what it trains on."""

    def client_test(self, index):
        return self.client(index)


class OneLayer(Local):
    def module(self):
        return nn.Linear(2, 2)


class Untestable(Local):
    """Nobody may look at test data."""

    def test(self):
        raise AssertionError("test data were asked for")

    client_test = test


class Counted(Local):
    """Twelve examples that say which they are: x = (index, index)."""

    def client(self, index):
        x = torch.arange(12.0)[:, None].expand(12, 2).contiguous()
        return Examples(x, torch.zeros(12, dtype=torch.int64))


SMALL = {"hidden": 6, "layers": 2, "batches": 3, "batch_size": 4}


def small(**options):
    return PFedHN(**{**SMALL, **options})


def at(problem, index=0, seed=7, local=None):
    return Client(index, problem, problem.client(index), local, seed)


def sent(state, value, **numbers):
    """Return a result whose change is a vector, or all one number."""
    layout = state.partition.sent
    vector = torch.as_tensor(value, dtype=torch.float32).expand(layout.dim).contiguous()
    exact = layout.counter_views(state.counters)
    return Payload(layout.views(vector), exact, {"n": 1, **numbers})


def commit(algorithm, schedule, state, results):
    """Return the version that (client, payload, n, staleness) make under a schedule."""
    gathered, total = algorithm.new_accumulator(state), 0.0
    for who, payload, n, staleness in results:
        weight = schedule.weight(n, staleness)
        gathered = algorithm.accumulate(gathered, state, Result(who, staleness, payload, 1), weight)
        total += weight
    return algorithm.commit(state, gathered, schedule.divisor(total, len(results)))


def trained(algorithm, problem, state, index=0, seed=7, local=None):
    task = Task(0, algorithm.task(state, index))
    trained = algorithm.train(task, at(problem, index, seed, local))
    return trained.payload, trained.local_state


def theta(payload):
    return torch.cat([each.reshape(-1) for each in payload.weights.values()])


def bits(payload):
    """Return what a payload is, to the bit."""
    packed = pack(payload, RAW, 0)
    return packed.body, [bytes(each) for each in packed.data]


def reference(net, phi):
    """Return the hypernetwork as the paper draws it: an ordinary module with the same phi."""
    parts = [nn.Linear(net.embedding, net.hidden)]
    for _ in range(net.layers):
        parts += [nn.ReLU(), nn.Linear(net.hidden, net.hidden)]
    module = nn.Sequential(*parts, nn.Linear(net.hidden, net.outputs))
    start = 0
    for parameter in module.parameters():
        parameter.data = phi[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()
    assert start == len(phi)
    return module
