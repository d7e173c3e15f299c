import msgspec
import pytest

from fedmq.broker.errors import WireError
from fedmq.broker.link.core import DONE_WITHIN_S, HELLO_AGAIN_S, Link
from fedmq.broker.link.events import Admitted, Delivery, FrameReceived, LinkEnded, Publish, Wake
from fedmq.broker.wire.encoding import (
    decode_frame,
    encode_frame,
    encode_message,
)
from fedmq.broker.wire.schema import (
    MAX_HEADER_BYTES,
    Ack,
    Deliver,
    Done,
    Goodbye,
    Hello,
    Post,
    Reject,
    RunEnded,
    UnknownSession,
    Wait,
)
from tests.broker.links import HELLO, WELCOME, deliver, frames, heard, outgoing, welcomed


@pytest.fixture
def link():
    return welcomed()


def test_hello_is_sent_until_the_broker_answers():
    link = Link(HELLO)
    assert frames(link.handle(Wake(), 0.0)) == [HELLO]
    assert link.deadline == HELLO_AGAIN_S
    assert link.handle(Wake(), HELLO_AGAIN_S / 2) == []
    assert frames(link.handle(Wake(), HELLO_AGAIN_S)) == [HELLO]
    assert heard(link, Wait(reason="no run"), now=1.5) == []
    assert frames(link.handle(Wake(), 2.0)) == [HELLO]
    assert heard(link, WELCOME, now=2.1) == [Admitted(WELCOME)]
    assert frames(link.handle(Wake(), 2.9), Hello) == []
    assert heard(link, WELCOME, now=2.9) == []


def test_what_is_posted_before_the_welcome_goes_out_with_it():
    link = Link(HELLO)
    assert link.handle(outgoing(0, b"abc"), 0.0) == []
    assert link.handle(Publish(RunEnded(reason="done")), 0.0) == []
    actions = heard(link, WELCOME)
    assert [type(frame) for frame in frames(actions)] == [Post, RunEnded]
    assert actions[1].buffers == [b"abc"]


def test_posts_are_counted_and_sent_again_after_a_reconnect_until_they_are_acknowledged(link):
    sent = [frames(link.handle(outgoing(number), 0.0))[0] for number in range(4)]
    assert [post.n for post in sent] == [0, 1, 2, 3]
    assert link.unacknowledged == 4
    heard(link, Ack(upto=1))
    assert link.unacknowledged == 2
    assert frames(heard(link, UnknownSession(), now=0.1)) == [
        msgspec.structs.replace(HELLO, first=2)
    ]
    assert link.handle(outgoing(4), 0.1) == []
    again = frames(heard(link, WELCOME, now=0.2), Post)
    assert [post.n for post in again] == [2, 3, 4]
    assert again[:2] == sent[2:]
    heard(link, Ack(upto=4))
    assert frames(heard(link, WELCOME, now=0.2)) == []


def test_many_unknown_session_frames_are_answered_by_one_hello(link):
    """Each frame in flight draws one; each Hello would draw all posts again."""
    for number in range(20):
        link.handle(outgoing(number), 0.0)
    hellos = [
        hello for _ in range(20) for hello in frames(heard(link, UnknownSession(), now=0.01), Hello)
    ]
    assert len(hellos) == 1


def test_a_delivery_is_handed_on_once(link):
    [delivery] = link.handle(deliver(7, b"model"), 1.0)
    assert isinstance(delivery, Delivery)
    assert (delivery.seq, delivery.at, delivery.message.id) == (7, 7.0, "a/7")
    assert delivery.inline == {0: b"model"}
    for now in (1.0, 2.0):
        assert link.handle(deliver(7, b"model"), now) == []
    assert len(link.handle(deliver(8), 2.0)) == 1


@pytest.mark.parametrize(
    "event",
    [
        deliver(3, b"model", buffers=[b"other"]),
        deliver(3, b"model", buffers=[]),
        FrameReceived(Deliver(seq=3, at=0.0, message=b"\xc1")),
    ],
    ids=["other bytes", "no bytes", "no message"],
)
def test_a_delivery_that_cannot_be_read_is_rejected_once(link, event):
    [done] = frames(link.handle(event, 0.0))
    assert list(done.refused) == [3]
    assert link.handle(event, 0.0) == []


def test_done_waits_briefly_for_a_post_and_is_then_sent_alone(link):
    link.handle(deliver(3), 0.5)
    link.handle(deliver(4), 0.5)
    assert link.handle(Publish(Done(seqs=(3,))), 0.5) == []
    assert link.handle(Publish(Done(seqs=(4,))), 0.51) == []
    assert link.deadline == 0.5 + DONE_WITHIN_S
    assert frames(link.handle(Wake(), 0.5 + DONE_WITHIN_S)) == [Done(n=0, seqs=(3, 4))]
    assert link.handle(Wake(), 0.6) == []


