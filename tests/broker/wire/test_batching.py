"""Small frames travel as one message and arrive unchanged."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.broker.errors import WireError
from fedmq.broker.wire.batching import Outbox
from fedmq.broker.wire.encoding import (
    encode_frame,
    join_headers,
    split_header,
)
from fedmq.broker.wire.schema import (
    INLINE_BYTES,
    MAX_BUFFERS,
    MAX_HEADER_BYTES,
    Goodbye,
    Heartbeat,
)


def emptied(outbox):
    messages = []
    while outbox:
        messages.append(outbox.next())
        outbox.sent()
    return messages


def taken_apart(messages):
    """Return the frames of messages, each with its buffers."""
    frames = []
    for header, *buffers in messages:
        for each, count in split_header(header):
            count = len(buffers) if count < 0 else count
            frames.append((each, buffers[:count]))
            buffers = buffers[count:]
        assert not buffers
    return frames


def test_a_frame_alone_travels_as_it_is():
    outbox = Outbox()
    assert not outbox
    outbox.add(encode_frame(Heartbeat()), [b"x"])
    assert emptied(outbox) == [[encode_frame(Heartbeat()), b"x"]]
    assert not outbox


def test_small_frames_travel_together_until_the_first_is_sent():
    outbox = Outbox()
    for number in range(5):
        outbox.add(encode_frame(Heartbeat(taken=number)), [b"%d" % number] * number)
    first = outbox.next()
    outbox.add(encode_frame(Goodbye()))
    assert outbox.next() is first
    messages = emptied(outbox)
    assert len(messages) == 2
    assert taken_apart(messages)[3] == (encode_frame(Heartbeat(taken=3)), [b"3"] * 3)
    assert taken_apart(messages)[5] == (encode_frame(Goodbye()), [])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3000) | st.integers(1, MAX_HEADER_BYTES),
            st.lists(st.integers(0, 100) | st.integers(0, INLINE_BYTES * 2), max_size=4),
        ),
        max_size=40,
    )
)
def test_all_frames_come_out_in_order_and_within_the_limits(sizes):
    outbox, frames = Outbox(), []
    for number, (size, lengths) in enumerate(sizes):
        header = encode_frame(Goodbye(reason=f"{number}")).ljust(size, b"\0")[:MAX_HEADER_BYTES]
        buffers = [bytes([number % 256]) * length for length in lengths]
        frames.append((header, buffers))
        outbox.add(header, buffers)
    messages = emptied(outbox)
    assert taken_apart(messages) == frames
    for header, *buffers in messages:
        assert len(header) <= MAX_HEADER_BYTES
        assert len(buffers) <= MAX_BUFFERS


def test_many_buffers_are_spread_over_messages():
    outbox = Outbox()
    for _ in range(5):
        outbox.add(encode_frame(Heartbeat()), [b"x"] * (MAX_BUFFERS // 2))
    assert [len(message) - 1 for message in emptied(outbox)] == [MAX_BUFFERS, MAX_BUFFERS, 32]


@pytest.mark.parametrize(
    "header",
    [b"\x90", b"\x91\x01", b"\x91\x92\xc4\x01x", b"\xdc\xff\xff", b"\x91" * 1000],
    ids=["no frames", "a number", "no count", "cut short", "deep"],
)
def test_an_invalid_list_of_frames_is_a_wire_error(header):
    with pytest.raises(WireError):
        split_header(header)


def test_a_list_over_the_limit_is_not_read():
    header = join_headers([(bytes(1000), 0)] * 70)
    with pytest.raises(WireError, match=f"at most {MAX_HEADER_BYTES}"):
        split_header(header)
