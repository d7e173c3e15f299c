"""A socket's monitor: what libzmq does with its connections.

It must be read in every turn of the loop, and closed with `close`: an I/O thread that cannot hand
over an event stops, and with it every connection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import zmq

_EVENT = struct.Struct("=HI")


class MonitorEvent(NamedTuple):
    """An event; what the value means depends on the event."""

    event: int
    value: int


class Monitor:
    """The monitor of a socket.

    Args:
        context: of the socket.
        socket: to watch; not bound or connected yet.
        events: to report, of ``zmq.EVENT_...``; others cost nothing.

    Attributes:
        socket: readable while there are events to read.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], events: int
    ) -> None:
        self._watched = socket
        address = f"inproc://monitor-{id(self):x}"
        socket.monitor(address, events)
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # a full queue would stop the I/O thread
        self.socket.connect(address)

    def read(self) -> Iterator[MonitorEvent]:
        """Yield the events that have occurred since the last call."""
        while True:
            try:
                data, _endpoint = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield MonitorEvent(*_EVENT.unpack(data))

    def close(self) -> None:
        """Stop watching; call it before the watched socket is closed."""
        self._watched.monitor(None, 0)
        self.socket.close(linger=0)
