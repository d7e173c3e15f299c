"""The wire format: golden bytes of every version, limits, and inline blobs."""

import json
import typing
from pathlib import Path

import msgpack
import msgspec
import pytest

from fedmq.broker.errors import VersionError, WireError
from fedmq.broker.rejections import Code
from fedmq.broker.wire.encoding import (
    check_inline,
    decode_frame,
    decode_message,
    encode_frame,
    encode_message,
    inline_choice,
)
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    INLINE_BYTES,
    MAX_BUFFERS,
    MAX_HEADER_BYTES,
    PROTOCOL,
    Ack,
    AnyFrame,
    Blob,
    Chunk,
    ChunkRequest,
    Deliver,
    DeliverAll,
    Done,
    Enroll,
    Enrolled,
    Frame,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    NumberedFrame,
    Post,
    PostAll,
    Reject,
    RunEnded,
    StorageFull,
    UnknownSession,
    Wait,
    Welcome,
    digest,
    kind_of,
)

GOLDEN = Path(__file__).parents[2] / "golden"

MESSAGE = Message(
    kind="result",
    id="w1/s1/7",
    run="run-a",
    sender="w1",
    to="aggregator",
    re="agg/s0/3",
    body={"model_version": 12, "n": 600, "codec": "quantize@1(bits=2)", "loss": 0.5},
    blobs=(Blob(bytes(range(16)), 4096),),
)


FRAMES = {
    "hello": Hello(
        node="w1",
        role="worker",
        session="s1",
        key="9f",
        first=3,
        got=70001,
        run="run-a",
        clients=((0, 9), (20, 29)),
    ),
    "welcome": Welcome(
        run="run-a",
        beat_s=1.0,
        lease_s=10.0,
        config="[run]\n",
        checkpoint=Deliver(seq=69000, at=1700000000.0, message=b"\x81\xa1a\x02"),
        ledger="/runs/a/ledger",
        proof="5e1f",
        identity="0123456789abcdef",
    ),
    "reject": Reject(code="name", reason="a node named 'w1' is already connected"),
    "stranger": UnknownSession(),
    "wait": Wait(reason="no run has started yet"),
    "post": Post(
        n=7, taken=70001, read=1 << 20, message=b"\x81\xa1a\x01", inline=(0, 2), consumes=(3, 70000)
    ),
    "postall": PostAll(n=8, taken=70001, read=1 << 20, messages=(bytes(range(40)), bytes(32))),
    "receipt": Ack(upto=7),
    "full": StorageFull(reason="cannot write: No space left on device"),
    "deliver": Deliver(
        seq=70000,
        at=1700000000.25,
        message=b"\x81\xa1a\x01",
        inline=(0,),
        after=69001,
        extents={2: ((3, 4096, 1 << 20), (4, 16, 5))},
    ),
    "deliverall": DeliverAll(
        at=1700000000.25,
        messages=((70000, b"\x81\xa1a\x01"), (70002, b"\x80")),
        after=69001,
    ),
    "done": Done(
        n=8, taken=70001, read=1 << 20, seqs=(1, 2, 70000), refused={3: "of another shape"}
    ),
    "want": ChunkRequest(owner="aggregator", digest=bytes(range(16)), start=1 << 20, size=1 << 20),
    "chunk": Chunk(owner="aggregator", digest=bytes(range(16)), start=1 << 20),
    "beat": Heartbeat(taken=70001, sent=70002),
    "over": RunEnded(n=9, taken=70001, read=1 << 20, reason="reached 100 versions"),
    "bye": Goodbye(reason="stopped"),
    "enroll": Enroll(key="rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"),
    "enrolled": Enrolled(key="rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"),
}
SINCE_1_3 = {"enroll", "enrolled"}
ALL = {**FRAMES, "message": MESSAGE}
UNTIL_1_0 = {
    "reject": {"protocol": (1, 0)},
    "welcome": {"ledger": "", "proof": "", "identity": ""},
    "deliver": {"extents": {}},
    "post": {"read": 0},
    "done": {"read": 0},
    "over": {"read": 0},
}
UNTIL_1_1 = {"reject": {"protocol": (1, 1)}, "welcome": {"identity": ""}}
UNTIL_1_2 = {"reject": {"protocol": (1, 2)}, "welcome": {"identity": ""}}
OLDER = {(1, 0): UNTIL_1_0, (1, 1): UNTIL_1_1, (1, 2): UNTIL_1_2}
"""By version and frame: the fields that differ in its golden bytes, with their values."""


def golden(version=PROTOCOL):
    return json.loads((GOLDEN / f"wire-{version[0]}.{version[1]}.json").read_text())


def encode(value):
    return encode_message(value) if isinstance(value, Message) else encode_frame(value)


def header(**fields):
    return msgpack.packb(fields)


