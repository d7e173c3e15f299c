"""Messages on the availability of clients: of the worker's own clients, and not too many."""

import pytest

from fedmq.broker.rejections import Code
from fedmq.broker.wire.addresses import MAX_RANGES

AGG, W1 = b"agg:s1", b"w1:s1"


@pytest.fixture
def room(bench):
    bench.joined("agg", "aggregator", total_clients=3000)
    bench.joined("w1", clients=((10, 2000), (0, 4), (6, 8)))
    bench.sent.clear()
    return bench


def say(room, **body):
    room.post(W1, "aggregator", kind="availability", body={"back": [], "away": [], **body})
    return [each.code for each in room.refusals()]


@pytest.mark.parametrize(
    "away", [[], [[0, 4]], [[7, 7], [10, 2000]], [[k, k] for k in range(10, 1010)]]
)
def test_a_worker_reports_its_own_clients(room, away):
    assert say(room, back=[] if len(away) == MAX_RANGES else [[6, 8]], away=away) == []
    (message,) = room.inbox(AGG)
    assert (message.kind, message.body["away"]) == ("availability", away)


@pytest.mark.parametrize(
    "ranges", [[[5, 5]], [[4, 6]], [[0, 5]], [[9, 10]], [[0, 4], [2001, 2001]]]
)
def test_other_clients_are_rejected(room, ranges):
    assert say(room, away=ranges) == [Code.WRONG_CLIENT]
    assert say(room, back=ranges) == [Code.WRONG_CLIENT] * 2


@pytest.mark.parametrize(
    "ranges",
    [
        None,
        {},
        "all",
        3,
        [3],
        [[3]],
        [[3, 2]],
        [[-1, 2]],
        [[0, 1, 2]],
        [[0.0, 1.0]],
        [[False, True]],
    ],
    ids=repr,
)
def test_other_bodies_are_rejected(room, ranges):
    assert say(room, away=ranges) == [Code.MALFORMED]


@pytest.mark.parametrize("more", [1, "yes", None, []])
def test_more_is_true_or_false(room, more):
    assert say(room, more=more) == [Code.MALFORMED]
    assert say(room, more=True) == [Code.MALFORMED]  # of the message before


@pytest.mark.parametrize("reports", [True, False])
def test_the_aggregator_learns_at_the_join_that_clients_are_away(bench, reports):
    bench.joined("agg", "aggregator", total_clients=30)
    bench.joined("w1", clients=((0, 29),), **({"reports_availability": True} if reports else {}))
    (message,) = [m for m in bench.inbox(AGG) if m.kind == "joined"]
    assert message.body.get("reports_availability", False) is reports


def test_there_is_a_limit(room):
    assert say(room, away=[[k, k] for k in range(10, 1010)], back=[[0, 0]]) == [Code.LIMIT]


def test_a_message_without_blobs_has_none(room):
    room.post(W1, "aggregator", kind="availability", body={"back": [], "away": []}, blobs=[b"x"])
    assert [each.code for each in room.refusals()] == [Code.MALFORMED]
