"""The states of a link, and that an inconsistent state is found."""

import math

import pytest

from fedmq.broker.link.contact import LINK, LinkEvent, LinkState
from fedmq.broker.link.core import Link
from fedmq.broker.link.events import Fetch, LinkEnded, Publish, Taken, Wake
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    Blob,
    Done,
    Reject,
    RunEnded,
    StorageFull,
    UnknownSession,
    Welcome,
)
from tests.broker.links import HELLO, WELCOME, deliver, heard, outgoing, welcomed

OTHER = Welcome(run="r", beat_s=1.0, lease_s=10.0, identity="other")


def give_up(link):
    link.give_up_after(0.5)
    return link.handle(Wake(), 1.0)


REACH = {
    LinkState.CONNECTING: [],
    LinkState.CONNECTED: [WELCOME],
    LinkState.RECONNECTING: [WELCOME, UnknownSession()],
    LinkState.BLOCKED: [WELCOME, StorageFull(reason="no space")],
    LinkState.ENDED: [WELCOME, RunEnded(reason="done")],
}
MAKE = {
    LinkEvent.WELCOME: lambda link: heard(link, WELCOME),
    LinkEvent.UNKNOWN_SESSION: lambda link: heard(link, UnknownSession()),
    LinkEvent.SILENCE: lambda link: link.handle(Wake(), WELCOME.lease_s),
    LinkEvent.STORAGE_FULL: lambda link: heard(link, StorageFull(reason="no space")),
    LinkEvent.REJECT: lambda link: heard(link, Reject(code="name", reason="why")),
    LinkEvent.RUN_END: lambda link: heard(link, RunEnded(reason="done")),
    LinkEvent.GIVE_UP: give_up,
    LinkEvent.OTHER_RUN: lambda link: heard(link, OTHER),
}


def link_in(state):
    link = Link(HELLO)
    link.handle(Wake(), 0.0)
    for frame in REACH[state]:
        heard(link, frame)
    assert link.state is state
    return link


@pytest.mark.parametrize("state", LinkState)
@pytest.mark.parametrize("event", LinkEvent)
def test_each_event_does_in_each_state_what_the_table_says(state, event):
    link = link_in(state)
    actions = MAKE[event](link)
    if (state, event) == (LinkState.CONNECTING, LinkEvent.OTHER_RUN):
        return  # the first Welcome says which run it is
    assert link.state is LINK[state].get(event, state)
    if link.state is LinkState.ENDED and state is not LinkState.ENDED:
        assert isinstance(actions[-1], LinkEnded)
    if state is LinkState.ENDED:
        assert actions == []
    link.validate_state()


def test_every_state_but_the_last_has_a_deadline():
    for state in LinkState:
        assert (link_in(state).deadline is None) == (state is LinkState.ENDED)


def busy():
    """Return a link in the middle of everything."""
    link = welcomed()
    for seq in range(3):
        link.handle(deliver(seq, after=seq), 0.0)
    link.handle(outgoing(0, b"one", b"two"), 0.0)
    link.handle(outgoing(1, b"two"), 0.0)
    link.handle(Publish(Done(seqs=(1,))), 0.0)
    link.handle(Fetch("agg", Blob.of(bytes(9 * CHUNK_BYTES))), 0.0)
    link.validate_state()
    return link


def drop_blob(link):
    link._unacknowledged._served.popitem()


def count_blob_twice(link):
    next(iter(link._unacknowledged._served.values())).posts += 1


def lose_frame(link):
    del link._unacknowledged._frames[1]


def number_wrongly(link):
    frames = link._unacknowledged._frames
    frames[0], frames[1] = frames[1], frames[0]


def forget_download(link):
    link._arrivals._arriving.clear()


def request_too_much(link):
    link._arrivals._fetcher._outstanding = 5


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (drop_blob, "served blobs"),
        (count_blob_twice, "served blobs"),
        (lose_frame, "frame 0 is where 1 was expected"),
        (number_wrongly, "frame 0 would be sent as Post"),
        (forget_download, "on their way"),
        (request_too_much, "5 chunks requested"),
        (lambda link: setattr(link, "state", LinkState.CONNECTING), "but was admitted"),
        (lambda link: setattr(link, "_identity", None), "has no Welcome"),
        (lambda link: setattr(link, "taken", 4), "4 taken, but 3 received"),
        (lambda link: setattr(link, "_done_due", math.inf), r"\[1\] are handled"),
        (lambda link: setattr(link, "_lease_s", math.inf), "has no Welcome"),
        (lambda link: link._done.append(3), r"\[1, 3\] are handled, 3 received"),
        (lambda link: setattr(link, "_unreported_credit", -1), "the credit to return is -1"),
        (lambda link: setattr(link._contact, "_answer", WELCOME), "the contact is CONNECTED"),
        (lambda link: setattr(link._contact, "_reports", 2), "report 2 is due after 3.0 s"),
        (lambda link: setattr(link._contact, "_waited_since", -1.0), "waited for longer"),
    ],
)
def test_an_inconsistent_state_is_found(fault, words):
    link = busy()
    fault(link)
    with pytest.raises(AssertionError, match=words):
        link.validate_state()


def test_what_a_node_takes_is_what_was_received():
    link = busy()
    link.handle(Taken([link.handle(deliver(3, after=3), 0.0)[0]]), 0.0)
    link.validate_state()
    assert (link.taken, link.received) == (4, 4)
