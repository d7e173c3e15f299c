"""Whatever bytes come in: none but the project's own errors, no memory that a header claims."""

import contextlib
import os
import struct
import tracemalloc

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.broker.ledger.entries import ChunkRecord
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.schema import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES
from tests.broker.ledger.payload import open_payload
from tests.fuzz.decoders import DECODERS, JOINED, OWN_ERRORS, READERS, join, split
from tests.fuzz.mutations import CLAIMS, spoil
from tests.fuzz.seeds import ALL, example, message

NAMES = sorted(DECODERS)


def room(data):
    """Return how much memory an input of this size may take, whatever it claims."""
    return (4 << 20) + 8 * len(data)


def open_files():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the files of this process


def check(name, data):
    """Decode; anything that is not an error of the project's own escapes."""
    before = open_files()
    tracemalloc.start()
    try:
        DECODERS[name](data)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken <= room(data), f"{taken} bytes of memory for {len(data)} bytes of {name}"
    assert open_files() == before, f"{name} leaves a file open"


def read_all(folder):
    return list(read_entries(folder))


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_that_a_fuzzer_starts_from_are_valid(name):
    assert ALL[name]
    for data in ALL[name]:
        READERS[name](data)


def test_the_pieces_of_an_input_come_back_whatever_lengths_they_claim():
    assert split(join(b"one", b"", b"two")) == [b"one", b"", b"two"]
    assert split(b"\xff\xff\xff\xffrest") == [b"rest"]
    assert split(b"") == split(b"\1\2\3") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(data=st.data())
def test_random_bytes(name, data):
    plain = st.binary(max_size=200)
    check(name, data.draw(plain | st.lists(plain, max_size=4).map(lambda all_: join(*all_))))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(data=st.data())
def test_almost_valid_inputs(name, data):
    rng = data.draw(st.randoms(use_true_random=False))
    first, second = (data.draw(st.sampled_from(ALL[name])) for _ in range(2))
    check(name, spoil(rng, first, second, pieces=name in JOINED))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frame", "message", "inline"])
@pytest.mark.parametrize("claim", CLAIMS, ids=bytes.hex)
def test_a_length_that_is_claimed_anywhere_in_a_header_takes_no_memory(name, claim):
    for data in ALL[name]:
        for at in range(0, len(data), 1 + len(data) // 40):
            check(name, data[:at] + claim + data[at + len(claim) :])
            check(name, data[:at] + claim)


@pytest.mark.parametrize("opening", [b"", b"\x81\xa1v", b"\x82\xa4kind\xa4beat\xa1x"])
@pytest.mark.parametrize(
    "size", [b"\xdd\x00\x00\xff\x00", b"\xdd\x00\x00\xbf\x00", b"\xdc\x0f\xff"]
)
def test_a_tower_of_lists_that_each_claim_a_whole_header_takes_no_memory(opening, size):
    for name, limit in (("frame", MAX_HEADER_BYTES), ("message", MAX_MESSAGE_BYTES)):
        check(name, (opening + size * 1000).ljust(limit, b"\0"))


@pytest.mark.parametrize("name", ["ledger", "follower"])
@pytest.mark.parametrize("lengths", [(1 << 32) - 1, 1 << 20, 1 << 17, 0])
def test_a_record_whose_checked_lengths_are_false_takes_no_memory(name, lengths):
    for pair in ((lengths, 0), (1, lengths), (lengths, lengths)):
        both = struct.pack("<II", *pair)
        prefix = both + struct.pack("<IQ", xxhash.xxh32_intdigest(both), 0)
        check(name, join(MAGIC + prefix + b"x" * 100, MAGIC + prefix + b"x" * 100, MAGIC))


@pytest.mark.parametrize("stray", ["messages-copy.log", "payload-.log", "messages-0.log"])
@pytest.mark.parametrize("use", [lambda folder: Ledger(folder).close(), open_payload, read_all])
def test_a_stray_file_beside_the_segments_is_told_or_left_alone(tmp_path, stray, use):
    (tmp_path / stray).write_bytes(MAGIC)
    with contextlib.suppress(*OWN_ERRORS):
        use(tmp_path)


LARGE = (0, 1, 1 << 20, (1 << 63) - 1, -1)


def pieces_of_a_blob(*pieces):
    """Return records of pieces, each (size, start, data), of the blob that entry 0 names."""
    blob = b"d" * 16
    note = message(blobs=({"digest": blob, "size": 6},))
    entry = {"kind": "accepted", "seq": 0, "at": 0.0, "message": msgspec.msgpack.encode(note)}
    parts = []
    for size, start, data in pieces:
        fields = {"run": note.run, "owner": note.sender, "digest": blob}
        head = msgspec.structs.replace(example(ChunkRecord), **fields, size=size, start=start)
        parts += [msgspec.msgpack.encode(head), data]
    return join(msgspec.msgpack.encode(entry), b"", *parts)


@pytest.mark.slow
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("start", LARGE)
def test_a_piece_that_claims_to_be_of_a_large_blob_takes_no_memory(size, start):
    check("records", pieces_of_a_blob((size, start, b"data")))
    check("records", pieces_of_a_blob((size, 0, b"data"), (size, 4, b"")))


@pytest.mark.parametrize("lengths", [(1, 5), (5, 1), (1, 4, 1), (3, 2, 1), (1, 1, 4)])
def test_pieces_of_unequal_lengths_are_read_or_refused(lengths):
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    whole = [
        (6, start, b"abcdef"[start : start + n]) for start, n in zip(starts, lengths, strict=True)
    ]
    check("records", pieces_of_a_blob(*whole))


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 3000,
        "a = " + "[" * 300 + "]" * 300,
        "a." * 1500 + "b = 1",
        "problem." + "a." * 1500 + "b = 1",
        "a = " + "1" * 5000,
        "[worker]\ncount = 0x" + "f" * 5000,
        "[broker]\nlease_s = 0x" + "f" * 5000,
        "[codec]\nup = 0x" + "f" * 5000,
        "[worker]\ncount = nan\n[broker]\nlease_s = -inf",
        '[problem]\nname = "none"',
        "[problem]\nname = 1979-05-27T07:32:00Z",
        '"" = 1',
    ],
    ids=lambda text: text[:24],
)
def test_a_configuration_that_is_deep_or_long_is_at_worst_a_config_error(text):
    check("config", text.encode())


def test_a_configuration_of_many_dots_takes_no_memory_and_no_time():
    """TOML parsers take the square of a key's length, of both."""
    check("config", b"a." * 10_000 + b"b = 1")


@pytest.mark.parametrize(
    "text",
    ["cast(0x" + "f" * 5000 + ")", "raw(" + "(" * 500, "cast(" + "-" * 5000 + "1)", "cast(\0)"],
)
def test_a_spec_that_is_deep_or_long_is_at_worst_a_spec_error(text):
    check("spec", text.encode())
