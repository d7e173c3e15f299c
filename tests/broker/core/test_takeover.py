"""A restarted node takes over its name; a message that ends sessions is dead-lettered."""

import pytest

from fedmq.broker.core.delivery import RETRY_MAX_S, RETRY_S, retry_pause
from fedmq.broker.wire.schema import (
    Deliver,
    Done,
    Goodbye,
    Heartbeat,
    Reject,
    UnknownSession,
    Welcome,
)

AGG = b"agg:00"
TAKEN_OVER = "a newer session has taken over. Two nodes need two names: set one with --name"


@pytest.fixture
def room(bench):
    """An aggregator, and a worker with all clients."""
    bench.joined("agg", "aggregator", session="00", key="ka")
    start(bench, 0)
    bench.sent.clear()
    return bench


def start(bench, number, name="w", **more):
    """Start a worker (again); returns its connection."""
    fields = {"session": f"{number:02}", "key": "kw", "clients": ((0, 9),), **more}
    return bench.join(name, **fields)


def left(bench):
    return [body for _, body in bench.said("left")]


def test_a_newer_session_of_the_same_key_takes_over_at_once(room):
    room.post(AGG, "client/3", "task")
    old = b"w:00"
    [task] = room.take(old, Deliver)
    new = start(room, 1)
    assert room.take(old) == [Reject(code="replaced", reason=TAKEN_OVER)]
    assert isinstance(room.sent[new][0][0], Welcome)
    assert room.texts(new) == ["task"]
    kinds = [(kind, body["session"]) for kind, body in room.said() if body["node"] == "w"]
    assert kinds == [("joined", "00"), ("left", "00"), ("joined", "01")]
    assert left(room)[0]["interrupted"] == task.seq
    room.say(old, Heartbeat())
    assert room.take(old) == [UnknownSession()]


@pytest.mark.parametrize(
    ("mine", "theirs"), [("kw", "other"), ("kw", ""), ("", "kw"), ("", "")], ids=repr
)
def test_another_key_or_none_takes_nothing_over(bench, mine, theirs):
    bench.joined("agg", "aggregator")
    old = start(bench, 0, key=mine)
    bench.take(old)
    [reject] = bench.take(start(bench, 1, key=theirs))
    assert (reject.code, reject.reason) == ("name", "a node named 'w' is already connected")
    bench.say(old, Heartbeat())
    assert isinstance(bench.take(old)[0], Heartbeat)
    assert not left(bench)


def test_an_older_session_does_not_take_the_name_back(room):
    """Otherwise two processes with one key would replace each other for ever."""
    new = start(room, 5)
    room.take(new)
    [reject] = room.take(start(room, 4))
    assert reject.code == "replaced"
    assert reject.reason.startswith("a newer session of 'w' is connected; ")
    room.say(new, Heartbeat())
    assert isinstance(room.take(new)[0], Heartbeat)


def test_a_clock_that_is_behind_is_named_as_a_cause(room):
    first, second = (f"{1_764_000_000_000_000_000 + each:016x}-a" for each in (0, -90_000_000_000))
    room.joined("late", session=first, key="k")
    [reject] = room.take(room.join("late", session=second, key="k"))
    assert reject.reason == (
        "a newer session of 'late' is connected; if this one was started later, its host's clock "
        "is 90 s behind: correct it, or start this node again after that time. Two nodes need two "
        "names: set one with --name"
    )


def test_an_aggregator_that_was_started_again_finds_its_inbox_as_it_was(room):
    room.post(b"w:00", "aggregator", "one")
    room.post(b"w:00", "aggregator", "two")
    seqs = [frame.seq for frame in room.take(AGG, Deliver)]
    room.tell(AGG, Done(seqs=seqs[:1]))
    new = room.join("agg", "aggregator", session="01", key="ka")
    assert room.texts(new) == ["two"]
    assert "interrupted" not in left(room)[0]


def test_only_a_delivered_message_counts_as_interrupted(room):
    start(room, 1)
    assert "interrupted" not in left(room)[-1]  # nothing at all
    room.wake(room.now)
    for number in range(2):
        room.post(AGG, f"client/{number}", f"task {number}")
    seqs = [frame.seq for frame in room.take(b"w:01", Deliver)]
    start(room, 2)
    assert left(room)[-1]["interrupted"] == seqs[0]
    room.tell(b"w:02", Done(refused={seqs[0]: "odd"}))
    start(room, 3)
    assert left(room)[-1]["interrupted"] == seqs[1], "it is done with what it refused"
    room.tell(b"w:03", Done(seqs=seqs))
    start(room, 4)
    assert "interrupted" not in left(room)[-1]


def test_a_goodbye_interrupts_no_message(room):
    room.post(AGG, "client/0", "task")
    room.say(b"w:00", Goodbye(reason="stopped"))
    assert "interrupted" not in left(room)[-1]


def test_each_pause_before_another_try_is_longer_up_to_a_limit():
    assert [retry_pause(n) for n in range(6)] == [0, 0, RETRY_S, 1.0, 2.0, 4.0]
    assert retry_pause(100) == RETRY_MAX_S


