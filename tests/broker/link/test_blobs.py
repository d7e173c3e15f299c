import pytest

from fedmq.broker.link.events import ChunkStreamed, Fetch, Fetched, Leave, More, Send
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    POST_BYTES,
    Ack,
    Blob,
    Chunk,
    ChunkRequest,
    UnknownSession,
    digest,
)
from tests.broker.links import WELCOME, frames, heard, outgoing, welcomed


@pytest.fixture
def link():
    return welcomed()


def test_small_blobs_travel_with_the_first_post_that_names_them(link):
    first, second = link.handle(outgoing(0, b"model", b"own"), 0.0) + link.handle(
        outgoing(1, b"model", b"other"), 0.0
    )
    assert (first.frame.inline, first.buffers) == ((0, 1), [b"model", b"own"])
    assert (second.frame.inline, second.buffers) == ((1,), [b"other"])


def test_blobs_are_served_until_their_last_post_is_acknowledged(link):
    data = bytes(range(256)) * (POST_BYTES // 256 + 1)
    for number in range(2):
        [sent] = link.handle(outgoing(number, data), 0.0)
        assert (sent.frame.inline, sent.buffers) == ((), [])
    want = ChunkRequest(owner="w1", digest=digest(data), start=256, size=300)
    reply = Chunk(owner="w1", digest=digest(data), start=256)
    for receipt in (None, 0):
        if receipt is not None:
            heard(link, Ack(upto=receipt))
        [sent] = heard(link, want)
        assert (sent.frame, bytes(sent.buffers[0])) == (reply, data[256:556])
    heard(link, Ack(upto=1))
    assert heard(link, want) == [Send(reply, ())]


def test_only_its_own_blobs_and_only_what_there_is_of_them_are_served(link):
    link.handle(outgoing(0, b"abc"), 0.0)
    for want in (
        ChunkRequest(owner="w2", digest=digest(b"abc"), start=0, size=3),
        ChunkRequest(owner="w1", digest=digest(b"xyz"), start=0, size=3),
        ChunkRequest(owner="w1", digest=digest(b"abc"), start=1, size=3),
    ):
        [sent] = heard(link, want)
        assert sent.buffers == ()


def serve(link, actions, data, now=0.0):
    """Answer a link's requests from these bytes; return the actions that are not a Send."""
    others = []
    queue = list(actions)
    while queue:
        action = queue.pop(0)
        if isinstance(action, Send) and isinstance(action.frame, ChunkRequest):
            want = action.frame
            piece = data[want.start : want.start + want.size]
            queue += heard(
                link, Chunk(owner=want.owner, digest=want.digest, start=want.start), piece, now=now
            )
        else:
            others.append(action)
    return others


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 6 * CHUNK_BYTES + 7])
def test_a_fetch_assembles_the_chunks(link, size):
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    blob = Blob.of(data)
    actions = link.handle(Fetch("agg", blob), 0.0)
    assert link.handle(Fetch("agg", blob), 0.0) == []
    assert len(actions) == min(4, -(-size // CHUNK_BYTES))
    [fetched] = serve(link, actions, data)
    assert (fetched.owner, fetched.blob, bytes(fetched.data)) == ("agg", blob, data)


def test_an_empty_blob_is_fetched_without_asking(link):
    assert link.handle(Fetch("agg", Blob.of(b"")), 0.0) == [Fetched("agg", Blob.of(b""), b"")]


def test_a_fetch_of_a_missing_or_wrong_blob_yields_none(link):
    blob = Blob.of(b"right")
    link.handle(Fetch("agg", blob), 0.0)
    chunk = Chunk(owner="agg", digest=blob.digest, start=0)
    assert heard(link, chunk) == [Fetched("agg", blob, None)]
    link.handle(Fetch("agg", blob), 0.0)
    assert heard(link, chunk, b"wrong") == [Fetched("agg", blob, None)]
    [fetched] = serve(link, link.handle(Fetch("agg", blob), 0.0), b"right")
    assert bytes(fetched.data) == b"right"


def test_a_fetch_continues_after_a_reconnect_from_where_it_was(link):
    data = bytes(6 * CHUNK_BYTES)
    blob = Blob.of(data)
    link.handle(Fetch("agg", blob), 0.0)
    for start in (0, CHUNK_BYTES):
        chunk = Chunk(owner="agg", digest=blob.digest, start=start)
        heard(link, chunk, data[:CHUNK_BYTES])
    heard(link, UnknownSession(), now=0.1)
    actions = heard(link, WELCOME, now=0.2)
    assert [want.start // CHUNK_BYTES for want in frames(actions, ChunkRequest)] == [2, 3, 4, 5]
    [fetched] = serve(link, actions, data)
    assert bytes(fetched.data) == data


# ---- in pieces


def asked(actions):
    return [want.start // CHUNK_BYTES for want in frames(actions, ChunkRequest)]


def test_a_blob_in_chunks_comes_in_order_and_no_further_than_it_is_read(link):
    """A model larger than memory: unread chunks count against the window, too."""
    data = bytes(range(256)) * 4096 * 9 + b"the end"
    blob = Blob.of(data)
    assert asked(link.handle(Fetch("agg", blob, in_pieces=True), 0.0)) == [0, 1, 2, 3]
    came = []
    for number in range(4):
        start = number * CHUNK_BYTES
        chunk = Chunk(owner="agg", digest=blob.digest, start=start)
        actions = heard(link, chunk, data[start : start + CHUNK_BYTES])
        came += [each.data for each in actions if isinstance(each, ChunkStreamed)]
        assert asked(actions) == []
    assert b"".join(bytes(each) for each in came) == data[: 4 * CHUNK_BYTES]
    for number in range(4, 10):
        assert asked(link.handle(More(), 0.0)) == [number]
        start = number * CHUNK_BYTES
        chunk = Chunk(owner="agg", digest=blob.digest, start=start)
        actions = heard(link, chunk, data[start : start + CHUNK_BYTES])
        came += [each.data for each in actions if isinstance(each, ChunkStreamed)]
        assert asked(actions) == []
    assert b"".join(bytes(each) for each in came) == data
    [fetched] = [each for each in actions if isinstance(each, Fetched)]
    assert fetched.data is not None


def test_wrong_streamed_bytes_are_reported_after_the_last_chunk(link):
    blob = Blob.of(b"right")
    link.handle(Fetch("agg", blob, in_pieces=True), 0.0)
    actions = heard(link, Chunk(owner="agg", digest=blob.digest, start=0), b"wrong")
    assert [type(each) for each in actions] == [ChunkStreamed, Fetched]
    assert actions[-1].data is None


def test_a_half_read_blob_is_not_requested_any_more(link):
    data = bytes(9 * CHUNK_BYTES)
    blob = Blob.of(data)
    link.handle(Fetch("agg", blob, in_pieces=True), 0.0)
    heard(link, Chunk(owner="agg", digest=blob.digest, start=0), data[:CHUNK_BYTES])
    assert link.handle(Leave("agg", blob), 0.0) == []
    late = Chunk(owner="agg", digest=blob.digest, start=CHUNK_BYTES)
    assert heard(link, late, data[:CHUNK_BYTES]) == []
    assert asked(link.handle(Fetch("agg", blob), 0.0)) == [0, 1, 2, 3]
