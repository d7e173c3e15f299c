"""A broker without a ledger on disk, to measure the cost of recording.

It runs the real broker's loop and ledger code, but writes nothing: it only counts the bytes,
and keeps undelivered messages and blobs in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from harness import send_json
from peers import let_nodes_talk

from fedmq.broker.ledger import blob_store, writer
from fedmq.broker.ledger.segment_writer import Segment
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.schema import Buffer

_IN_FLIGHT_BYTES = 192 << 20
"""More than a stream's window, so every read of an undelivered blob is served from memory."""
_UNLIMITED = 1 << 60


def _count(segment: Segment, buffers: Sequence[Buffer]) -> None:
    segment.size += sum(memoryview(buffer).nbytes for buffer in buffers)


def broker(pipe: Connection, folder: str) -> None:
    """Serve; report the endpoint."""
    let_nodes_talk()
    with (
        mock.patch.object(Segment, "_write", _count),
        mock.patch.object(blob_store, "_RECENT_BYTES", _IN_FLIGHT_BYTES),
        mock.patch.object(writer, "_RECENT_BYTES", _IN_FLIGHT_BYTES),
        mock.patch.object(writer, "_PAYLOAD_SEGMENT_BYTES", _UNLIMITED),
        mock.patch.object(writer, "_MESSAGES_SEGMENT_BYTES", _UNLIMITED),
    ):
        settings = LedgerSettings(share_files=False)
        server = BrokerServer("tcp://127.0.0.1:0", Path(folder), BrokerSettings(), settings)
        send_json(pipe, [server.endpoint, server.endpoint])
        server.serve()
