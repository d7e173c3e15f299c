"""Tell nodes on the broker's host where a delivery's large blobs are in the ledger's files.

A Welcome names the ledger's folder and a proof, the content of a file there; a Deliver lists
the extents of its blobs. `fedmq.broker.link.local_blobs` reads them.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from fedmq.broker.core.events import SendTo
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.schema import MAX_EXTENTS, Deliver, Extent, Frame, Welcome

_LONGEST_PATH = 4096
"""Bytes of a folder's path: no system opens a longer one, and it would not fit a header."""


def shareable_name(folder: Path) -> str:
    """Return the path of a ledger's folder as a Welcome names it.

    Raises:
        ValueError: the path cannot be sent; the message says why.
    """
    try:
        name = str(folder.resolve())
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError("the path of the ledger is not UTF-8") from None
    except (OSError, RuntimeError) as error:  # no current folder, or a loop of symbolic links
        raise ValueError(f"cannot resolve the path of the ledger: {error}") from None
    if size > _LONGEST_PATH:
        raise ValueError(f"the path of the ledger has {size} bytes, more than {_LONGEST_PATH}")
    return name


def point_to_blobs(send: SendTo, ledger: Ledger, folder: str) -> Frame:
    """Return the frame of a send action, with the extents of its blobs in the ledger's files.

    Args:
        send: the action.
        ledger: the ledger that holds the blobs.
        folder: its path, as `shareable_name` returns it.
    """
    frame = send.frame
    if isinstance(frame, Welcome):
        if not send.files:
            return frame
        return msgspec.structs.replace(frame, ledger=folder, proof=ledger.proof)
    if isinstance(frame, Deliver) and send.apart:
        room = MAX_EXTENTS
        found: dict[int, tuple[Extent, ...]] = {}
        for index, name in send.apart:
            extents = ledger.extents(name)
            if 0 < len(extents) <= room:
                found[index] = extents
                room -= len(extents)
        return msgspec.structs.replace(frame, extents=found)
    return frame
