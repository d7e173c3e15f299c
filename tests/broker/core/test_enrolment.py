"""All that an invite's key may do is hand in another key, which gets the invite's rights."""

import pytest

from fedmq.broker.access.rights import Invite, Origin, Rights
from fedmq.broker.core.events import Enlist, Unreadable
from fedmq.broker.errors import WireError
from fedmq.broker.wire.schema import (
    ChunkRequest,
    Done,
    Enroll,
    Enrolled,
    Goodbye,
    Heartbeat,
    Hello,
    Post,
    Reject,
    RunEnded,
    UnknownSession,
    Welcome,
)

ANN, NEW, OTHER, INVITE = (letter * 40 for letter in "anoi")
PEER = b"enrolling"


def invite(**more):
    rights = Rights(name="lab", key=INVITE, roles=("worker",), clients=((0, 3),))
    return Invite(rights=rights, **{"uses": 2, "expires_at": 100.0, **more})


def ann():
    return Rights(name="ann", key=ANN, roles=("aggregator",))


@pytest.fixture
def room(bench):
    bench.allow(ann(), invites=[invite()])
    bench.joined("agg", "aggregator", origin=Origin(ANN))
    return bench


def enroll(room, key=NEW, peer=PEER, origin=None):
    """Hand in a key; return (actions, answers)."""
    actions = room.say(peer, Enroll(key=key), origin=origin or Origin(INVITE))
    return actions, room.take(peer)


def code(frames):
    [frame] = frames
    assert isinstance(frame, Reject)
    return frame.code


def test_a_key_that_is_handed_in_is_stored_before_it_is_answered(room):
    actions, answers = enroll(room)
    assert answers == [Enrolled(key=NEW)]
    kinds = [type(each).__name__ for each in actions]
    assert kinds.index("Enlist") < kinds.index("SendTo")
    peer = room.join("w1", clients=((0, 3),), origin=Origin(NEW))
    assert room.take(peer, Welcome)
    peer = room.join("w2", clients=((4, 4),), origin=Origin(NEW))
    assert code(room.take(peer)) == "client"


def test_the_same_key_again_uses_nothing(room):
    """The answer to the first try may be lost."""
    enroll(room)
    actions, answers = enroll(room, peer=b"again")
    assert answers == [Enrolled(key=NEW)]
    assert not any(isinstance(each, Enlist) for each in actions)
    assert room.access.invites[INVITE].uses == 1
    assert enroll(room, OTHER)[1] == [Enrolled(key=OTHER)]
    assert code(enroll(room, "p" * 40)[1]) == "invite"
    assert enroll(room, OTHER)[1] == [Enrolled(key=OTHER)]


def test_an_invite_expires(room):
    room.now = 100.0
    assert code(enroll(room)[1]) == "invite"


def test_an_invite_that_is_withdrawn_while_it_is_used(room):
    room.enroll_error = ValueError("invite lab was revoked")
    [reject] = enroll(room)[1]
    assert (reject.code, reject.reason) == ("invite", "invite lab was revoked")
    room.enroll_error = OSError("No space left on device")
    [reject] = enroll(room)[1]
    assert (reject.code, reject.reason) == ("invite", "No space left on device")
    assert NEW not in room.access.keys


def test_a_revoked_invite_is_no_invite(room):
    room.allow(ann())
    assert code(enroll(room)[1]) == "key"
    assert room.disconnected == [PEER]


@pytest.mark.parametrize("key", [ANN, INVITE, "n" * 39 + " ", "n" * 39 + "\n", "\u00e9" * 40])
def test_a_key_of_somebody_else_or_none_is_not_enrolled(room, key):
    """Its rights would become those of the invite."""
    assert code(enroll(room, key)[1]) == "key"
    assert room.access.keys[ANN].name == "ann"


def test_a_key_that_was_revoked_does_not_come_back_with_its_invite(room):
    enroll(room)
    room.allow(ann(), invites=[invite(enrolled=(NEW,), uses=1)])
    [reject] = enroll(room)[1]
    assert reject.code == "key"
    assert "revoked" in reject.reason


@pytest.mark.parametrize("origin", [Origin(ANN), Origin("")], ids=["a key", "none"])
def test_only_an_invite_enrolls(room, origin):
    room.allow(ann(), invites=[invite()], keyless=Rights(name="local"))
    assert code(enroll(room, origin=origin)[1]) == "unexpected"
    room.joined("w9" if not origin.key else "agg", (origin.key and "aggregator") or "worker",
                session="2", origin=origin, peer=PEER)  # fmt: skip
    assert code(enroll(room, origin=origin)[1]) == "unexpected"


@pytest.mark.parametrize(
    "frame",
    [
        Hello(node="w1", role="worker", session="s"),
        Hello(node="a", role="aggregator", session="s", run="mine"),
        Heartbeat(),
        Post(message=b"x" * 40),
        Done(),
        RunEnded(),
        ChunkRequest(owner="agg", digest=b"d" * 16, start=0, size=1),
        Enrolled(key=NEW),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_an_invite_may_do_nothing_else(room, frame):
    entries = len(room.entries)
    room.say(PEER, frame, origin=Origin(INVITE))
    [reject] = room.take(PEER)
    assert (reject.code, "invite" in reject.reason) == ("key", True)
    assert len(room.entries) == entries
    assert room.disconnected == []


def test_unreadable_bytes_of_a_key_without_rights_are_answered_by_its_key(room):
    room.handle(Unreadable(PEER, WireError("nonsense"), Origin(OTHER)))
    room.handle(Unreadable(b"agg:s1", WireError("nonsense"), Origin(ANN)))
    assert code(room.take(PEER)) == "key"
    assert code(room.take(b"agg:s1")) == "unreadable"


def test_a_goodbye_of_a_stranger_gets_no_answer(room):
    for origin in (Origin(INVITE), Origin(OTHER), Origin("")):
        room.say(PEER, Goodbye(), origin=origin)
        assert room.take(PEER) == []


def test_a_key_without_a_session_says_hello_first(room):
    room.say(b"new", Heartbeat(), origin=Origin(ANN))
    assert room.take(b"new") == [UnknownSession()]
