"""Runs of the aggregator whose tasks fail on demand."""

import numpy as np
import pytest

from fedmq.nodes.aggregator.computed import Computed
from tests.algorithms.fleet import Fleet, make_setup, with_data

SCHEDULES = {
    "rounds": {"name": "rounds", "fraction": 0.5},
    "everybody": {"name": "rounds", "fraction": 1.0},
    "deadline": {"name": "rounds", "fraction": 1.0, "deadline_s": 5.0, "min_results": 2},
    "buffered": {"name": "buffered", "size": 2, "concurrency": 3},
    "stream": {"name": "stream", "concurrency": 2},
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def fleet_of(schedule, clients=4, algorithm=None, rules=None, **run):
    setup = make_setup(SCHEDULES[schedule], clients=clients, algorithm=algorithm, **run)
    return Fleet(setup, computed=None if rules is None else Computed(rules=rules))


def fail(fleet, message, reason="RuntimeError: shapes", code="training-failed", **more):
    """The worker of a task says that it failed."""
    body = {"reason": reason, "code": code, **more}
    fleet.say("failed", body, f"w{message.body['client']}", re=message.id)


def spoiled(message, data):
    weights = np.frombuffer(data[0], dtype=np.float32).copy()
    weights[0] = np.nan
    return with_data(message, [weights.tobytes(), *data[1:]])


def step(fleet, bad, how=fail):
    """Let the oldest task fail if its client is bad; or let time pass. Return its client."""
    if not fleet.tasks:
        assert fleet.ticks, "the run waits for nothing"
        fleet.say("tick", {"token": fleet.ticks.pop(0)})
        return None
    message, data = fleet.tasks.pop(0)
    client = message.body["client"]
    if client not in bad:
        fleet.hear(*fleet.work(message, data))
    elif how is fail:
        fail(fleet, message, where="mine.py:7")
    else:
        fleet.hear(*how(*fleet.work(message, data)))
    return client


def play(fleet, bad, how=fail, limit=2000):
    """Go on until the run ends; return the clients asked, in order."""
    asked = []
    for _ in range(limit):
        if fleet.finished is not None:
            return [each for each in asked if each is not None]
        asked.append(step(fleet, bad, how))
    raise AssertionError("the run does not end")