def test_every_kind_of_frame_has_an_example_and_golden_bytes():
    roots = Frame.__subclasses__() + NumberedFrame.__subclasses__()
    kinds = {kind_of(kind) for kind in roots if kind is not NumberedFrame}
    assert kinds == set(FRAMES)
    assert kinds == {kind_of(kind) for kind in typing.get_args(AnyFrame)}
    assert set(golden()) == kinds | {"message"}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_survives_encoding(kind):
    frame = FRAMES[kind]
    assert decode_frame(encode_frame(frame)) == frame
    assert type(decode_frame(memoryview(encode_frame(frame)))) is type(frame)


def test_a_rejection_carries_a_code_only_if_it_has_one():
    """Without a code, the bytes are those of older versions; an unknown code is accepted."""
    assert b"codes" not in encode_frame(Done(n=8, refused={3: "of another shape"}))
    for code in (Code.WRONG_SHAPE, "of-tomorrow"):
        frame = decode_frame(encode_frame(Done.rejecting(3, "of another shape", code, (3,))))
        assert frame.code_of(3) == code
        assert frame.code_of(4) == ""
        assert (frame.seqs, frame.refused) == ((3,), {3: "of another shape"})
    assert Done.rejecting(3, "why", "") == Done(refused={3: "why"})
    with pytest.raises(WireError):
        decode_frame(encode_frame(Done(refused={3: "why"}, codes={3: "x" * 41})))


def test_a_message_survives_encoding():
    assert decode_message(encode_message(MESSAGE)) == MESSAGE


@pytest.mark.parametrize("kind", ALL)
def test_today_s_encoder_writes_the_golden_bytes(kind):
    """A change of these bytes needs a new version, and a new file beside the old ones."""
    assert encode(ALL[kind]).hex() == golden()[kind]


@pytest.mark.parametrize("version", OLDER, ids=str)
def test_the_golden_bytes_of_older_versions_are_read(version):
    for kind, data in golden(version).items():
        data = bytes.fromhex(data)
        if kind == "message":
            assert decode_message(data) == MESSAGE
            continue
        older = {"v": version, **OLDER[version].get(kind, {})}
        if kind == "welcome":
            older["checkpoint"] = msgspec.structs.replace(FRAMES[kind].checkpoint, v=version)
        assert decode_frame(data) == msgspec.structs.replace(FRAMES[kind], **older)


def test_unknown_fields_are_ignored():
    assert (
        decode_frame(header(kind="beat", v=[*PROTOCOL], mood="good", at={"x": [1]})) == Heartbeat()
    )
    fields = msgpack.unpackb(encode_message(MESSAGE))
    assert decode_message(msgpack.packb({**fields, "later": [None]})) == MESSAGE


def test_a_header_may_leave_out_what_has_a_default():
    assert decode_frame(header(kind="over")) == RunEnded()


def test_another_minor_version_is_accepted():
    frame = decode_frame(header(kind="receipt", v=[PROTOCOL[0], 99], upto=3))
    assert frame == Ack(upto=3, v=(PROTOCOL[0], 99))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "beat", "v": [2, 5]},
        {"kind": "hello", "v": [2, 5], "node": 17},
        {"kind": "greeting", "v": [2, 5]},
        {"v": [2, 5]},
    ],
    ids=["known frame", "changed field", "unknown kind", "no kind"],
)
def test_another_major_version_is_not_garbage_and_names_both_versions(fields):
    with pytest.raises(VersionError, match=r"expected protocol 1\.x, got 2\.5") as caught:
        decode_frame(header(**fields))
    assert caught.value.theirs == (2, 5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "greeting"},
        {"kind": "beat", "v": [1]},
        {"kind": "beat", "v": "1.0"},
        {"kind": "hello", "node": "", "role": "worker", "session": "s"},
        {"kind": "receipt", "upto": -1},
        {"kind": "welcome", "run": "r", "beat_s": 1, "lease_s": 1, "identity": "../x"},
        {"kind": "welcome", "run": "r", "beat_s": 1, "lease_s": 1, "identity": "0a\n"},
        {"kind": "welcome", "run": "r", "beat_s": 1, "lease_s": 1, "identity": "0" * 65},
        {"kind": "receipt", "upto": 1 << 63},
        {"kind": "want", "owner": "a", "digest": b"short", "start": 0, "size": 1},
        {"kind": "want", "owner": "a", "digest": bytes(16), "start": 0, "size": 0},
        {"kind": "want", "owner": "a", "digest": bytes(16), "start": 0, "size": CHUNK_BYTES + 1},
        {"kind": "beat", "taken": -1},
        {"kind": "hello", "node": "w", "role": "worker", "session": "s", "key": "k" * 65},
        {"kind": "full", "reason": "x" * 2001},
        {"kind": "welcome", "run": "r", "beat_s": 1.0, "lease_s": 1.0, "checkpoint": {"seq": 1}},
    ],
)
def test_a_field_out_of_its_bounds_is_a_wire_error(fields):
    with pytest.raises(WireError):
        decode_frame(header(**fields))


