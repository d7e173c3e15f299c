"""Where a delivery's large blobs lie in the ledger's files, for nodes on the broker's host.

The Welcome names the ledger's folder and a proof that stands in a file there; a Deliver says
in which extents its blobs lie. The other half is `fedmq.broker.link.local_blobs`.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from fedmq.broker.core.state import SendTo
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.schema import MAX_EXTENTS, Deliver, Extent, Frame, Welcome

_LONGEST_NAME = 4096
"""Bytes of a folder's name: no system opens a longer one, and a header has no room for it."""


def shareable_name(folder: Path) -> str:
    """Return a ledger's folder as a Welcome names it.

    Raises:
        ValueError: it has no such name; why, is a part of a sentence.
    """
    try:
        name = str(folder.resolve())
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError("the name of its folder is not UTF-8") from None
    except (OSError, RuntimeError) as error:  # no current folder, or a circle of links
        raise ValueError(f"its folder cannot be found: {error}") from None
    if size > _LONGEST_NAME:
        raise ValueError(f"the name of its folder has {size} bytes, more than {_LONGEST_NAME}")
    return name


def point_to_blobs(send: SendTo, ledger: Ledger, folder: str) -> Frame:
    """Return the frame that is to be sent, which says where in the ledger's files to look.

    Args:
        send: what is to be sent.
        ledger: which files.
        folder: its name, as `shareable_name` returns it.
    """
    frame = send.frame
    if isinstance(frame, Welcome):
        return msgspec.structs.replace(frame, ledger=folder, proof=ledger.proof)
    if isinstance(frame, Deliver) and send.apart:
        room = MAX_EXTENTS
        found: dict[int, tuple[Extent, ...]] = {}
        for index, name in send.apart:
            places = ledger.extents(name)
            if 0 < len(places) <= room:
                found[index] = places
                room -= len(places)
        return msgspec.structs.replace(frame, extents=found)
    return frame
