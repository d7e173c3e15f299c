"""A broker crashes, and another one continues from its ledger."""

import pytest

from fedmq.broker.ledger.entries import Accepted, BlobName, Opened, Refusal
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    Blob,
    Chunk,
    ChunkRequest,
    Deliver,
    Done,
    Goodbye,
    Heartbeat,
    RunEnded,
    UnknownSession,
    Wait,
    Welcome,
    digest,
)

AGG, W1, W2 = b"agg:s1", b"w1:s1", b"w2:s1"
HOSTS = {"agg": (), "w1": ((0, 4),), "w2": ((5, 9),)}


def come_back(bench, name="all", *, session="s1", got=0, **more):
    """Send the Hello of a node, or of all, as links do after a broker's crash."""
    for node in HOSTS if name == "all" else [name]:
        role = "aggregator" if node == "agg" else "worker"
        first = bench.numbers[f"{node}:{session}".encode()]
        fields = {"session": session, "key": f"of {node}", "got": got, "first": first, **more}
        bench.join(node, role, clients=HOSTS[node], **fields)


@pytest.fixture
def room(bench):
    """An aggregator, and two workers with clients 0-4 and 5-9."""
    come_back(bench)
    bench.sent.clear()
    return bench


def test_unfinished_messages_are_delivered_again_in_order_and_finished_ones_are_not(room):
    for number in range(6):
        room.post(AGG, f"client/{number % 3}", f"task {number}")
    seqs = [frame.seq for frame in room.take(W1, Deliver)]
    room.tell(W1, Done(seqs=seqs[1:2]))
    room.post(W1, "aggregator", "result", consumes=(seqs[3],))
    room.restart()
    come_back(room)
    assert room.texts(W1) == ["task 0", "task 2", "task 4", "task 5"]
    assert room.texts(AGG) == ["result"]


def test_a_session_that_lives_on_is_delivered_only_what_it_has_not_got(room):
    for number in range(4):
        room.post(AGG, "client/0", f"task {number}")
    frames = room.take(W1, Deliver)
    room.restart()
    come_back(room, "w1", got=frames[1].seq + 1)
    offered = room.take(W1, Deliver)
    assert [frame.seq for frame in offered] == [frame.seq for frame in frames[2:]]
    assert offered[0].after == frames[1].seq + 1
    assert offered[1].after == offered[0].seq + 1


def test_messages_for_a_client_that_nobody_hosts_wait_on(room):
    room.say(W2, Goodbye())
    room.post(AGG, "client/7", "waits")
    room.restart()
    room.post(AGG, "client/8", "to a stranger")
    assert room.take(AGG) == [UnknownSession()]
    room.numbers[AGG] -= 1  # its link says it again
    come_back(room, "agg")
    room.post(AGG, "client/8", "waits as well")
    come_back(room, "w2", session="s2")
    assert room.texts(b"w2:s2") == ["waits", "waits as well"]


def test_a_post_whose_acknowledgment_was_lost_with_the_broker_is_known_by_its_id(room):
    room.post(W1, "aggregator", "once", n=0)
    room.restart()
    come_back(room, "agg")
    come_back(room, "w1", first=0)
    room.texts(AGG)
    entries = len(room.entries)
    room.post(W1, "aggregator", "once", n=0)
    room.post(W1, "aggregator", "twice", n=1)
    assert room.texts(AGG) == ["twice"]
    assert len(room.entries) == entries + 1


def test_a_duplicate_post_still_consumes(room):
    """The first time, its sender may not have had the message that it now consumes."""
    room.post(AGG, "client/0", "task")
    [task] = room.take(W1, Deliver)
    room.post(W1, "aggregator", "result", id="result", n=0)
    room.restart()
    come_back(room, "w1", session="s2")
    room.post(b"w1:s2", "aggregator", "result", id="result", consumes=(task.seq,))
    assert room.account()[1] == [task.seq]
    assert len([each for each in room.messages() if each.id == "result"]) == 1


def test_another_message_of_a_known_id_is_rejected_after_a_restart_as_before(room):
    room.post(W1, "aggregator", "the first", id="x")
    room.restart()
    come_back(room, "w1")
    room.post(W1, "aggregator", "another", id="x")
    [refusal] = room.refusals()
    assert refusal.reason == "another message with the id 'x' was accepted or rejected before"


