"""Blobs read from the ledger's files, on the broker's host only."""

import os
import shutil
import threading

import pytest

from fedmq.broker import blob_locations
from fedmq.broker.core.events import SendTo
from fedmq.broker.errors import WireError
from fedmq.broker.ledger import blob_store
from fedmq.broker.ledger.entries import PAYLOAD, BlobName, segment_path
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.link.local_blobs import LocalBlobs
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import LedgerSettings
from fedmq.broker.wire.encoding import encode_frame, encode_message
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    MAX_BUFFERS,
    MAX_EXTENTS,
    MAX_MESSAGE_BYTES,
    Blob,
    Deliver,
    Message,
    Welcome,
)
from tests.broker.loops import AGGREGATOR, ANY, WORKER, get, linked, message

SIZE = 3 * CHUNK_BYTES + 11
READ = {
    "whole": lambda task: task.read(0),
    "in pieces": lambda task: b"".join(task.chunks(0)),
}


def served(folder, read=READ["whole"], after_task=lambda: None, *, share=True):
    """Send one blob to a worker over real sockets; return how it came, and the last entry.

    How: the pieces that the worker read in place, and the bytes that the broker counted for it.
    """
    found = []
    fill = LocalBlobs._fill

    def noted(self, place, piece):
        if done := fill(self, place, piece):
            found.append(place)
        return done

    server = BrokerServer(ANY, folder, ledger_settings=LedgerSettings(share_files=share))
    thread = threading.Thread(target=server.serve)
    thread.start()
    weights = os.urandom(SIZE)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            linked(server.endpoint, AGGREGATOR) as agg,
            linked(server.endpoint, WORKER) as worker,
        ):
            patch.setattr(LocalBlobs, "_fill", noted)
            agg.post(message("agg", "client/3", weights), [weights])
            with agg.away():
                task = get(worker)
                after_task()
                assert bytes(read(task)) == weights
            with worker.away():
                worker.post(message("w1", "aggregator"), consumes=(task.seq,))
                worker.flush()
            agg.over("done")
            agg.flush()
    finally:
        server.stop()
        thread.join(10)
    return found, list(read_entries(folder))[-1].nodes["w1"]["sent_bytes"]


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", READ)
def test_a_node_on_the_broker_s_host_reads_large_blobs_from_the_files(tmp_path, how):
    found, _ = served(tmp_path, READ[how])
    assert sum(size for *_, size in found) == SIZE


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", READ)
def test_bytes_that_were_read_in_place_count_like_those_that_were_sent(tmp_path, how):
    _, in_place = served(tmp_path / "a", READ[how])
    found, over_the_socket = served(tmp_path / "b", READ[how], share=False)
    assert not found
    assert SIZE < in_place < SIZE + 3000
    assert abs(in_place - over_the_socket) < 1000


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", READ)
@pytest.mark.parametrize("readable", [0, 2])
def test_an_unreadable_file_costs_a_request_not_the_blob(tmp_path, monkeypatch, how, readable):
    """Also from the middle of a blob, after some chunks were read."""
    calls = iter(range(100))
    fill = LocalBlobs._fill

    def some(self, place, piece):
        if next(calls) == readable:
            self.close()
        return fill(self, place, piece)

    monkeypatch.setattr(LocalBlobs, "_fill", some)
    found, _ = served(tmp_path, READ[how])
    assert len(found) == readable


def whole(files, blob, places):
    """Return the blob's bytes, or None if they are incomplete."""
    data = b"".join(files.chunks(blob, places))
    return data if len(data) == blob.size else None


def welcome(ledger):
    return Welcome(run="r", beat_s=1.0, lease_s=1.0, ledger=str(ledger.folder), proof=ledger.proof)


def kept(folder, *pieces):
    """Return a ledger with one blob in it, and the blob."""
    ledger = Ledger(folder)
    data = b"".join(pieces)
    blob = Blob.of(data)
    name = BlobName("r", "agg", blob.digest)
    start = 0
    for piece in pieces:
        ledger.put(name, len(data), start, piece)
        start += len(piece)
    return ledger, name, blob


