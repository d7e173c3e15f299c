"""A ledger with an entry of each kind, and helpers that write one."""

from fedmq.broker.ledger.entries import Accepted, BlobName, Consumed, Ended, Opened, Refusal
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    Message,
    digest,
)


def accepted(seq, text="hello", consumes=()):
    message = Message(
        kind="note", id=f"n/{seq}", run="r", sender="n", to="record", body={"text": text}
    )
    return Accepted(seq=seq, at=float(seq), message=encode_message(message), consumes=consumes)


def name_of(data, owner="n"):
    return BlobName("r", owner, digest(data))


def put(ledger, data, owner="n", piece=CHUNK_BYTES):
    for start in range(0, len(data), piece):
        ledger.put(name_of(data, owner), len(data), start, data[start : start + piece])
    return name_of(data, owner)


def write(folder, entries, blobs=()):
    ledger = Ledger(folder)
    for data in blobs:
        put(ledger, data)
    for entry in entries:
        ledger.append(entry)
    ledger.close()
    return entries


ENTRIES = [
    accepted(0),
    accepted(1, "x" * 40, consumes=(0,)),
    Consumed(seq=2, at=2.5, node="n", of=(0, 1)),
    Refusal(seq=3, at=3.0, run="r", node="broker", id="n/9", reason="no such address"),
    Opened(seq=4, at=3.5, run="q", config="[run]", total_clients=3),
    Refusal(
        seq=5, at=3.6, run="r", node="broker", id="n/1", reason="parked", of=1, dead_lettered=True
    ),
    Ended(seq=6, at=4.0, run="r", reason="done", nodes={"n": {"sessions": 1}}),
]