def test_timers_survive_and_those_that_came_due_meanwhile_tick_at_once(room):
    room.timer(AGG, "soon", 3.0)
    room.timer(AGG, "late", 30.0)
    room.timer(AGG, "done", 0.0)
    room.wake(1.0)
    ticks = [body["token"] for _, body in room.said("tick")]
    assert ticks == ["done"]
    room.now = 5.0
    room.restart()
    room.wake()
    assert [body["token"] for _, body in room.said("tick")] == ["done", "soon"]
    come_back(room, "agg")
    for now in range(6, 32):
        room.wake(float(now))
        room.say(AGG, Heartbeat())
    assert [body["token"] for _, body in room.said("tick")] == ["done", "soon", "late"]
    assert room.entries[-1].at == 30.0


def test_the_newest_checkpoint_survives_and_is_handed_to_a_new_session(room):
    for number in range(3):
        room.post(AGG, "checkpoint", f"version {number}", blobs=[b"%d" % number])
    seq = room.entries[-1].seq
    room.restart()
    assert room.uses == {seq: (BlobName("r", "agg", digest(b"2")),)}
    come_back(room, "agg", session="s2")
    [welcome] = room.take(b"agg:s2", Welcome)
    assert welcome.checkpoint == Deliver(seq=seq, at=0.0, message=room.read(seq).message)
    room.say(b"agg:s2", ChunkRequest(owner="agg", digest=digest(b"2"), start=0, size=1))
    assert room.sent[b"agg:s2"][-1][1] == [b"2"]
    room.post(b"agg:s2", "checkpoint", "version 3")
    assert room.entries[-1].consumes == (seq,)


def test_what_was_rejected_and_not_settled_is_delivered_again_but_rejected_once(room):
    room.post(W1, "aggregator", "odd")
    seq = room.take(AGG, Deliver)[-1].seq
    room.tell(AGG, Done(refused={seq: "of another shape"}))
    room.restart()
    come_back(room, "agg", session="s2")
    assert room.texts(b"agg:s2") == ["odd"]
    room.tell(b"agg:s2", Done(seqs=(seq,), refused={seq: "of another shape"}))
    assert [entry.of for entry in room.refusals()] == [seq]
    room.restart()
    come_back(room, "agg", session="s2")
    assert room.texts(b"agg:s2") == []


def test_an_absent_sender_gets_a_rejection_when_it_returns(room):
    room.post(W1, "moon", "lost", id="w1/7")
    room.restart()
    come_back(room, "w1")
    [said] = [each for each in room.inbox(W1) if each.kind == "refused"]
    assert said.body == {
        "id": "w1/7",
        "reason": "no such address: 'moon'",
        "by": "broker",
        "code": "no-address",
    }


def test_connected_nodes_have_a_lease_to_return_and_do_not_join_again(room):
    room.now = 50.0
    room.restart()
    assert room.core.deadline == 60.0
    room.wake(59.9)
    come_back(room, "agg")
    come_back(room, "w1")
    room.wake(65.0)
    assert [(kind, body["node"]) for kind, body in room.said()] == [
        ("joined", "agg"),
        ("joined", "w1"),
        ("joined", "w2"),
        ("left", "w2"),
    ]
    assert room.said("left")[0][1]["reason"] == "silent for 10.0 s"


def test_a_node_lost_in_a_restart_does_not_count_against_its_message(room):
    """The broker crashed; a node that does not return did not end because of its message."""
    room.post(AGG, "client/5", "task")
    room.restart()
    come_back(room, "agg")
    room.wake(room.now + 10.0)
    [(_, body)] = [each for each in room.said("left") if each[1]["node"] == "w2"]
    assert "interrupted" not in body


def test_frame_numbers_continue_where_the_hello_says(room):
    for number in range(3):
        room.post(W1, "aggregator", f"{number}")
    room.restart()
    room.say(W1, Heartbeat())
    assert room.take(W1) == [UnknownSession()]
    come_back(room, "w1", first=1)
    for number in range(1, 4):
        room.post(W1, "aggregator", f"{number}", n=number)
    assert room.take(W1, UnknownSession) == []
    come_back(room, "agg")
    assert room.texts(AGG) == ["0", "1", "2", "3"]


