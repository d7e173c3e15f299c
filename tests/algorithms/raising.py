"""A user's algorithm, one of whose methods raises."""

import builtins
from dataclasses import dataclass

from fedmq.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class Raising(FedAvg):
    """FedAvg whose method ``at`` raises what ``kind`` names."""

    name = "raising"

    at: str = "commit"
    kind: str = "RuntimeError"

    def _raise(self, at):
        if self.at == at:
            raise getattr(builtins, self.kind)(f"{at} is broken")

    def start(self, problem):
        self._raise("start")
        return super().start(problem)

    def save(self, state):
        self._raise("save")
        return super().save(state)

    def task(self, state, client):
        self._raise("task")
        return super().task(state, client)

    def evaluation_task(self, state, client=None):
        self._raise("evaluation_task")
        return super().evaluation_task(state, client)

    def accumulate(self, gathered, state, result, weight):
        self._raise("accumulate")
        return super().accumulate(gathered, state, result, weight)

    def commit(self, state, gathered, divisor):
        self._raise("commit")
        return super().commit(state, gathered, divisor)
