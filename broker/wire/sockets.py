"""What the ROUTER and the DEALER loop share: their limits, and how a message is sent and received.

The third file that imports zmq. Small parts are copied, chunks are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from fedmq.broker.errors import WireError
from fedmq.broker.wire.encoding import decode_frame, split_header
from fedmq.broker.wire.schema import CHUNK_BYTES, INLINE_BYTES, MAX_BUFFERS, AnyFrame, Buffer

MAX_FRAME_BYTES = CHUNK_BYTES + 4096
COPY_BELOW_BYTES = 512 * 1024
"""Smaller parts are copied into zmq. Each part that is not wakes pyzmq's garbage-collector
thread, which was measured to cost more."""
NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""Plain numbers: an enum's flags are joined in Python, for each part of each message."""


def send_parts(socket: zmq.Socket[bytes], parts: Sequence[Buffer]) -> None:
    """Send a message; parts that are not small are not copied, and must stay as they are.

    Raises:
        zmq.Again: there is no room for it now.
        zmq.ZMQError: of EHOSTUNREACH, the connection that it is for is gone.
    """
    for part in parts[:-1]:
        socket.send(part, _MORE, copy=False)
    socket.send(parts[-1], NOBLOCK, copy=False)


def receive(socket: zmq.Socket[bytes]) -> tuple[list[tuple[AnyFrame, list[Buffer]]], int]:
    """Read the frames of a message, each with its buffers.

    Its next part is the header: a ROUTER's caller has read whom it is from.

    Returns the frames, and the bytes that all took.

    Raises:
        WireError: not frames of this protocol; the rest of the message has been read.
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
                    raise WireError(f"expected at most {MAX_BUFFERS} buffers")
                part = socket.recv(copy=False)
                room -= 1
                # A small buffer is copied, so that whoever keeps it does not keep zmq's frame.
                buffers.append(part.buffer if len(part) > INLINE_BYTES else part.bytes)
                nbytes += len(part)
            frames.append((frame, buffers))
    finally:
        while part.more:
            part = socket.recv(copy=False)
    return frames, nbytes