def test_a_folder_of_the_same_name_on_another_host_is_not_taken_for_the_ledger(tmp_path):
    ledger, name, blob = kept(tmp_path / "here", b"some", b"bytes")
    ledger.commit()
    places = ledger.extents(name)
    there = tmp_path / "there"
    shutil.copytree(ledger.folder, there)
    (there / "lock").write_text("another proof")
    files = LocalBlobs()
    assert whole(files, blob, places) is None
    files.open(welcome(ledger))
    assert whole(files, blob, places) == b"somebytes"
    for folder, proof in ((there, ledger.proof), (tmp_path / "none", ledger.proof), (there, "")):
        files.open(Welcome(run="r", beat_s=1.0, lease_s=1.0, ledger=str(folder), proof=proof))
        assert whole(files, blob, places) is None
    ledger.close()


def test_every_start_of_a_broker_leaves_another_proof(tmp_path):
    first = Ledger(tmp_path)
    first.close()
    second = Ledger(tmp_path)
    second.close()
    assert first.proof
    assert first.proof != second.proof


def test_invalid_extents_yield_nothing(tmp_path):
    ledger, name, blob = kept(tmp_path, b"some", b"bytes")
    ledger.commit()
    (segment, offset, _), second = ledger.extents(name)
    wrong = {
        "past the end": [(segment, offset, 4), (segment, 1 << 40, 5)],
        "no such segment": [(segment, offset, 4), (7, 16, 5)],
        "of another size": [(segment, offset, 4)],
        "other bytes": [(segment, offset + 1, 4), second],
        "none": [],
    }
    files = LocalBlobs()
    for why, places in wrong.items():
        files.open(welcome(ledger))
        assert whole(files, blob, places) is None, f"{why}: the last piece says that all are right"
    files.close()
    ledger.close()


def test_an_extent_is_sent_once_it_is_written(tmp_path):
    ledger, name, _ = kept(tmp_path, os.urandom(60), os.urandom(40))
    assert ledger.extents(name) == (), "a crash of the broker could take it back"
    ledger.commit()
    assert [size for *_, size in ledger.extents(name)] == [60, 40]
    assert ledger.extents(BlobName("r", "other", name.digest)) == ()
    half = BlobName("r", "agg", bytes(16))
    ledger.put(half, 10, 0, b"12345")
    ledger.commit()
    assert ledger.extents(half) == (), "the rest is still on its way"
    ledger.close()


def test_too_many_extents_for_a_header_are_not_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(blob_locations, "MAX_EXTENTS", 3)
    ledger, first, one = kept(tmp_path, b"a", b"b")
    second, two = BlobName("r", "agg", Blob.of(b"cd").digest), Blob.of(b"cd")
    for start, piece in enumerate((b"c", b"d")):
        ledger.put(second, 2, start, piece)
    ledger.commit()
    text = encode_message(
        Message(kind="k", id="i", run="r", sender="agg", to="aggregator", blobs=(one, two))
    )
    frame = Deliver(seq=1, at=1.0, message=text)
    send = SendTo(b"peer", frame, (), ((0, first), (1, second)))
    told = blob_locations.point_to_blobs(send, ledger, "")
    assert told.extents == {0: ledger.extents(first)}
    ledger.close()


def test_the_extents_of_any_delivery_fit_its_header():
    largest = (1 << 32, 1 << 32, CHUNK_BYTES)
    places = dict.fromkeys(range(MAX_BUFFERS), (largest,) * (MAX_EXTENTS // MAX_BUFFERS))
    frame = Deliver(
        seq=1 << 62, at=1.7e9, message=bytes(MAX_MESSAGE_BYTES), after=1 << 62, extents=places
    )
    encode_frame(frame)


def test_a_ledger_on_a_full_disk_is_not_shared(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    ledger, name, blob = kept(tmp_path, b"bytes")
    ledger.commit()
    assert ledger.proof == ""
    files = LocalBlobs()
    files.open(welcome(ledger))
    assert whole(files, blob, ledger.extents(name)) is None
    ledger.close()


@pytest.mark.end_to_end
@pytest.mark.parametrize("how", READ)
def test_wrong_bytes_in_a_file_are_detected_by_their_digest(tmp_path, how):
    def damage():
        path = segment_path(tmp_path, PAYLOAD, 0)
        with path.open("r+b") as file:
            file.seek(1000)
            file.write(b"damage")

    # Damage that the broker has still in memory is mended by asking it: here it is not.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blob_store, "_RECENT_BYTES", 0)
        with pytest.raises(WireError, match="nobody has blob"):
            served(tmp_path, READ[how], damage)
