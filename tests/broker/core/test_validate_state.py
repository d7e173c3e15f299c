"""`Broker.validate_state` finds each contradiction that a test plants."""

from collections import deque

import pytest

from fedmq.broker.access.rights import KEYLESS
from fedmq.broker.core.lifecycles import SessionState
from fedmq.broker.wire.schema import Blob, Done, Hello, RunEnded

AGG, W1, W2 = b"agg:s1", b"w1:s1", b"w2:s1"


@pytest.fixture
def room(bench):
    """Return a bench with messages in every place; w2 has not returned since a restart."""
    bench.joined("agg", "aggregator", key="ka")
    bench.joined("w1", clients=((0, 4),), key="k1")
    bench.joined("w2", clients=((5, 7),), key="k2")
    bench.timer(AGG, "t", 500.0)
    bench.timer(AGG, "u", 400.0)
    bench.post(AGG, "checkpoint")
    for client in (0, 1, 5, 6, 9):
        bench.post(AGG, f"client/{client}", "task")
    bench.restart()
    bench.joined("agg", "aggregator", session="s2", key="ka")
    bench.joined("w1", clients=((0, 4),), key="k1")
    bench.post(b"agg:s2", "client/2", "task")
    # Its blob does not arrive.
    bench.post(W1, "aggregator", blobs=[b"x" * 100_000], inline=())
    bench.core.validate_state()
    return bench


def node(room, name):
    return room.core._mailboxes.runs["r"].nodes[name]


def run(room):
    return room.core._mailboxes.runs["r"]


def first(room, name):
    return next(iter(node(room, name).pending))


def two_places(room):
    run(room).waiting["client/8"] = [first(room, "w1")]


def unknown_number(room):
    run(room).waiting["client/8"] = [room.core._mailboxes.next_seq]


def kept_by_one_that_has_left(room):
    node(room, "w1").state = SessionState.LEFT


def not_its_address(room):
    node(room, "w1").pending[first(room, "w1")] = "client/9"


def neither_sent_nor_queued(room):
    node(room, "w1").sent = 0


def queue_out_of_order(room):
    node(room, "w1").queue = deque([900, 800])


def queued_and_sent(room):
    node(room, "w1").queue = deque([first(room, "w1")])


def pending_out_of_order(room):
    pending = node(room, "w1").pending
    pending[seq] = pending.pop(seq := first(room, "w1"))


def wrong_sum_in_flight(room):
    node(room, "w1").in_flight_bytes += 1


def in_flight_out_of_order(room):
    node(room, "w1").in_flight.reverse()


def in_flight_but_not_sent(room):
    each = node(room, "w1")
    each.queue, each.sent = deque(each.pending), first(room, "w1")


def waits_for_a_connected_node(room):
    run(room).waiting["client/0"] = [0]


def waiting_out_of_order(room):
    run(room).waiting["client/8"] = [2, 1]


def hosted_by_one_that_left(room):
    run(room).hosts._clients.assign(8, 8, "w9")


def an_address_too_few(room):
    run(room).hosts._clients.clear(3, 3)


def interrupted_without_a_message(room):
    run(room).interrupted[0] = 1


def frame_waits_for_nothing(room):
    blob = Blob.of(b"x" * 100_000)
    for name in list(node(room, "w1").fetcher._transfers):
        assert name.digest == blob.digest
        node(room, "w1").fetcher.discard(name)


def frames_out_of_order(room):
    node(room, "w1").next_n = 0


def applied_frame_kept(room):
    node(room, "w1").pending_frames.appendleft(Done(n=0))


def read_more_than_there_was(room):
    node(room, "w1").read_bytes = 1


def connection_of_another(room):
    room.core._sessions.peers[b"other"] = node(room, "w1")


def connection_of_an_earlier_session(room):
    run(room).nodes["w1"] = node(room, "w2")


def connection_unknown(room):
    del room.core._sessions.peers[W1]


def awaited_with_a_connection(room):
    node(room, "w2").peer = b"x"


def connected_without_a_connection(room):
    node(room, "w2").state = SessionState.CONNECTED


def finishing_before_the_end(room):
    node(room, "w1").state = SessionState.FINISHING


def without_an_owner(room):
    node(room, "w1").owner = ""


def with_the_key_of_another(room):
    node(room, "w1").owner = "k" * 40


