from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.broker.wire import chunked_transfer
from fedmq.broker.wire.chunked_transfer import WINDOW_CHUNKS, Fetcher, Owned
from fedmq.broker.wire.schema import Blob, Chunk

CHUNK = 8
"""Bytes of a chunk in these tests."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_transfer, "CHUNK_BYTES", CHUNK)


def blob_of(size, seed=1):
    return bytes((seed * 31 + i * 7) % 251 for i in range(size))


def name_of(data, owner="agg"):
    return Owned(owner, Blob.of(data).digest)


def fetching(*blobs, window=WINDOW_CHUNKS):
    fetcher = Fetcher(window)
    for data in blobs:
        fetcher.add("agg", Blob.of(data))
    return fetcher


def answer(want, *blobs):
    data = next(each for each in blobs if Blob.of(each).digest == want.digest)
    piece = data[want.start : want.start + want.size]
    return Chunk(owner=want.owner, digest=want.digest, start=want.start), piece


def starts(wants):
    return [want.start for want in wants]


def test_no_more_than_a_window_is_ever_in_flight():
    data = blob_of(CHUNK * 10)
    fetcher = fetching(data)
    under_way = deque(fetcher.requests())
    assert len(under_way) == WINDOW_CHUNKS
    assert fetcher.requests() == []
    while under_way:
        assert fetcher.receive(*answer(under_way.popleft(), data))
        under_way += fetcher.requests()
        assert len(under_way) <= WINDOW_CHUNKS
    assert fetcher.check_complete(name_of(data)) is True


def test_blobs_come_whole_and_in_the_order_in_which_they_were_added():
    first, second = blob_of(CHUNK * 2 + 3), blob_of(CHUNK + 1, seed=2)
    fetcher = fetching(first, second, first)
    wants = fetcher.requests()
    assert [want.digest for want in wants] == [name_of(first).digest] * 3 + [name_of(second).digest]
    assert [(want.start, want.size) for want in wants[:3]] == [(0, 8), (8, 8), (16, 3)]
    pieces = [fetcher.receive(*answer(want, first, second)) for want in wants]
    assert b"".join(piece.data for piece in pieces[:3]) == first
    assert {piece.size for piece in pieces[:3]} == {len(first)}
    assert fetcher.check_complete(name_of(first)) is True
    assert fetcher.check_complete(name_of(second)) is None
    assert name_of(first) not in fetcher
    assert name_of(second) in fetcher


def test_the_same_digest_of_two_owners_is_two_blobs():
    data = blob_of(4)
    fetcher = fetching(data)
    fetcher.add("w1", Blob.of(data))
    assert [want.owner for want in fetcher.requests()] == ["agg", "w1"]


@pytest.mark.parametrize("start", [0, CHUNK * 2, CHUNK * 5, 3])
def test_chunks_that_are_not_next_are_ignored(start):
    data = blob_of(CHUNK * 6)
    fetcher = fetching(data, window=4)
    first = fetcher.requests()[0]
    assert fetcher.receive(*answer(first, data))
    chunk = Chunk(owner="agg", digest=first.digest, start=start)
    assert fetcher.receive(chunk, data[start : start + CHUNK]) is None
    assert starts(fetcher.requests()) == [CHUNK * 4]


def test_an_unrequested_chunk_is_ignored():
    data = blob_of(CHUNK * 3)
    fetcher = fetching(data)
    chunk = Chunk(owner="agg", digest=name_of(data).digest, start=0)
    assert fetcher.receive(chunk, data[:CHUNK]) is None  # not asked for yet
    assert fetcher.receive(Chunk(owner="w1", digest=chunk.digest, start=0), data[:CHUNK]) is None
    assert len(fetcher.requests()) == 3


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK + 1])
def test_a_chunk_of_another_size_than_asked_is_ignored(size):
    data = blob_of(CHUNK * 2)
    fetcher = fetching(data)
    first = fetcher.requests()[0]
    chunk = Chunk(owner="agg", digest=first.digest, start=0)
    assert fetcher.receive(chunk, data[:size]) is None
    assert fetcher.receive(chunk, memoryview(data)[:CHUNK])


def test_wrong_bytes_are_detected_by_their_digest():
    data = blob_of(CHUNK * 2 + 1)
    fetcher = fetching(data)
    for want in fetcher.requests():
        chunk, piece = answer(want, data)
        assert fetcher.receive(chunk, bytes(len(piece)) if want.start else piece)
    assert fetcher.check_complete(name_of(data)) is False
    assert name_of(data) not in fetcher


def test_after_a_restart_only_what_is_missing_is_requested_again():
    data = blob_of(CHUNK * 7)
    fetcher = fetching(data)
    under_way = fetcher.requests()
    for want in under_way[:2]:
        fetcher.receive(*answer(want, data))
    fetcher.restart()
    again = fetcher.requests()
    assert starts(again) == [CHUNK * n for n in (2, 3, 4, 5)]
    # One from before the restart comes late; its twin is ignored then.
    assert fetcher.receive(*answer(under_way[2], data))
    assert fetcher.receive(*answer(again[0], data)) is None
    for want in again[1:] + fetcher.requests():
        assert fetcher.receive(*answer(want, data))
    assert fetcher.check_complete(name_of(data)) is True


def test_discarding_a_blob_frees_its_part_of_the_window():
    first, second = blob_of(CHUNK * 9), blob_of(CHUNK * 9, seed=2)
    fetcher = fetching(first, second)
    wants = fetcher.requests()
    fetcher.receive(*answer(wants[0], first))
    fetcher.discard(name_of(first))
    fetcher.discard(name_of(first))
    assert fetcher.receive(*answer(wants[1], first)) is None
    again = fetcher.requests()
    assert starts(again) == [0, CHUNK, CHUNK * 2, CHUNK * 3]
    assert {want.digest for want in again} == {name_of(second).digest}


def test_an_empty_blob_is_finished_at_once():
    fetcher = fetching(b"")
    assert fetcher.requests() == []
    assert fetcher.check_complete(name_of(b"")) is True


@settings(deadline=None)
@given(
    st.lists(st.integers(1, CHUNK * 6), min_size=1, max_size=5),
    st.integers(1, 6),
    st.data(),
)
def test_blobs_of_any_size_arrive_whole_whatever_restarts_and_repeats(sizes, window, data):
    blobs = [blob_of(size, seed) for seed, size in enumerate(sizes)]
    fetcher = fetching(*blobs, window=window)
    got = {name_of(each): bytearray() for each in blobs}
    line = deque(fetcher.requests())
    restarts = 3
    while line:
        assert len(line) <= window
        want = line.popleft()
        chunk, piece = answer(want, *blobs)
        came = fetcher.receive(chunk, piece)
        assert came is not None
        got[came.name] += came.data
        assert fetcher.receive(chunk, piece) is None
        fetcher.check_complete(came.name)
        if restarts and data.draw(st.booleans()):
            restarts -= 1
            fetcher.restart()
            line.clear()
        line += fetcher.requests()
    assert {bytes(each) for each in got.values()} == set(blobs)
    assert not any(name in fetcher for name in got)
