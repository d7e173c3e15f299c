"""A small problem for Jiang's personalised FedAvg, and its two phases without a network."""

from torch import nn

from fedmq.algorithms.base import Result, Task
from fedmq.algorithms.schedules import Rounds
from tests.algorithms.tiny import Tiny, client, payload

FOREVER = 10**9


class Local(Tiny):
    """Clients have test points of their own, and a hidden layer."""

    def module(self):
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))

    def client(self, index):
        return self.points(100 + index, 12)

    def client_test(self, index):
        return self.points(500 + index, 20)


def train(algorithm, problem, state, index=0, seed=7, local=None):
    task = Task(state.version, algorithm.task(state, index), "update")
    trained = algorithm.train(task, client(problem, index, seed, local))
    assert trained.local_state is None
    return trained.payload


def move(algorithm, state, update, schedule=None, staleness=0):
    """Return the version after one result, all of one number or a vector."""
    phase = "fedavg" if state.version < algorithm.switch else "reptile"
    result = Result(0, staleness, payload(state, update, n=4, reply="update", phase=phase), 1)
    schedule = schedule or Rounds()
    weight = schedule.weight(4, staleness)
    gathered = algorithm.accumulate(algorithm.new_accumulator(state), state, result, weight)
    return algorithm.commit(state, gathered, schedule.divisor(weight, 1))
