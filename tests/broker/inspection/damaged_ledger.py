"""A small ledger, and ways to damage it."""

import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.ledger.entries import (
    PAYLOAD,
    Accepted,
    Consumed,
    Opened,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import scan
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.recovery import open_broker
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob, Message
from tests.broker.clocks import stopped_clock
from tests.broker.ledger.small_ledger import put

SIZE = 300
DONE = 6
"""Number of finished messages."""
ALL = 10


def blob(number):
    return bytes([65 + number]) * SIZE


def write(folder, segment_bytes=900):
    """Write a run of ten tasks, each with a blob; the first six are done. Return its entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", segment_bytes)
        patch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", segment_bytes)
        ledger = Ledger(folder)
        ledger.append(Opened(seq=0, at=0.0, run="r", config="[run]", total_clients=3))
        for number in range(ALL):
            put(ledger, blob(number))
            fields = {"kind": "task", "run": "r", "sender": "n", "to": "client/0"}
            blobs = (Blob.of(blob(number)),)
            message = Message(id=f"n/{number}", blobs=blobs, **fields)
            seq = ledger.next_seq
            ledger.append(Accepted(seq=seq, at=1.1, message=encode_message(message)))
            ledger.commit()
            if number < DONE:
                ledger.append(Consumed(seq=seq + 1, at=2.2, node="w", of=(seq,)))
        ledger.close()
    return list(read_entries(folder))


def goes_on(folder):
    """Open a broker on the ledger and append to it; return how many entries it found."""
    ledger, _ = open_broker(folder, BrokerSettings(), stopped_clock())
    found = ledger.next_seq
    ledger.append(Opened(seq=found, at=3.0, run="q", config="[run]", total_clients=1))
    ledger.close()
    return found


def record_of(folder, number):
    """Return the position of the record of a blob."""
    for segment in segment_numbers(folder, PAYLOAD):
        path = segment_path(folder, PAYLOAD, segment)
        for record in scan(path):
            if path.read_bytes()[record.data_offset : record.end] == blob(number):
                return path, record
    raise AssertionError(number)


def flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)
