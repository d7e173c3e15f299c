"""A full disk: the broker reports it, ignores numbered frames, and continues with space."""

import pytest

from fedmq.broker.core.events import Append, DiskFull, Put
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    Ack,
    Chunk,
    ChunkRequest,
    Done,
    Goodbye,
    Heartbeat,
    Post,
    RunEnded,
    UnknownSession,
    Welcome,
    digest,
)
from fedmq.broker.wire.schema import StorageFull as FullFrame

AGG, W1 = b"agg:s1", b"w1:s1"
WHY = "cannot write: No space left on device"


@pytest.fixture
def room(bench):
    """Return a bench with a task and a timer, whose disk is full."""
    bench.joined("agg", "aggregator", key="ka")
    bench.joined("w1", clients=((0, 4),), key="kw")
    bench.post(AGG, "client/0", "task", blobs=[b"0123456789"])
    bench.timer(AGG, "t", 5.0)
    bench.wake(1.0)
    bench.sent.clear()
    assert bench.handle(DiskFull(WHY))
    return bench


def test_numbered_frames_and_hellos_are_answered_by_full_and_not_taken(room):
    entries = len(room.entries)
    for frame in (Done(seqs=(2,)), RunEnded(reason="done")):
        room.say(W1, frame)
    room.post(W1, "aggregator", "result", blobs=[b"x"], n=0)
    room.join("w1", clients=((0, 4),))
    room.join("w1", session="s2", key="kw", clients=((0, 4),), peer=W1)
    assert room.take(W1) == [FullFrame(reason=WHY)] * 5
    newcomer = room.join("w9", clients=((9, 9),))
    assert room.take(newcomer) == [FullFrame(reason=WHY)]
    room.post(b"nobody:s1", "aggregator", "?")
    assert FullFrame(reason=WHY) in room.take(b"nobody:s1")
    assert len(room.entries) == entries


def test_nothing_is_written_while_the_disk_is_full(room):
    """With any frame, and any timer that is due."""
    actions = []
    data = bytes(CHUNK_BYTES)
    chunk = Chunk(owner="w1", digest=digest(data), start=0)
    for frame in (
        Heartbeat(),
        Goodbye(),
        chunk,
        UnknownSession(),
        Post(n=0, message=b"?"),
        Done(seqs=(2,)),
    ):
        actions += room.say(W1, frame, *([data] if frame is chunk else []))
    actions += room.wake(500.0)
    assert not [each for each in actions if isinstance(each, Append | Put)]
    assert room.core.deadline is None


def test_heartbeats_are_answered_and_blobs_are_served(room):
    room.say(W1, Heartbeat())
    assert isinstance(room.take(W1)[0], Heartbeat)
    room.say(W1, ChunkRequest(owner="agg", digest=digest(b"0123456789"), start=2, size=3))
    [(frame, buffers)] = room.sent.pop(W1)
    assert (frame.start, buffers) == (2, [b"234"])


def test_a_full_disk_is_logged_once_at_its_start_and_end(room):
    for _ in range(3):
        room.handle(DiskFull(WHY))
    room.handle(DiskFull(""))
    room.handle(DiskFull(""))
    told = [(log.level, log.event) for log in room.logs if log.event not in ("joined", "left")]
    assert told == [("error", "cannot write the ledger"), ("info", "the ledger is writable again")]


def test_with_space_again_all_nodes_get_a_lease_and_due_timers_tick(room):
    room.now = 300.0
    room.handle(DiskFull(""))
    room.wake(309.0)
    assert [body["token"] for _, body in room.said("tick")] == ["t"]
    assert room.said("left") == []
    room.wake(311.0)
    assert [body["node"] for _, body in room.said("left")] == ["agg", "w1"]


def test_ignored_frames_are_applied_when_they_are_sent_again(room):
    room.post(W1, "aggregator", "first", n=0)
    room.post(W1, "aggregator", "second", n=1)
    room.handle(DiskFull(""))
    room.take(W1)
    room.take(AGG)
    room.join("w1", clients=((0, 4),), key="kw", got=room.entries[-1].seq + 1)
    assert isinstance(room.take(W1)[0], Welcome)
    room.post(W1, "aggregator", "first", n=0)
    room.post(W1, "aggregator", "second", n=1)
    assert room.texts(AGG) == ["first", "second"]
    room.wake(room.now + 0.2)
    assert Ack(upto=1) in room.take(W1)


def test_an_upload_that_was_in_flight_continues_after_the_hello(room):
    data = bytes(6 * CHUNK_BYTES)
    room.handle(DiskFull(""))
    room.post(W1, "aggregator", "large", blobs=[data], n=0)
    wants = room.take(W1, ChunkRequest)
    room.handle(DiskFull(WHY))
    for want in wants:
        chunk = Chunk(owner="w1", digest=digest(data), start=want.start)
        room.say(W1, chunk, data[: want.size])
    room.handle(DiskFull(""))
    room.join("w1", clients=((0, 4),), key="kw", got=10**6)
    room.post(W1, "aggregator", "large", blobs=[data], n=0)
    while wants := room.take(W1, ChunkRequest):
        for want in wants:
            chunk = Chunk(owner="w1", digest=digest(data), start=want.start)
            room.say(W1, chunk, data[: want.size])
    assert room.texts(AGG) == ["large"]


def test_a_take_over_during_a_full_disk_is_welcomed_afterwards(room):
    new = room.join("w1", session="s2", key="kw", clients=((0, 4),))
    room.handle(DiskFull(""))
    room.take(new)
    room.join("w1", session="s2", key="kw", clients=((0, 4),))
    assert isinstance(room.sent[new][0][0], Welcome)
    assert room.texts(new) == ["task"]


def test_the_reason_is_one_that_a_frame_can_carry(room):
    message = encode_message(room.messages()[-1])
    room.say(W1, Post(n=0, message=message))
    [frame] = room.take(W1)
    assert frame.reason == WHY


def test_nobody_learns_of_an_end_that_may_not_be_in_the_ledger(bench):
    """A run that ended in the turn whose write failed."""
    bench.joined("agg", "aggregator", key="ka")
    bench.joined("w1", clients=((0, 4),), key="kw")
    bench.tell(AGG, RunEnded(reason="done"))
    bench.sent.clear()
    bench.handle(DiskFull(WHY))
    for peer in (AGG, W1):
        bench.say(peer, Heartbeat())
        assert bench.take(peer) == []
    bench.handle(DiskFull(""))
    bench.say(W1, Heartbeat())
    assert bench.take(W1) == [RunEnded(reason="done")]
