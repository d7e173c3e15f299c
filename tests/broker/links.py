"""Helpers for the tests of the Link core."""

from fedmq.broker.link.core import Link
from fedmq.broker.link.events import FrameReceived, PostMessage, Send, Wake
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    Blob,
    Deliver,
    Hello,
    Message,
    Welcome,
)

HELLO = Hello(node="w1", role="worker", session="s1", clients=((0, 4),))
WELCOME = Welcome(run="r", beat_s=1.0, lease_s=10.0)


def message(number=0, blobs=(), **more):
    fields = {"kind": "note", "run": "r", "sender": "w1", "to": "aggregator", **more}
    return Message(id=f"w1/{number}", blobs=tuple(Blob.of(each) for each in blobs), **fields)


def outgoing(number=0, *blobs, consumes=(), **more):
    return PostMessage(message(number, blobs, **more), blobs, consumes)


def deliver(seq, *blobs, buffers=None, after=0):
    names = tuple(Blob.of(each) for each in blobs)
    note = Message(kind="note", id=f"a/{seq}", run="r", sender="agg", to="client/0", blobs=names)
    inline = tuple(range(len(blobs)))
    data = encode_message(note)
    frame = Deliver(seq=seq, at=float(seq), message=data, inline=inline, after=after)
    return FrameReceived(frame, blobs if buffers is None else buffers)


def frames(actions, kind=object):
    sent = [action.frame for action in actions if isinstance(action, Send)]
    return [frame for frame in sent if isinstance(frame, kind)]


def heard(link, frame, *buffers, now=0.0):
    return link.handle(FrameReceived(frame, buffers), now)


def welcomed():
    """Return a link that has just been welcomed, at time 0."""
    core = Link(HELLO)
    core.handle(Wake(), 0.0)
    heard(core, WELCOME)
    return core
