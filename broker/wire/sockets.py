"""Send and receive messages over zmq, for the ROUTER and the DEALER loop; and their limits.

One of the three files that use zmq. Small parts are copied, chunks are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from fedmq.broker.wire.inbox import frames_of, headers_of
from fedmq.broker.wire.schema import CHUNK_BYTES, MAX_BUFFERS, AnyFrame, Buffer

MAX_FRAME_BYTES = CHUNK_BYTES + 4096
CURVE_BYTES = 33
"""What CURVE adds to each frame, which libzmq counts with its size."""
COPY_BELOW_BYTES = 512 * 1024
"""Smaller parts are copied into zmq: an uncopied part wakes pyzmq's garbage-collector thread, which
takes longer than the copy (measured)."""
NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""Plain integers: Python would join the flags of the enum for each part of each message."""


def send_parts(
    socket: zmq.Socket[bytes], parts: Sequence[Buffer], *, tracked: bool = False
) -> zmq.MessageTracker | None:
    """Send a message; large parts are not copied, so the caller must not change them.

    ``tracked``: return a tracker of the message.

    Raises:
        zmq.Again: the connection's queue is full.
        zmq.ZMQError: with EHOSTUNREACH, the connection is gone.
    """
    for part in parts[:-1]:
        socket.send(part, _MORE, copy=False)
    if not tracked:
        socket.send(parts[-1], NOBLOCK, copy=False)
        return None
    last = zmq.Frame(parts[-1], track=True, copy=False)  # a copied part cannot be tracked
    socket.send(last, NOBLOCK, copy=False)
    tracker: zmq.MessageTracker = last.tracker
    return tracker


def receive_parts(socket: zmq.Socket[bytes]) -> tuple[list[zmq.Frame], int]:
    """Read the parts of a message; those beyond the largest message are dropped.

    The next part must be the header: the caller of a ROUTER has read the peer before.

    Returns (parts, size of the message in bytes).

    Raises:
        zmq.Again: nothing has arrived.
    """
    part = socket.recv(NOBLOCK, copy=False)
    parts, nbytes = [part], len(part)
    while part.more:
        part = socket.recv(copy=False)
        if len(parts) <= MAX_BUFFERS + 1:  # one too many is an error
            parts.append(part)
            nbytes += len(part)
    return parts, nbytes


def receive(socket: zmq.Socket[bytes]) -> list[tuple[AnyFrame, Sequence[Buffer]]]:
    """Read the frames of a message, each with its buffers.

    Raises:
        WireError: these are not frames of this protocol; the rest of the message was read.
        zmq.Again: nothing has arrived.
    """
    parts, _ = receive_parts(socket)
    return list(frames_of(headers_of(parts), parts))
