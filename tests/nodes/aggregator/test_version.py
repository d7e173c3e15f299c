"""The version in the making: results are used, held or rejected; and its commit."""

import re
from pathlib import Path

import pytest
import torch

from fedmq.broker.link.events import Delivery
from fedmq.broker.rejections import Code
from fedmq.nodes.aggregator.version import Outcome, VersionBuffer
from tests.algorithms.fleet import Fleet, changed, make_setup

ROUNDS = make_setup({"name": "rounds", "fraction": 1.0, "late": "refuse"}, clients=3)
BUFFERED = make_setup({"name": "buffered", "size": 2, "max_staleness": 1}, clients=3)
ROOM = 1 << 20


def results_of(setup):
    """Return a result of each client's first task."""
    fleet = Fleet(setup)
    return [
        Delivery(number, 1.0, message, dict(enumerate(data)))
        for number, (message, data) in enumerate(fleet.work(*each) for each in fleet.tasks)
    ]


def buffer_of(setup, version=0, **more):
    return VersionBuffer(setup, setup.algorithm.start(setup.problem), version, ROOM, **more)


def test_a_cohort_adds_its_results_in_order_and_does_not_wait_for_lost_ones():
    results = results_of(ROUNDS)
    buffer = buffer_of(ROUNDS)
    names = [each.message.re for each in results]
    for name in names:
        buffer.sent(name)
    for client in (2, 1):
        assert buffer.add(results[client], client, 0).outcome is Outcome.HELD
    assert not list(buffer.add_held({names[0]}.__contains__))
    assert (buffer.num_results, buffer.view().results, buffer.contributed) == (0, 2, {1, 2})
    added = list(buffer.add_held(lambda _: False))  # client 0 has left
    assert [(each.client, each.outcome) for each in added] == [
        (1, Outcome.USED),
        (2, Outcome.USED),
    ]
    buffer.expect(names[0])  # client 0 is back
    assert buffer.add(results[0], 0, 0).outcome is Outcome.HELD
    assert [each.client for each in buffer.add_held({}.__contains__)] == [0]
    assert buffer.is_ready(buffer.view())
    assert buffer.facts()["results"] == 3


def test_a_held_result_that_cannot_be_decoded_frees_its_client():
    result = results_of(ROUNDS)[0]
    buffer = buffer_of(ROUNDS)
    buffer.sent(result.message.re)
    short = Delivery(1, 1.0, result.message, {0: b""})
    assert buffer.add(short, 0, 0).outcome is Outcome.HELD
    (added,) = buffer.add_held({}.__contains__)
    assert (added.outcome, added.why.code) == (Outcome.REJECTED, Code.UNDECODABLE)
    assert not buffer.contributed


@pytest.mark.parametrize(("setup", "code"), [(ROUNDS, Code.LATE), (BUFFERED, Code.STALE)])
def test_an_old_result_is_stale_or_came_after_its_round(setup, code):
    added = buffer_of(setup, 2).add(results_of(setup)[0], 0, 0)
    assert (added.outcome, added.why.code) == (Outcome.STALE, code)
    assert added.why.reason == "too stale: 2 versions behind"


def test_a_result_that_contains_something_else_is_rejected_at_once():
    result = results_of(BUFFERED)[0]
    numbers = {**result.message.body["numbers"], "reply": "model"}
    other = Delivery(1, 1.0, changed(result.message, body={"numbers": numbers}), result.inline)
    added = buffer_of(BUFFERED).add(other, 0, 0)
    assert (added.outcome, added.why.code) == (Outcome.REJECTED, Code.MALFORMED)


def test_in_the_recorded_order_no_result_is_held_and_the_commit_is_the_same():
    results = results_of(ROUNDS)
    ordered, recorded = buffer_of(ROUNDS), buffer_of(ROUNDS, in_order=False)
    for client, result in enumerate(results):
        ordered.sent(result.message.re)
        ordered.add(result, client, 0)
        assert recorded.add(result, client, 0).outcome is Outcome.USED
    assert len(list(ordered.add_held({}.__contains__))) == 3
    one, other = (ROUNDS.algorithm.tensors(each.commit()) for each in (ordered, recorded))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_its_own_methods_change_its_fields():
    fields = "|".join(sorted(vars(buffer_of(ROUNDS))))
    change = r"\s*([-+|]?=[^=]|\.(append|add|pop|discard|remove|clear|update|extend)\()"
    written = re.compile(rf"\b(current|closed|buffer)\.({fields})(\[[^]]*\])?{change}")
    nodes = Path(__file__).parents[3] / "nodes"
    found = [path for path in nodes.rglob("*.py") if written.search(path.read_text())]
    assert found == []
    assert written.search("self._results.current.order.append(name)")
