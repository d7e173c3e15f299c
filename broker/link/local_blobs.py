"""Read blobs from the ledger's files if the node is on the broker's host.

Only the drivers use this. The broker's Welcome names the ledger's folder and a proof, the content
of a file there; a delivery lists the extents of its large blobs. A node that finds the proof reads
the blobs from the files, without cost for the broker. Digests are checked as always. After any
error (permissions, a deleted file), the node requests the blob over the link.
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
    """The ledger's files as a node on the broker's host sees them; none on another host."""

    def __init__(self) -> None:
        self._files: SegmentFiles | None = None

    def open(self, welcome: Welcome) -> None:
        """Use the folder that the broker names if it contains the broker's proof."""
        self.close()
        if welcome.ledger and welcome.proof:
            folder = Path(welcome.ledger)
            if proof_in(folder) == welcome.proof:
                self._files = SegmentFiles(folder, _OPEN_FILES)

    def chunks(
        self, blob: Blob, extents: Sequence[Extent], into: memoryview | None = None
    ) -> Iterator[memoryview]:
        """Yield a blob's bytes by extent; stops early if they cannot be read.

        The last extent is yielded only if the digest of all bytes matches.

        Args:
            blob: the blob's digest and size.
            extents: where its bytes are, in order.
            into: a buffer of the blob's size to read into; by default each extent gets a new one.
        """
        if sum(size for *_, size in extents) != blob.size:
            return
        hasher = xxhash.xxh3_128()
        end = 0
        for extent in extents:
            begin, end = end, end + extent[2]
            data = np.empty(extent[2], np.uint8).data if into is None else into[begin:end]
            if not self._fill(extent, data):
                return
            hasher.update(data)
            if end == blob.size and hasher.digest() != blob.digest:
                return
            yield data

    def close(self) -> None:
        """Close the files; no more blobs are read from them."""
        if self._files is not None:
            self._files.close_all()
        self._files = None

    def _fill(self, extent: Extent, data: memoryview) -> bool:
        """Read an extent; after an error, stop using the files."""
        if self._files is None:
            return False
        segment, offset, size = extent
        try:
            if os.preadv(self._files.fd(segment), [data], offset) == size:
                return True
        except (OSError, OverflowError, LedgerError):  # or an impossible extent
            pass
        self.close()
        return False
