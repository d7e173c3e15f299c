"""Send and receive messages over zmq, for the ROUTER and the DEALER loop; and their limits.

One of the three files that use zmq. Small parts are copied, chunks are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from fedmq.broker.errors import WireError
from fedmq.broker.wire.encoding import decode_frame, split_header
from fedmq.broker.wire.schema import CHUNK_BYTES, INLINE_BYTES, MAX_BUFFERS, AnyFrame, Buffer

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


def receive(socket: zmq.Socket[bytes]) -> tuple[list[tuple[AnyFrame, list[Buffer]]], int]:
    """Read the frames of a message, each with its buffers.

    The next part must be the header: the caller of a ROUTER has read the peer before.

    Returns (frames, size of the message in bytes).

    Raises:
        WireError: these are not frames of this protocol; the rest of the message was read.
        zmq.Again: nothing has arrived.
    """
    part = socket.recv(NOBLOCK, copy=False)
    nbytes = len(part)
    room = MAX_BUFFERS
    frames: list[tuple[AnyFrame, list[Buffer]]] = []
    try:
        for header, count in split_header(part.buffer):
            frame = decode_frame(header)
            buffers: list[Buffer] = []
            while part.more and len(buffers) != count:
                if not room:
                    raise WireError(f"expected at most {MAX_BUFFERS} buffers, got more")
                part = socket.recv(copy=False)
                room -= 1
                # A small buffer is copied, so that keeping it does not keep zmq's frame.
                buffers.append(part.buffer if len(part) > INLINE_BYTES else part.bytes)
                nbytes += len(part)
            frames.append((frame, buffers))
    finally:
        while part.more:
            part = socket.recv(copy=False)
    return frames, nbytes
