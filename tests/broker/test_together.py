"""Many small messages in one frame, and one record: as if each had come alone."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import Accepted, AcceptedAll
from fedmq.broker.link.core import Link
from fedmq.broker.link.events import Deliveries, Publish, Taken, Together, Wake
from fedmq.broker.wire.encoding import decode_frame, decode_message, encode_frame, encode_message
from fedmq.broker.wire.schema import (
    MAX_ALL,
    MAX_ALL_BYTES,
    MAX_MESSAGE_BYTES,
    MIN_MESSAGE_BYTES,
    Ack,
    Blob,
    Deliver,
    DeliverAll,
    Done,
    Heartbeat,
    Hello,
    Message,
    Post,
    PostAll,
    UnknownSession,
)
from tests.broker.links import HELLO, WELCOME, frames, heard, message, outgoing, welcomed
from tests.broker.net import network, notes

AGG, W1, W2 = b"agg:s1", b"w1:s1", b"w2:s1"


def together(*numbers, size=0):
    return Together([encode_message(message(each, body={"x": bytes(size)})) for each in numbers])


# ---- a node that posts many


@pytest.fixture
def link():
    return welcomed()


@pytest.mark.parametrize(("count", "size"), [(2, 0), (MAX_ALL + 1, 0), (90, 1000), (5, 20_000)])
def test_messages_go_in_as_few_frames_as_their_limits_allow(link, count, size):
    event = together(*range(count), size=size)
    sent = frames(link.handle(event, 0.0))
    assert [frame.n for frame in sent] == list(range(len(sent)))
    parts = [frame.messages if isinstance(frame, PostAll) else [frame.message] for frame in sent]
    assert list(itertools.chain(*parts)) == event.messages
    for part, following in itertools.pairwise([*parts, None]):
        assert len(part) <= MAX_ALL
        assert len(part) == 1 or sum(map(len, part)) <= MAX_ALL_BYTES
        if following is not None:
            more = sum(map(len, part)) + len(following[0])
            assert len(part) == MAX_ALL or more > MAX_ALL_BYTES
    assert link.unacknowledged == count


def test_many_and_one_keep_their_order():
    link = welcomed()
    sent = frames(link.handle(together(0, 1), 0.0))
    sent += frames(link.handle(outgoing(2), 0.0))
    sent += frames(link.handle(together(3, 4), 0.0))
    assert [frame.n for frame in sent] == [0, 1, 2]


def test_a_frame_of_many_is_said_again_until_it_is_receipted(link):
    [frame] = frames(link.handle(together(0, 1, 2), 0.0))
    heard(link, UnknownSession())
    assert frames(heard(link, WELCOME)) == [frame]
    heard(link, Ack(upto=0))
    assert link.unacknowledged == 0


def test_a_broker_of_an_older_version_gets_them_one_by_one():
    link = Link(HELLO)
    link.handle(Wake(), 0.0)
    heard(link, msgspec.structs.replace(WELCOME, v=(1, 1)))
    assert [type(each) for each in frames(link.handle(together(0, 1, 2), 0.0))] == [Post] * 3


def test_what_is_done_with_is_not_heard_of_before_what_was_posted_before_it(link):
    """Else a node could die between the two, and what it owes for the one would be lost."""
    link.handle(Publish(Done(seqs=(3,))), 0.0)
    [frame] = frames(link.handle(together(0, 1), 0.0))
    assert isinstance(frame, PostAll)
    assert frames(link.handle(Wake(), 1.0), Done) == [Done(n=1, seqs=(3,))]
    link.handle(Publish(Done(seqs=(4,))), 1.0)
    [alone] = frames(link.handle(together(2), 1.0))
    assert (type(alone), alone.consumes) == (Post, (4,))


@pytest.mark.slow
def test_beats_that_tell_what_was_taken_do_not_make_a_link_start_over(link):
    """Their answers come soon after one another: that nothing has moved meanwhile is no sign."""
    link.handle(outgoing(0), 0.5)
    seq, said = 0, []
    for step in range(100):
        now = 0.5 + step / 1000
        for _ in range(256):
            said += frames(heard(link, deliver_all(seq), now=now))
            said += frames(link.handle(Taken([delivery_of(seq)]), now))
            seq += 1
        for _ in range(3):
            said += frames(heard(link, Heartbeat(sent=seq + 5), now=now))
    assert {type(each) for each in said} == {Heartbeat}


# ---- a node that is sent many


def deliver_all(*seqs, after=0):
    note = [(seq, encode_message(message(seq))) for seq in seqs]
    return DeliverAll(at=7.0, messages=tuple(note), after=after)


def delivery_of(seq):
    [action] = heard(welcomed(), deliver_all(seq))
    return action.deliveries[0]


def handed_on(actions):
    return [
        (delivery.seq, delivery.at, delivery.message.id)
        for action in actions
        for delivery in action.deliveries
    ]


def test_many_deliveries_are_handed_on_once_and_in_order(link):
    frame = deliver_all(3, 4, 9)
    assert handed_on(heard(link, frame)) == [(3, 7.0, "w1/3"), (4, 7.0, "w1/4"), (9, 7.0, "w1/9")]
    assert heard(link, frame) == []
    assert heard(link, deliver_all(12, 13, after=11)) == [], "one was lost before these"
    assert [seq for seq, _, _ in handed_on(heard(link, deliver_all(10, 12, after=10)))] == [10, 12]


def test_of_many_that_come_again_with_others_only_the_new_ones_are_handed_on(link):
    heard(link, deliver_all(3, 4))
    assert [seq for seq, _, _ in handed_on(heard(link, deliver_all(3, 4, 9, 12)))] == [9, 12]
    assert heard(link, deliver_all(4, 9, 12, after=4)) == []


def test_one_of_many_that_cannot_be_read_is_refused_and_the_others_are_taken(link):
    frame = msgspec.structs.replace(
        deliver_all(3), messages=((3, note(3, "w1")), (4, b"\xc1"), (5, b""), (6, note(6, "w1")))
    )
    actions = heard(link, frame)
    refused = [seq for done in frames(actions, Done) for seq in done.refused]
    assert refused == [4, 5]
    taken = [each for each in actions if isinstance(each, Deliveries)]
    assert [seq for seq, _, _ in handed_on(taken)] == [3, 6]


def test_nothing_of_many_is_taken_before_the_welcome():
    link = Link(HELLO)
    link.handle(Wake(), 0.0)
    assert heard(link, deliver_all(3, 4)) == []


# ---- the broker


@pytest.fixture
def room(bench):
    return furnish(bench)


def furnish(bench):
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 3),))
    bench.joined("w2", clients=((4, 8),))
    bench.sent.clear()
    return bench


def note(number, to, **fields):
    data = plain_bytes(number, to, **fields)
    assert len(data) <= MAX_MESSAGE_BYTES
    return data


def plain_bytes(number, to, **fields):
    fields = {"kind": "note", "sender": "agg", "run": "r", "id": f"agg/{number}", **fields}
    return msgspec.msgpack.encode(Message(to=to, **fields))


TICK = {"token": "t", "after_s": 5.0}
SOME = {
    "plain": lambda n: note(n, f"client/{n % 9}"),
    "to nobody yet": lambda n: note(n, "client/9"),
    "record": lambda n: note(n, "record"),
    "timer": lambda n: note(n, "timer", body=TICK),
    "not a timer": lambda n: note(n, "timer", body={"token": ""}),
    "checkpoint": lambda n: note(n, "checkpoint"),
    "nowhere": lambda n: note(n, "client/10"),
    "oddly named": lambda n: note(n, "client/01"),
    "a node": lambda n: note(n, "node/w1"),
    "again": lambda _: note(0, "client/0"),
    "said before": lambda _: note(1000, "client/0"),
    "another of the same id": lambda n: note(0, "client/0", body={"n": n}),
    "of somebody else": lambda n: note(n, "client/0", sender="w1"),
    "of another run": lambda n: note(n, "client/0", run="q"),
    "the broker's": lambda n: note(n, "client/0", kind="joined"),
    "deep": lambda n: note(n, "client/0", body={"x": deep(40)}),
    "nearly deep": lambda n: note(n, "client/0", body={"x": deep(30), "y": {"z": [1]}}),
    "unreadable": lambda n: bytes([0xC1, n % 256, *range(40)]),
    "too long": lambda n: plain_bytes(n, "client/0", body={"x": bytes(MAX_MESSAGE_BYTES)}),
}


def deep(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("kind", SOME)
def test_many_of_a_kind_come_to_the_same_as_one_by_one(new_bench, kind):
    compare(new_bench, [[kind, kind], ["plain", kind, "plain"], [kind]])


@given(kinds=st.lists(st.lists(st.sampled_from(sorted(SOME)), min_size=1, max_size=6), max_size=4))
def test_any_mixture_comes_to_the_same_as_one_by_one(new_bench, kinds):
    compare(new_bench, kinds)


def compare(new_bench, kinds):
    """Post messages of these kinds, one by one, and in frames of many.

    Then the broker is restarted, and all of it is said again.
    """
    count = itertools.count(1)
    posts = [[SOME[kind](next(count)) for kind in each] for each in kinds]
    first = [note(0, "client/0")]
    alone, bundled = furnish(new_bench()), furnish(new_bench())
    for _ in range(2):
        for number, data in enumerate([*first, *itertools.chain(*posts)]):
            alone.say(AGG, Post(n=number, message=data))
        for number, each in enumerate([first, *posts]):
            bundled.say(AGG, PostAll(n=number, messages=tuple(each)))
        assert story(alone) == story(bundled)
        for bench in (alone, bundled):
            bench.restart()
            furnish(bench)


def story(bench):
    """All that came of it: in the ledger, and at the nodes."""
    books = [
        (entry.seq, told(entry.message) if isinstance(entry, Accepted) else type(entry).__name__)
        for entry in bench.entries
    ]
    refusals = [(each.of, each.reason) for each in bench.refusals()]
    heard = {
        peer: [(frame.seq, told(frame.message), frame.after) for frame in bench.take(peer, Deliver)]
        for peer in (AGG, W1, W2)
    }
    return books, refusals, heard, bench.pending(), bench.core._mailboxes.next_seq


def told(data):
    """What a message says; what has no id of its own is named by its frame, and that differs."""
    message = decode_message(data)
    own = message.body.get("id", "").startswith("s1/")
    return (message.id, message.to, message.body | {"id": ""} if own else message.body)


def test_a_node_of_an_older_version_is_known_as_one_after_the_broker_was_restarted(bench):
    older = Hello(v=(1, 1), node="w1", role="worker", session="s1", clients=((0, 9),))
    bench.joined("agg", "aggregator")
    bench.say(W1, older)
    bench.restart()
    bench.join("agg", "aggregator")
    bench.say(W1, older)
    many = PostAll(n=0, messages=tuple(note(each, "client/1") for each in range(5)))
    sent = [each.frame for each in bench.say(AGG, many) if hasattr(each, "frame")]
    assert [type(frame) for frame in sent] == [Deliver] * 5


def test_many_are_kept_as_one_record_and_delivered_as_one_frame(room, monkeypatch):
    appended = []
    append = room.carry_out
    monkeypatch.setattr(
        room, "carry_out", lambda actions: (appended.extend(actions), append(actions))
    )
    room.say(AGG, PostAll(n=0, messages=tuple(note(each, "client/1") for each in range(20))))
    kept = [each.entry for each in appended if hasattr(each, "entry")]
    assert [type(each) for each in kept[:1]] == [AcceptedAll]
    assert len(kept[0].messages) == 20
    sent = [each.frame for each in appended if type(getattr(each, "frame", None)) is DeliverAll]
    assert [len(frame.messages) for frame in sent] == [20]


def test_a_node_of_an_older_version_is_sent_them_one_by_one(bench):
    bench.joined("agg", "aggregator")
    bench.say(W1, Hello(v=(1, 1), node="w1", role="worker", session="s1", clients=((0, 9),)))
    bench.sent.clear()
    many = PostAll(n=0, messages=tuple(note(each, "client/1") for each in range(5)))
    sent = [each.frame for each in bench.say(AGG, many) if hasattr(each, "frame")]
    assert [type(frame) for frame in sent] == [Deliver] * 5


def test_a_frame_of_many_that_are_no_messages_is_none():
    """A refusal of each would cost the ledger many times what the frame did."""
    header = encode_frame(PostAll(messages=(b"x",) * MAX_ALL))
    with pytest.raises(WireError, match="Expected `bytes` of length"):
        decode_frame(header)
    assert len(encode_message(Message(kind="k", id="i", run="r", sender="s", to="t"))) > (
        MIN_MESSAGE_BYTES
    )


def test_a_message_with_blobs_is_refused_among_many(room):
    named = note(2, "client/0", blobs=(Blob.of(b"x"),))
    messages = (note(1, "client/0"), named, note(3, "client/0"))
    room.say(AGG, PostAll(n=0, messages=messages))
    assert [each.reason for each in room.refusals()] == ["a message with blobs is posted alone"]
    assert [decode_message(f.message).id for f in room.take(W1, Deliver)] == ["agg/1", "agg/3"]


def test_what_waits_in_the_ledger_is_offered_in_frames_of_many(room, monkeypatch):
    room.say(W1, Hello(node="w1", role="worker", session="s0"))
    for number in range(MAX_ALL + 9):
        room.say(AGG, Post(n=number, message=note(number, "client/9")))
    actions = room.say(b"w3:s1", Hello(node="w3", role="worker", session="s1", clients=((9, 9),)))
    sent = [each.frame for each in actions if isinstance(getattr(each, "frame", 0), DeliverAll)]
    assert [len(frame.messages) for frame in sent] == [MAX_ALL, 9]
    room.restart()
    actions = room.say(b"w3:s1", Hello(node="w3", role="worker", session="s1", clients=((9, 9),)))
    sent = [each.frame for each in actions if isinstance(getattr(each, "frame", 0), DeliverAll)]
    assert sum(len(frame.messages) for frame in sent) == MAX_ALL + 9


@pytest.mark.parametrize("written", [True, False], ids=["written", "not written"])
@pytest.mark.parametrize("after", range(6))
def test_a_broker_that_dies_takes_none_of_many_or_all_of_them_and_none_twice(
    tmp_path, after, written
):
    net = network(tmp_path)
    for start in range(0, 30, 10):
        data = [
            encode_message(
                Message(kind="note", id=f"agg/{number}", run="r", sender="agg",
                        to=f"client/{number % 8}", body={"number": number})
            )
            for number in range(start, start + 10)
        ]  # fmt: skip
        net.tell("agg", Together(data))
        net.post("agg", f"client/{start % 8}", start + 100)
    for _ in range(after):
        net.step()
    net.kill_broker(written=written)
    net.run(1.0)
    net.start_broker()
    net.until(lambda: all(m.core.unacknowledged == 0 for m in net.members.values()))
    net.run(1.0)
    got = sorted([*notes(net, "w1"), *notes(net, "w2")])
    assert got == [*range(30), 100, 110, 120]
    net.ledger.close()