def test_after_two_deaths_at_a_message_the_next_session_has_a_pause(room):
    room.post(AGG, "client/0", "deadly")
    assert room.texts(start(room, 1)) == ["deadly"]
    third = start(room, 2)
    assert room.texts(third) == []
    room.post(AGG, "client/1", "behind it")
    assert room.texts(third) == [], "order is kept"
    room.wake(room.now + RETRY_S)
    assert room.texts(third) == ["deadly", "behind it"]


def killed(new_bench, deaths, deliveries=3):
    """A worker whose sessions ended so often at its first message, and that is back."""
    bench = new_bench(deliveries=deliveries)
    bench.joined("agg", "aggregator", session="00", key="ka")
    start(bench, 0)
    bench.post(AGG, "client/0", "deadly", id="agg/deadly")
    bench.post(AGG, "client/1", "harmless")
    for number in range(1, deaths + 1):
        bench.wake(bench.now + 2.0)  # past any pause so far
        bench.say(AGG, Heartbeat())
        start(bench, number)
    bench.wake(bench.now + 2.0)
    return bench, f"w:{deaths:02}".encode()


def test_a_message_that_ends_too_many_sessions_is_dead_lettered(new_bench):
    bench, peer = killed(new_bench, deaths=2)
    assert bench.texts(peer) == ["deadly", "harmless"]
    assert not bench.refusals()
    bench, peer = killed(new_bench, deaths=3)
    assert bench.texts(peer) == ["harmless"]
    [refusal] = bench.refusals()
    assert (refusal.id, refusal.node, refusal.dead_lettered) == ("agg/deadly", "broker", True)
    assert refusal.reason == "dead-lettered: 3 sessions ended while they handled it"
    [said] = [each for each in bench.inbox(AGG) if each.kind == "refused"]
    assert (said.re, said.body["by"]) == ("agg/deadly", "broker")
    assert refusal.of not in bench.pending()


def test_deaths_at_different_messages_are_not_added_up(new_bench):
    bench, peer = killed(new_bench, deaths=2)
    bench.tell(peer, Done(seqs=[bench.take(peer, Deliver)[0].seq]))
    for number in range(3, 5):
        bench.wake(bench.now + 2.0)
        bench.say(AGG, Heartbeat())
        start(bench, number)
    assert not bench.refusals()


def test_deaths_are_counted_on_after_the_broker_died_too(new_bench):
    bench, _ = killed(new_bench, deaths=2)
    bench.restart()
    bench.join("agg", "aggregator", session="00", key="ka", got=10**6)
    peer = start(bench, 2)
    bench.wake(bench.now + 2.0)
    assert bench.texts(peer) == ["deadly", "harmless"]
    start(bench, 3)
    assert [entry.dead_lettered for entry in bench.refusals()] == [True]


def test_dead_letters_stay_until_they_are_redelivered_on_request(new_bench):
    bench, _ = killed(new_bench, deaths=3)
    [refusal] = bench.refusals()
    bench.restart()
    start(bench, 4)
    assert bench.texts(b"w:04") == ["harmless"]
    bench.restart(redeliver_dead_letters=True)
    assert bench.entries[-1].consumes == (refusal.of,)
    start(bench, 5)
    assert bench.texts(b"w:05") == ["harmless", "deadly"]
    count = len(bench.entries)
    bench.restart(redeliver_dead_letters=True)
    assert len(bench.entries) == count


def test_a_dead_lettered_message_that_is_delivered_again_has_all_its_deliveries_before_it(
    new_bench,
):
    bench, _ = killed(new_bench, deaths=3)
    bench.restart(redeliver_dead_letters=True)
    start(bench, 4)
    start(bench, 5)
    assert len(bench.refusals()) == 1
    assert bench.texts(b"w:05") == ["harmless", "deadly"]


def test_a_dead_lettered_message_that_is_delivered_again_reaches_a_session_that_lived_on(new_bench):
    """The broker was restarted for this; its workers were not."""
    bench, peer = killed(new_bench, deaths=3)
    [harmless] = bench.take(peer, Deliver)
    bench.restart(redeliver_dead_letters=True)
    start(bench, 3, got=harmless.seq + 1)
    bench.wake(bench.now + 2.0)
    assert bench.texts(peer) == ["deadly"]


def test_the_next_session_of_the_sender_gets_the_rejection_of_its_dead_letter(new_bench):
    """The message is dead-lettered and its sender notified while that session is welcomed."""
    bench = new_bench(deliveries=2)
    bench.joined("agg", "aggregator")
    bench.post(start(bench, 0), "client/0", "to itself", id="w/0")
    start(bench, 1)
    last = start(bench, 2)
    assert [each.body["id"] for each in bench.inbox(last) if each.kind == "refused"] == ["w/0"]


def test_a_connection_that_becomes_the_aggregator_gets_the_leave_of_its_worker(bench):
    """However odd, no node may crash the broker."""
    agg = bench.joined("agg", "aggregator")
    peer = start(bench, 0)
    bench.say(agg, Goodbye())
    bench.join("agg", "aggregator", session="s2", peer=peer)
    assert [each.kind for each in bench.inbox(peer)] == ["joined", "left"]
