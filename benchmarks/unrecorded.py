"""A broker that records nothing, to see what recording costs.

It is the real one in all else: the same loop, the same ledger's code. But what would be
written is only counted, and what is on its way to a recipient is kept in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from harness import say

from fedmq.broker.ledger import blob_store, writer
from fedmq.broker.ledger.segment_writer import Segment
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.schema import Buffer

_IN_FLIGHT_BYTES = 192 << 20
"""More than a stream's window: whoever reads what is on its way finds it in memory."""
_WITHOUT_END = 1 << 60


def _count(segment: Segment, buffers: Sequence[Buffer]) -> None:
    segment.size += sum(memoryview(buffer).nbytes for buffer in buffers)


def broker(pipe: Connection, folder: str) -> None:
    """Serve, and say where."""
    with (
        mock.patch.object(Segment, "_write", _count),
        mock.patch.object(blob_store, "_RECENT_BYTES", _IN_FLIGHT_BYTES),
        mock.patch.object(writer, "_RECENT_BYTES", _IN_FLIGHT_BYTES),
        mock.patch.object(writer, "_PAYLOAD_SEGMENT_BYTES", _WITHOUT_END),
        mock.patch.object(writer, "_MESSAGES_SEGMENT_BYTES", _WITHOUT_END),
    ):
        keeping = LedgerSettings(share_files=False)
        server = BrokerServer("tcp://127.0.0.1:0", Path(folder), BrokerSettings(), keeping)
        say(pipe, [server.endpoint, server.endpoint])
        server.serve()