def aggregator_of_another_owner(room):
    run(room).owner = "another"


def sessions_miscounted(room):
    room.core._sessions.quotas.sessions["10.0.0.7"] += 1


def waits_and_is_connected(room):
    hello = Hello(node="w1", role="worker", session="s1")
    room.core._admissions.early.add(W1, hello, KEYLESS, 0.0)


def lease_before_anything_is_due(room):
    room.core._sessions.due = node(room, "w1").lease_until + 1


def timers_out_of_order(room):
    room.core._mailboxes.timers.reverse()


def timer_of_another_run(room):
    due, seq, _, token = room.core._mailboxes.timers[0]
    room.core._mailboxes.timers[0] = (due, seq, "q", token)


def acknowledgment_without_a_time(room):
    room.core._acks.due = float("inf")
    room.core._acks._pending[0] = node(room, "w1")


def miscounted_ids(room):
    room.core._mailboxes.leader_window.size += 1


def unfinished_after_the_end(room):
    run(room).over = "done"


PLANTED = {
    two_places: "are in several places",
    unknown_number: "is not in the ledger",
    kept_by_one_that_has_left: "w1 has left, but still has messages",
    not_its_address: "w1 has messages to client/9: not its own",
    neither_sent_nor_queued: "of w1 are neither sent nor queued",
    queue_out_of_order: "out of order",
    queued_and_sent: "w1's queue has message [0-9]+, which was sent",
    pending_out_of_order: "w1's messages .* are out of order",
    wrong_sum_in_flight: "bytes in flight",
    in_flight_out_of_order: "w1's deliveries .* are out of order",
    in_flight_but_not_sent: "w1's deliveries .* are out of order",
    waits_for_a_connected_node: "wait for client/0, which is hosted",
    waiting_out_of_order: "messages to client/8 are out of order",
    hosted_by_one_that_left: "addresses of {'w9'} are hosted, but it has left",
    an_address_too_few: "but [0-9]+ are hosted",
    interrupted_without_a_message: r"messages \{0\} ended sessions, but are finished",
    frame_waits_for_nothing: "w1's frame [0-9]+ waits for nothing",
    frames_out_of_order: "w1's frames .* are out of order",
    applied_frame_kept: "w1's frame 0 waits for nothing",
    read_more_than_there_was: "w1 has read 1 bytes",
    connection_of_another: "is not that of w1",
    connection_of_an_earlier_session: "is of an earlier session of w1",
    connection_unknown: "w1 is connected, but its connection is unknown",
    awaited_with_a_connection: "w2 is (awaited|connected), but",
    connected_without_a_connection: "w2 is connected without a connection",
    finishing_before_the_end: "w1 is finishing, but run r has not ended",
    without_an_owner: "w1 has key '', not its owner's",
    with_the_key_of_another: "w1 has key '', not its owner's",
    aggregator_of_another_owner: "agg is the aggregator of a run of 'another'",
    sessions_miscounted: "sessions are live, but .*10.0.0.7.* count",
    waits_and_is_connected: "waits, but it has a session",
    lease_before_anything_is_due: "a lease ends at [0-9.]+, before anything is due",
    timers_out_of_order: "not at its place in the heap",
    timer_of_another_run: "is of run q, which has ended",
    acknowledgment_without_a_time: "acknowledgments of .*'w1'.* are due at inf",
    miscounted_ids: "ids are kept",
    unfinished_after_the_end: "agg is connected, but run r has ended",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_contradiction_is_found(room, plant):
    plant(room)
    with pytest.raises(AssertionError, match=PLANTED[plant]):
        room.core.validate_state()


def test_a_message_of_a_run_that_has_ended_is_found(room):
    room.numbers[b"agg:s2"] = node(room, "agg").next_n
    room.tell(b"agg:s2", RunEnded(reason="done"))
    room.core.validate_state()
    run(room).waiting["client/8"] = [3]
    with pytest.raises(AssertionError, match="run r has ended, but has unfinished messages"):
        room.core.validate_state()


def test_timers_that_are_never_due_are_found(room):
    for name in ("agg", "w1", "w2"):
        node(room, name).lease_until = float("inf")
    room.core._sessions.due = float("inf")
    room.core._mailboxes.timers = [(float("inf"), 4, "r", "t")]
    room.core._acks.take()
    with pytest.raises(AssertionError, match="nothing is due"):
        room.core.validate_state()
