"""Blobs on their way to the broker: what held posts lack, and how much is asked for at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from fedmq.broker.core.state import Action, Discard, Node, PendingPost, Put, SendTo, Store
from fedmq.broker.ledger.entries import BlobName, blob_name
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.chunked_transfer import Owned
from fedmq.broker.wire.schema import EMPTY, Blob, Buffer, Chunk, Message

UPLOAD_CHUNKS = 32
"""Chunks on their way to the broker, from all nodes together; each may send at least one."""
UPLOAD_CHUNKS_AMID_SMALL_MESSAGES = 1
"""From one node, while others talk so much that round trips matter more than throughput:"""
SMALL_MESSAGE_RATE, SMALL_MESSAGE_PERIOD_S = 4, 0.2
"""so many messages without blobs in so many seconds, to nodes that upload nothing. (Measured
on two cores, beside a stream of 100 MB blobs: round trips of small messages 25 to 28 ms at
the 99th percentile with a window of 8 chunks, 15 to 17 with 2, 11 to 16 with 1.)"""


class Uploads:
    """The part of the Broker core that fetches what nodes have named.

    Args:
        store: what the ledger holds.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._busy: dict[int, Node] = {}
        """Nodes that were asked for chunks, by identity."""
        self._small_messages: deque[float] = deque(maxlen=SMALL_MESSAGE_RATE)
        """When the last messages without blobs came."""
        self._completed: tuple[BlobName, int] | None = None
        """The blob, and its size, whose last piece this event has brought to the ledger."""

    def begin(self) -> None:
        """Another event begins."""
        self._completed = None

    def note_message(self, node: Node, message: Message, now: float) -> None:
        """Note that something was said, and whether a round trip may be waiting for it."""
        recipient = node.run.host_of(message.to)
        if not message.blobs and not (recipient is not None and len(recipient.fetcher)):
            self._small_messages.append(now)

    def begin_post(
        self,
        node: Node,
        held: PendingPost,
        message: Message,
        beside: Mapping[Blob, Buffer],
        out: list[Action],
    ) -> None:
        """Keep the blobs that have come beside a post, and fetch the others."""
        for blob in message.blobs:
            name = blob_name(message, blob)
            if not blob.size and blob.digest != EMPTY:
                text = f"blob {blob.digest.hex()} is not the digest of nothing"
                held.refusal = Rejection(Code.BAD_BLOB, text)
                return
            if self._store.size_of(name) is None and (blob in beside or not blob.size):
                out.append(Put(name, blob.size, 0, beside.get(blob, b"")))
            else:
                held.apart.append(blob)
        self.lacks(node, held)

    def lacks(self, node: Node, held: PendingPost) -> bool:
        """Tell whether blobs of a post are missing, and see to it that they are fetched.

        Asked again when its turn has come: what was there may have been deleted meanwhile.
        """
        if held.message is None or held.refusal:
            return False
        for blob in held.apart:
            name = blob_name(held.message, blob)
            owned = Owned(name.owner, blob.digest)
            size = self._store.size_of(name)
            if self._completed is not None and name == self._completed[0]:
                size = self._completed[1]
            if size is not None and size != blob.size:
                text = f"expected blob {blob.digest.hex()} to have {size} bytes"
                held.refusal = Rejection(Code.BAD_BLOB, text)
                return False
            if size is None and owned not in held.missing:
                held.missing.add(owned)
                if owned not in node.fetcher:
                    node.fetcher.add(name.owner, blob, *self._store.resume(name, blob.size))
        return bool(held.missing)

    def take(self, node: Node, chunk: Chunk, buffers: Sequence[Buffer], out: list[Action]) -> bool:
        """Take a piece of a blob; tell whether it was of any use."""
        name = Owned(chunk.owner, chunk.digest)
        if not buffers and name in node.fetcher:
            reason = "its sender does not hold the blob that it names"
            self._failed(node, name, Code.MISSING_BLOB, reason)
        elif buffers:
            piece = node.fetcher.receive(chunk, buffers[0])
            if piece is None:
                return False
            full = BlobName(node.run.id, chunk.owner, chunk.digest)
            whole = self._store.have(full) == piece.start
            out.append(Put(full, piece.size, piece.start, piece.data))
            good = node.fetcher.finished(name)
            if good and not whole:
                # Its first pieces were deleted while its node was away: once more, then.
                for held in node.pending_posts:
                    held.missing.discard(name)
            elif good is False:
                out.append(Discard(full, piece.size))
                reason = "the bytes of a blob do not match its digest"
                self._failed(node, name, Code.BAD_BLOB, reason)
            elif good:
                self._completed = (full, piece.size)
                for held in node.pending_posts:
                    held.missing.discard(name)
        return True

    def _failed(self, node: Node, name: Owned, code: Code, reason: str) -> None:
        node.fetcher.discard(name)
        for held in node.pending_posts:
            if name in held.missing:
                held.missing.discard(name)
                held.refusal = Rejection(code, f"{reason} ({name.digest.hex()})")

    def ask(self, node: Node, now: float, out: list[Action]) -> None:
        """Ask for chunks: the window is shared by all nodes that have some to send."""
        if len(node.fetcher):
            self._busy[id(node)] = node
            self._busy = {k: each for k, each in self._busy.items() if _is_busy(each)}
            window = max(1, UPLOAD_CHUNKS // max(1, len(self._busy)))
            if (
                len(self._small_messages) == SMALL_MESSAGE_RATE
                and now - self._small_messages[0] < SMALL_MESSAGE_PERIOD_S
            ):
                window = min(window, UPLOAD_CHUNKS_AMID_SMALL_MESSAGES)
            out.extend(SendTo(node.peer, want) for want in node.fetcher.wants(window))


def _is_busy(node: Node) -> bool:
    return node.alive and bool(len(node.fetcher))