def test_a_header_over_the_limit_is_neither_written_nor_read():
    empty = len(encode_frame(RunEnded(reason="")))
    with pytest.raises(WireError, match=f"at most {MAX_HEADER_BYTES} bytes"):
        encode_frame(RunEnded(reason="x" * MAX_HEADER_BYTES))
    with pytest.raises(WireError, match="expected a result of at most"):
        encode_message(
            Message(
                kind="result",
                id="i",
                run="r",
                sender="s",
                to="record",
                body={"x": "y" * MAX_HEADER_BYTES},
            )
        )
    padded = header(kind="beat", padding=bytes(MAX_HEADER_BYTES))
    with pytest.raises(WireError, match=f"at most {MAX_HEADER_BYTES} bytes, got {len(padded)}"):
        decode_frame(padded)
    with pytest.raises(WireError):
        decode_message(padded)
    # The largest header that is allowed passes both ways.
    room = MAX_HEADER_BYTES - empty - 2  # a long string's length takes two bytes more
    config = Welcome(run="r", beat_s=1.0, lease_s=1.0, config="")
    longest = "x" * (room - (len(encode_frame(config)) - empty))
    whole = Welcome(run="r", beat_s=1.0, lease_s=1.0, config=longest)
    assert len(encode_frame(whole)) == MAX_HEADER_BYTES
    assert decode_frame(encode_frame(whole)) == whole


def test_any_message_that_can_be_encoded_can_be_posted_and_delivered():
    """A message of the largest size must fit its frames, at the node and at the broker."""
    room = MAX_HEADER_BYTES
    while True:
        body = {"x": bytes(room)}
        message = Message(kind="m", id="i", run="r", sender="s", to="record", body=body)
        try:
            data = encode_message(message)
            break
        except WireError:
            room -= 1
    encode_frame(Post(n=1 << 62, message=data, consumes=(1 << 62,) * 1000))
    encode_frame(Deliver(seq=1 << 62, at=1.7e9, message=data, inline=tuple(range(MAX_BUFFERS))))


def test_a_message_with_too_many_blobs_is_refused():
    fields = msgpack.unpackb(encode_message(MESSAGE))
    fields["blobs"] *= MAX_BUFFERS
    assert len(decode_message(msgpack.packb(fields)).blobs) == MAX_BUFFERS
    fields["blobs"].append(fields["blobs"][0])
    with pytest.raises(WireError, match=f"at most {MAX_BUFFERS} blobs, got {MAX_BUFFERS + 1}"):
        decode_message(msgpack.packb(fields))


@pytest.mark.parametrize("body", [{"f": print}, {"n": 1 << 70}, {"s": "\ud800"}])
def test_what_msgpack_cannot_hold_is_a_wire_error(body):
    with pytest.raises(WireError, match="cannot encode"):
        encode_message(Message(kind="k", id="i", run="r", sender="s", to="record", body=body))


def test_a_digest_is_16_bytes_of_xxh3_whatever_holds_the_data():
    assert digest(b"fedmq").hex() == digest(memoryview(bytearray(b"fedmq"))).hex()
    assert digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert Blob.of(memoryview(b"12345678").cast("d")) == Blob(digest(b"12345678"), 8)


def test_valid_inline_buffers_pass():
    blobs = [Blob.of(b"one"), Blob.of(b"two"), Blob.of(b"")]
    check_inline(blobs, [], [], 6)
    check_inline(blobs, [1, 2], [b"two", memoryview(b"")], 6)


@pytest.mark.parametrize(
    ("inline", "buffers", "message"),
    [
        ([0], [], "expected 1 buffers with the message, got 0"),
        ([], [b"one"], "expected 0 buffers with the message, got 1"),
        ([2], [b"one"], "expected an inline blob from 0 to 1, got 2"),
        ([0], [b"two"], "inline blob 0 do not match its size and digest"),
        ([1], [b"two!"], "inline blob 1 do not match its size and digest"),
        ([0], [bytes(101)], "expected at most 100 bytes of blobs with a message"),
    ],
)
def test_invalid_inline_buffers_are_an_error(inline, buffers, message):
    with pytest.raises(WireError, match=message):
        check_inline([Blob.of(b"one"), Blob.of(b"two")], inline, buffers, 100)


def test_blobs_travel_inline_while_there_is_room_for_all_of_them():
    def chosen(*sizes):
        return inline_choice([Blob(bytes(16), size) for size in sizes], INLINE_BYTES)

    assert chosen() == ()
    assert chosen(0, INLINE_BYTES, 0) == (0, 1, 2)
    assert chosen(INLINE_BYTES + 1) == ()
    assert chosen(INLINE_BYTES, 1) == (0,)
    assert chosen(INLINE_BYTES + 1, 10, INLINE_BYTES, INLINE_BYTES - 10) == (1, 3)