def test_names_are_still_taken_after_a_restart(room):
    room.restart()
    come_back(room, "w1", session="s2", key="of another")
    assert room.take(b"w1:s2")[0].reason == "a node named 'w1' is already connected"
    come_back(room, "w1", session="2")
    assert isinstance(room.take(b"w1:2")[0], Welcome)
    room.restart()
    come_back(room, "w1", session="1")
    [reject] = room.take(b"w1:1")
    assert reject.code == "replaced"


def test_a_run_continues_without_its_aggregator_and_takes_it_back_with_its_configuration(room):
    assert isinstance(room.entries[0], Opened)
    room.say(AGG, Goodbye())
    room.restart()
    come_back(room, "w1")
    room.post(W1, "aggregator", "result")
    room.join("agg", "aggregator", session="s2", config="[run]\nseed = 1", key="of agg")
    [reject] = room.take(b"agg:s2")
    assert reject.reason == "run r has another configuration; set another run.id for this one"
    come_back(room, "agg", session="s2")
    assert isinstance(room.take(b"agg:s2")[0], Welcome)
    assert room.core._mailboxes.runs["r"].total_clients == 10


def test_a_run_that_is_over_stays_over(room):
    room.post(AGG, "client/0", "task")
    room.tell(AGG, RunEnded(reason="done"))
    room.restart()
    assert room.core.idle
    assert room.core.deadline is None
    come_back(room, "w1")
    assert room.take(W1) == [RunEnded(reason="done")]
    assert isinstance(room.take(room.join("w9"))[0], Wait)
    assert room.pending() == []


def test_an_upload_continues_from_the_chunks_that_are_there(room):
    data = bytes(range(256)) * 8192 + b"the end"
    assert len(data) > 2 * CHUNK_BYTES
    room.post(W1, "aggregator", "large", blobs=[data], n=0)
    wants = room.take(W1, ChunkRequest)
    assert [want.start for want in wants] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    room.say(W1, Chunk(owner="w1", digest=digest(data), start=0), data[:CHUNK_BYTES])
    room.restart()
    come_back(room, "agg")
    come_back(room, "w1", first=0)
    room.post(W1, "aggregator", "large", blobs=[data], n=0)
    wants = room.take(W1, ChunkRequest)
    assert [want.start for want in wants] == [CHUNK_BYTES, 2 * CHUNK_BYTES]
    for want in wants:
        chunk = Chunk(owner="w1", digest=want.digest, start=want.start)
        room.say(W1, chunk, data[want.start : want.start + want.size])
    assert room.texts(AGG) == ["large"]
    assert not room.refusals()


def test_a_message_whose_bytes_were_lost_with_the_power_is_rejected_to_its_sender(room):
    room.post(AGG, "client/0", "whole", blobs=[b"whole"])
    room.post(AGG, "client/0", "lost", blobs=[b"lost"], id="agg/lost")
    room.blobs.pop(BlobName("r", "agg", Blob.of(b"lost").digest))
    room.restart()
    come_back(room)
    assert room.texts(W1) == ["whole"]
    [refusal] = room.refusals()
    assert (refusal.id, refusal.node, refusal.dead_lettered) == ("agg/lost", "broker", True)
    told = [each.body["id"] for each in room.inbox(AGG) if each.kind == "refused"]
    assert told == ["agg/lost"]


def test_bytes_that_unfinished_messages_name_are_kept_and_no_others(room):
    for number in range(3):
        room.post(AGG, "client/0", blobs=[b"%d" % number])
    seqs = [frame.seq for frame in room.take(W1, Deliver)]
    room.tell(W1, Done(seqs=seqs[:1]))
    before = room.uses
    assert sorted(before) == seqs[1:]
    room.restart()
    assert room.uses == before


def test_restarting_again_and_again_changes_nothing(room):
    for number in range(5):
        room.post(AGG, f"client/{number}", f"task {number}")
        room.post(W2, "aggregator", f"result {number}")
    room.timer(AGG, "t", 100.0)
    room.post(AGG, "checkpoint")
    pending, entries = room.pending(), len(room.entries)
    for _ in range(3):
        room.restart()
        assert room.pending() == pending
    assert len(room.entries) == entries
    assert not any(isinstance(entry, Refusal) for entry in room.entries)
    assert sum(isinstance(entry, Accepted) for entry in room.entries) == entries - 1
