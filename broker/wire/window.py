"""How many unacknowledged frames a link sends, and the memory that they may take at the broker."""

from __future__ import annotations

from fedmq.broker.wire.schema import Done, NumberedFrame, Post, PostAll

WINDOW_FRAMES = 1024
"""Most numbered frames that a link sends before their acknowledgments come."""
WINDOW_BYTES = 8 << 20
"""Most bytes of them, as `held_bytes` counts."""

RESERVED_BYTES = 64 * 1024
"""What one connection may use of a limit for all connections, even if the others use all of it."""


def held_bytes(frame: NumberedFrame, blobs: int) -> int:
    """Return the memory, in bytes, that a broker uses while a frame waits for the ones before it.

    The objects are counted, too: a list of numbers takes ten times its size on the wire.

    Args:
        frame: the frame; a message's body is not decoded until the frame is applied.
        blobs: number of blobs of its message that did not come with it.
    """
    match frame:
        case Post(message=message, consumes=consumes):
            return 1024 + len(message) + 48 * len(consumes) + 2048 * blobs
        case PostAll(messages=messages):
            return 1024 * len(messages) + sum(map(len, messages))
        case Done(seqs=seqs, refused=refused):
            return 1024 + 48 * len(seqs) + sum(256 + len(why) for why in refused.values())
        case _:
            return 1024