def test_done_travels_with_the_next_post(link):
    link.handle(deliver(3), 0.0)
    link.handle(deliver(4), 0.0)
    link.handle(Publish(Done(seqs=(3,))), 0.0)
    [post] = frames(link.handle(outgoing(0, consumes=(4,)), 0.0))
    assert post.consumes == (4, 3)
    assert link.handle(Wake(), DONE_WITHIN_S * 2) == []


@pytest.mark.parametrize(
    "frame",
    [
        Done(seqs=(3,)),
        Done(refused={3: "odd"}),
        RunEnded(reason="done"),
    ],
    ids=["done", "refusal", "over"],
)
def test_a_frame_lost_with_the_connection_is_sent_until_it_is_acknowledged(link, frame):
    link.handle(deliver(3), 0.0)
    said = frames(link.handle(Publish(frame), 0.0) + link.handle(Wake(), DONE_WITHIN_S))
    assert said == [frame]
    heard(link, UnknownSession(), now=0.1)
    assert frames(heard(link, WELCOME, now=0.2)) == [frame]
    assert link.handle(deliver(3), 0.2) == []
    heard(link, Ack(upto=0), now=0.3)
    assert frames(heard(link, WELCOME, now=0.4)) == []


def test_any_number_of_rejections_fits_the_frames(link):
    reasons = dict.fromkeys(range(40), "€" * 2000)
    said = frames(link.handle(Publish(Done(refused=reasons)), 0.0))
    assert {seq for frame in said for seq in decode_frame(encode_frame(frame)).refused} == set(
        reasons
    )


@pytest.mark.parametrize("last", [RunEnded(reason="done"), Goodbye()])
def test_done_is_sent_before_the_last_frame(link, last):
    """The broker ignores later frames, and the ledger would end with handled messages pending."""
    link.handle(deliver(3), 0.0)
    link.handle(Publish(Done(seqs=(3,))), 0.0)
    assert frames(link.handle(Publish(last), 0.0)) == (
        [Done(n=0, seqs=(3,)), last if isinstance(last, Goodbye) else RunEnded(n=1, reason="done")]
    )


@pytest.mark.parametrize(
    ("frame", "rejected"),
    [(Reject(code="name", reason="why"), True), (RunEnded(reason="why"), False)],
)
def test_a_link_ends_when_it_is_rejected_or_its_run_is_over(link, frame, rejected):
    actions = heard(link, frame)
    code = "name" if rejected else ""
    assert actions[-1] == LinkEnded("why", rejected=rejected, over=not rejected, code=code)
    assert frames(actions) == ([] if rejected else [Goodbye(reason="the run is over")])
    assert link.deadline is None
    assert link.handle(Wake(), 100.0) == []
    assert link.handle(outgoing(), 100.0) == []
    assert heard(link, WELCOME) == []


def test_a_message_that_cannot_be_sent_is_an_error_at_once_and_leaves_nothing_behind(link):
    link.handle(deliver(3), 0.0)
    link.handle(Publish(Done(seqs=(3,))), 0.0)
    with pytest.raises(WireError, match="expected a note of at most"):
        link.handle(outgoing(0, body={"x": bytes(MAX_HEADER_BYTES)}), 0.0)
    assert link.unacknowledged == 0
    [post] = frames(link.handle(outgoing(1), 0.0))
    assert (post.n, post.consumes) == (0, (3,))


@pytest.mark.parametrize("dones", [0, 1000])
def test_a_link_can_send_every_message_that_it_accepts(link, dones):
    """A message within its own limit fits the frame with all other fields."""
    for seq in range(dones):
        link.handle(deliver((1 << 40) + seq), 0.0)
        link.handle(Publish(Done(seqs=((1 << 40) + seq,))), 0.0)
    room = MAX_HEADER_BYTES
    while True:
        event = outgoing(0, body={"x": bytes(room)})
        room -= 1
        try:
            encode_message(event.message)
        except WireError:
            continue
        break
    try:
        actions = link.handle(event, 0.0)
    except WireError:
        assert link.unacknowledged == 0
    else:
        for frame in frames(actions):
            encode_frame(frame)


def test_handled_messages_do_not_accumulate(link):
    """A node handles millions of messages; its link must not grow with them."""

    def size():
        return sum(len(each) for each in vars(link).values() if hasattr(each, "__len__"))

    sizes = []
    for start in (0, 1000, 2000):
        for seq in range(start, start + 1000):
            link.handle(deliver(seq), float(seq))
            link.handle(Publish(Done(seqs=(seq,))), float(seq))
            link.handle(Wake(), seq + 0.5)
            heard(link, Ack(upto=seq), now=seq + 0.6)
        sizes.append(size())
    assert sizes[2] < sizes[1] + 500
