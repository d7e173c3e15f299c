"""PostAll and DeliverAll, which only 0.1.0 sends: handled as single messages."""

import itertools

import msgspec
import pytest

from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.link.core import Link
from fedmq.broker.link.events import Delivery, Wake
from fedmq.broker.wire.encoding import decode_frame, decode_message, encode_frame, encode_message
from fedmq.broker.wire.schema import (
    MAX_ALL,
    MAX_MESSAGE_BYTES,
    MIN_MESSAGE_BYTES,
    Ack,
    Blob,
    ChunkRequest,
    Deliver,
    DeliverAll,
    Done,
    Message,
    Post,
    PostAll,
)
from tests.broker.links import HELLO, frames, heard, message, welcomed

AGG, W1, W2 = b"agg:s1", b"w1:s1", b"w2:s1"


# ---- deliveries at a node


def deliver_all(*seqs, after=0):
    messages = tuple((seq, encode_message(message(seq))) for seq in seqs)
    return DeliverAll(at=7.0, messages=messages, after=after)


def handed_on(actions):
    deliveries = [each for each in actions if isinstance(each, Delivery)]
    return [(each.seq, each.at, each.message.id) for each in deliveries]


def seqs(actions):
    return [seq for seq, _, _ in handed_on(actions)]


@pytest.fixture
def link():
    return welcomed()


def test_deliveries_are_handed_on_once_and_in_order(link):
    frame = deliver_all(3, 4, 9)
    assert handed_on(heard(link, frame)) == [(3, 7.0, "w1/3"), (4, 7.0, "w1/4"), (9, 7.0, "w1/9")]
    assert heard(link, frame) == []
    assert heard(link, deliver_all(12, 13, after=11)) == [], "one was lost before these"
    assert seqs(heard(link, deliver_all(10, 12, after=10))) == [10, 12]


def test_only_new_deliveries_of_a_repeated_frame_are_handed_on(link):
    heard(link, deliver_all(3, 4))
    assert seqs(heard(link, deliver_all(3, 4, 9, 12))) == [9, 12]
    assert heard(link, deliver_all(4, 9, 12, after=4)) == []


def test_an_unreadable_delivery_is_rejected_and_the_others_are_taken(link):
    data = encode_message(message(3))
    frame = DeliverAll(at=7.0, messages=((3, data), (4, b"\xc1"), (5, b""), (6, data)))
    actions = heard(link, frame)
    assert [seq for done in frames(actions, Done) for seq in done.refused] == [4, 5]
    assert seqs([each for each in actions if isinstance(each, Delivery)]) == [3, 6]


def test_no_delivery_is_taken_before_the_welcome():
    link = Link(HELLO)
    link.handle(Wake(), 0.0)
    assert heard(link, deliver_all(3, 4)) == []


# ---- posts at the broker


def note(number, to, **fields):
    fields = {"kind": "note", "sender": "agg", "run": "r", "id": f"agg/{number}", **fields}
    return msgspec.msgpack.encode(Message(to=to, **fields))


def nested(levels):
    value = 0
    for _ in range(levels):
        value = [value]
    return value


KINDS = {
    "plain": lambda n: note(n, f"client/{n % 9}"),
    "to nobody yet": lambda n: note(n, "client/9"),
    "record": lambda n: note(n, "record"),
    "timer": lambda n: note(n, "timer", body={"token": "t", "after_s": 5.0}),
    "checkpoint": lambda n: note(n, "checkpoint"),
    "nowhere": lambda n: note(n, "client/10"),
    "again": lambda _: note(0, "client/0"),
    "another of the same id": lambda n: note(0, "client/0", body={"n": n}),
    "of somebody else": lambda n: note(n, "client/0", sender="w1"),
    "deep": lambda n: note(n, "client/0", body={"x": nested(40)}),
    "unreadable": lambda n: bytes([0xC1, n % 256, *range(40)]),
    "too long": lambda n: note(n, "client/0", body={"x": bytes(MAX_MESSAGE_BYTES)}),
}


def furnish(bench):
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 3),))
    bench.joined("w2", clients=((4, 8),))
    bench.sent.clear()
    return bench


@pytest.fixture
def room(bench):
    return furnish(bench)


@pytest.mark.parametrize("kind", KINDS)
def test_posts_have_the_same_effect_as_one_by_one(new_bench, kind):
    """Also after a restart of the broker, when all of them are sent again."""
    count = itertools.count(1)
    groups = [["plain"], [kind], ["plain", kind, "plain"], [kind]]
    posts = [[KINDS[each](next(count)) for each in group] for group in groups]
    alone, bundled = furnish(new_bench()), furnish(new_bench())
    for _ in range(2):
        for number, data in enumerate(itertools.chain(*posts)):
            alone.say(AGG, Post(n=number, message=data))
        for number, group in enumerate(posts):
            bundled.say(AGG, PostAll(n=number, messages=tuple(group)))
        assert effect(alone) == effect(bundled)
        for bench in (alone, bundled):
            bench.restart()
            furnish(bench)


def effect(bench):
    """Return the content of the ledger, and what the nodes received."""
    entries = [
        (entry.seq, shown(entry.message) if isinstance(entry, Accepted) else type(entry).__name__)
        for entry in bench.entries
    ]
    refusals = [(each.of, each.reason) for each in bench.refusals()]
    received = {
        peer: [(each.seq, shown(each.message), each.after) for each in bench.take(peer, Deliver)]
        for peer in (AGG, W1, W2)
    }
    return entries, refusals, received, bench.pending(), bench.core._mailboxes.next_seq


def shown(data):
    """Return a message's content, without an id that stems from the number of its frame."""
    message = decode_message(data)
    named = message.body.get("id", "").startswith("s1/")
    return (message.id, message.to, message.body | {"id": ""} if named else message.body)


def test_a_frame_is_acknowledged_once_all_of_its_messages_are_here(room):
    data = b"x" * 40
    messages = (note(1, "client/0"), note(2, "client/0", blobs=(Blob.of(data),)))
    room.say(AGG, PostAll(n=0, messages=(*messages, note(3, "client/0"))))
    assert [decode_message(each.message).id for each in room.take(W1, Deliver)] == ["agg/1"]
    room.wake(1.0)
    assert room.take(AGG, Ack | ChunkRequest)[0].digest == Blob.of(data).digest
    assert not room.take(AGG, Ack)


def test_very_many_tiny_messages_are_not_a_frame():
    """Rejecting each would cost the ledger many times the bytes of the frame."""
    header = encode_frame(PostAll(messages=(b"x",) * MAX_ALL))
    with pytest.raises(WireError, match="Expected `bytes` of length"):
        decode_frame(header)
    shortest = Message(kind="k", id="i", run="r", sender="s", to="t")
    assert len(encode_message(shortest)) > MIN_MESSAGE_BYTES
