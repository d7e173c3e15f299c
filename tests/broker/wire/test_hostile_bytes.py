"""Bytes from a hostile peer: at worst a WireError."""

import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.broker.errors import WireError
from fedmq.broker.wire.encoding import (
    decode_frame,
    decode_message,
)
from fedmq.broker.wire.schema import (
    MAX_HEADER_BYTES,
)
from tests.broker.wire.test_schema import ALL, encode


def read_and_expect_nothing_but_wire_errors(data):
    for decode in (decode_frame, decode_message):
        with contextlib.suppress(WireError):
            decode(data)


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=12))
    | st.builds(
        msgpack.Timestamp, st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 999999999)
    )
)
KEYS = (
    st.text(max_size=10)
    | st.integers(0, 99)
    | st.sampled_from(
        ["v", "kind", "body", "blobs", "seqs", "refused", "clients", "node", "message"]
    )
)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_at_worst_a_wire_error(data):
    read_and_expect_nothing_but_wire_errors(data)


@pytest.mark.slow
@settings(deadline=None)
@given(TREES)
def test_arbitrary_structures_are_at_worst_a_wire_error(tree):
    read_and_expect_nothing_but_wire_errors(msgpack.packb(tree))


@pytest.mark.slow
@settings(deadline=None)
@given(st.sampled_from(sorted(ALL)), st.dictionaries(KEYS, TREES, min_size=1, max_size=3))
def test_valid_headers_with_strange_fields_are_at_worst_a_wire_error(kind, strange):
    fields = msgpack.unpackb(encode(ALL[kind]), strict_map_key=False)
    names = sorted(fields)
    changed = {names[len(str(key)) % len(names)]: value for key, value in strange.items()}
    read_and_expect_nothing_but_wire_errors(msgpack.packb(fields | strange))
    read_and_expect_nothing_but_wire_errors(msgpack.packb(fields | changed))


@settings(deadline=None)
@given(st.sampled_from(sorted(ALL)), st.data())
def test_valid_headers_with_changed_bytes_are_at_worst_a_wire_error(kind, data):
    raw = bytearray(encode(ALL[kind]))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read_and_expect_nothing_but_wire_errors(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    read_and_expect_nothing_but_wire_errors(bytes(raw))


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1v", b"\x81\xa4body", b"\x81\xa1v\x91"])
def test_nesting_without_end_is_a_wire_error(opening):
    read_and_expect_nothing_but_wire_errors((opening * MAX_HEADER_BYTES)[:MAX_HEADER_BYTES])
