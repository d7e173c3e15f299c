"""Reading blobs from the ledger's own files, where node and broker share a host.

An option that nothing above the drivers knows of. The broker's Welcome says where its
ledger lies, and a proof that stands in a file there; a delivery says in which places of
that ledger its large blobs lie. A node that finds the proof reads them there: they cross
no socket, and cost the broker nothing. Digests are checked as always. Whatever goes wrong
with a file (another user's, deleted meanwhile), the node asks for the blob as any other
node does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.lock import proof_in
from fedmq.broker.ledger.segments import SegmentFiles
from fedmq.broker.wire.schema import Blob, Extent, Welcome

_OPEN_FILES = 4


class LocalBlobs:
    """A node's view of the ledger's files, while its broker's Welcome leads to any."""

    def __init__(self) -> None:
        self._files: SegmentFiles | None = None

    def open(self, welcome: Welcome) -> None:
        """Find out whether the folder that the broker names is the one that is seen here."""
        self.close()
        if welcome.ledger and welcome.proof:
            folder = Path(welcome.ledger)
            if proof_in(folder) == welcome.proof:
                self._files = SegmentFiles(folder, _OPEN_FILES)

    def chunks(
        self, blob: Blob, places: Sequence[Extent], into: memoryview | None = None
    ) -> Iterator[memoryview]:
        """Yield a blob's bytes, in pieces; it ends early where they cannot be had here.

        The last piece comes only if all of them are what the blob's digest says.

        Args:
            blob: its size, and its digest.
            places: where its pieces lie.
            into: as many bytes, which the pieces will be; by default each has its own.
        """
        if sum(size for *_, size in places) != blob.size:
            return
        hasher = xxhash.xxh3_128()
        end = 0
        for place in places:
            begin, end = end, end + place[2]
            piece = np.empty(place[2], np.uint8).data if into is None else into[begin:end]
            if not self._fill(place, piece):
                return
            hasher.update(piece)
            if end == blob.size and hasher.digest() != blob.digest:
                return
            yield piece

    def close(self) -> None:
        """Close the files, and read no more of them."""
        if self._files is not None:
            self._files.close_all()
        self._files = None

    def _fill(self, place: Extent, piece: memoryview) -> bool:
        """Read a piece from its place; without success, do not look at the files again."""
        if self._files is None:
            return False
        segment, offset, size = place
        try:
            if os.preadv(self._files.fd(segment), [piece], offset) == size:
                return True
        except (OSError, OverflowError, LedgerError):  # or the place is none that a file can have
            pass
        self.close()
        return False
