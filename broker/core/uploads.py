"""Fetch the blobs that pending posts lack, with a window of chunks shared by all nodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TypeGuard

from msgspec.structs import replace

from fedmq.broker.core.events import Action, Discard, Log, Put, SendTo, Store
from fedmq.broker.core.state import Node, PendingFrame, PendingPost, RejectedPost
from fedmq.broker.ledger.entries import BlobName, blob_name
from fedmq.broker.rejections import Code
from fedmq.broker.settings import Limits
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.chunked_transfer import Owned
from fedmq.broker.wire.schema import CHUNK_BYTES, EMPTY, Blob, Buffer, Chunk, Message
from fedmq.broker.wire.window import RESERVED_BYTES

UPLOAD_CHUNKS = 32
"""Most chunks in flight to the broker from all nodes; each node may send at least one."""
UPLOAD_CHUNKS_AMID_SMALL_MESSAGES = 1
"""Most chunks in flight from one node while small messages are frequent: then their round trips
matter more than throughput. (Measured on two cores, beside a stream of 100 MB blobs: 25 to 28 ms at
the 99th percentile with a window of 8 chunks, 15 to 17 with 2, 11 to 16 with 1.)"""
CONTROL_BYTES = 1 << 20
"""What an aggregator may store beyond the limits of disk, in messages without blobs."""
_RECORD_BYTES = 1024
"""More than the head of a chunk's record takes on the disk."""
_CHECKED_PART = 1024
"""A node's usage is compared with the limits when this part of the room has been used. So small
that nothing can exceed the limits in between: a blob may be deleted and fetched again."""
NEARLY_FULL = 0.9
"""Fraction of a limit of disk above which a warning is logged."""
SMALL_MESSAGE_RATE, SMALL_MESSAGE_PERIOD_S = 4, 0.2
"""Messages without blobs, in seconds, that count as frequent; only those to nodes that upload
nothing are counted."""


class Uploads:
    """The part of the Broker core that fetches blobs from nodes.

    Args:
        store: reads the ledger.
        limits: of the broker.

    Attributes:
        completed: name and size of the blob that the present event has completed, before the ledger
            has it; to be cleared at the end of the event.
    """

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store, self._limits = store, limits
        self.completed: tuple[BlobName, int] | None = None
        self._holding: dict[int, Node] = {}
        """Nodes with frames that wait for blobs, by identity of the object; and some without."""
        self._busy: dict[int, Node] = {}
        """Nodes with chunks to send, by identity of the object."""
        self._small_messages: deque[float] = deque(maxlen=SMALL_MESSAGE_RATE)
        """Arrival times of the last messages without blobs."""
        self._named_bytes = 0
        """The most that the blobs of all posts can have taken on the disk, beginning with this
        object. With the bytes of its run's messages, it says how much a node can have stored since
        its usage was last compared with the limits: below `Node.unchecked_bytes`, it need not be
        compared again."""
        self._warned: set[tuple[str, str]] = set()
        """Run and node, or run and "", for each limit of disk that was reported as nearly used."""

    def note_message(self, node: Node, message: Message, now: float) -> None:
        """Count a message if a round trip may depend on it."""
        if message.blobs:
            return
        recipient = node.run.host_of(message.to) if self._busy else None
        if recipient is None or not len(recipient.fetcher):
            self._small_messages.append(now)

    def begin_post(
        self, node: Node, post: PendingPost, buffers: Sequence[Buffer], out: list[Action]
    ) -> PendingPost | RejectedPost:
        """Store the blobs that came with a post, and fetch the others.

        In the post that is returned, ``apart`` is empty if it can be applied in this event.
        """
        message = post.message
        for blob in message.blobs:
            self._named_bytes += blob.size + _RECORD_BYTES * (1 + blob.size // CHUNK_BYTES)
        grown = self._named_bytes + node.run.message_bytes[""]
        if grown + len(post.frame.message) > node.unchecked_bytes:
            room = self._disk_room(node, post, out)
            if isinstance(room, str):
                return post.rejected(Code.LIMIT, room)
            node.unchecked_bytes = grown + room // _CHECKED_PART
        if not message.blobs:
            return post
        beside: dict[Blob, Buffer] = {}
        for index, data in zip(post.frame.inline, buffers, strict=True):
            beside[message.blobs[index]] = data
        apart = []
        waits = bool(node.pending_frames)  # then a stored blob may be deleted until its turn
        for blob in message.blobs:
            name = blob_name(message, blob)
            if not blob.size and blob.digest != EMPTY:
                text = f"expected the digest of no bytes for an empty blob, got {blob.digest.hex()}"
                return post.rejected(Code.BAD_BLOB, text)
            size = self._store.size_of(name)
            if size is None and (blob in beside or not blob.size):
                out.append(Put(name, blob.size, 0, beside.get(blob, b"")))
            else:
                apart.append(blob)
                waits |= size != blob.size
        if not waits:
            return post
        post = replace(post, apart=tuple(apart))
        return self.resolve(node, post) or post

    def _disk_room(self, node: Node, post: PendingPost, out: list[Action]) -> int | str:
        """Return the bytes that a node may store beyond a post, or why it may not store that.

        Log once for each node and each run that only little is left.
        """
        run, limits = node.run, self._limits
        new = len(post.frame.message)
        of_node, of_run = self._store.used(run.id, node.name)
        if post.message.blobs:
            new += sum(
                blob.size
                for blob in set(post.message.blobs)
                if self._store.size_of(blob_name(post.message, blob)) is None
            )
            fetching = {id(node): node, **self._busy}.values()
            of_node += node.fetcher.missing_bytes
            of_run += sum(each.fetcher.missing_bytes for each in fetching if each.run is run)
        of_node += run.message_bytes[node.name]
        of_run += run.message_bytes[""]
        room = min(limits.node_disk - of_node, limits.run_disk - of_run) - new
        if node.hello.role == AGGREGATOR and not post.message.blobs:
            new -= CONTROL_BYTES  # so that it can still record why the run ends
        if of_node + new > limits.node_disk:
            return (
                f"broker.limits.node_disk: expected at most {limits.node_disk:,} bytes of "
                f"{node.name}, got {of_node:,} and {new:,} more"
            )
        if of_run + new > limits.run_disk:
            return (
                f"broker.limits.run_disk: expected at most {limits.run_disk:,} bytes of run "
                f"{run.id}, got {of_run:,} and {new:,} more"
            )
        if of_node + new > NEARLY_FULL * limits.node_disk:
            self._warn(run.id, node.name, of_node + new, out)
        if of_run + new > NEARLY_FULL * limits.run_disk:
            self._warn(run.id, "", of_run + new, out)
        return room

    def _warn(self, run: str, node: str, used: int, out: list[Action]) -> None:
        """Log that the disk of a node, or of a run (``node`` is ""), is nearly used up."""
        if (run, node) in self._warned:
            return
        self._warned.add((run, node))
        name = "node_disk" if node else "run_disk"
        most = self._limits.node_disk if node else self._limits.run_disk
        fields = {"limit": f"broker.limits.{name}", "run": run, "used": used, "most": most}
        if node:
            fields["peer_node"] = node
        text = (
            "the ledger nearly has as many bytes as it may: beyond the limit, posts are rejected; "
            "restart the broker with a higher one"
        )
        out.append(Log("warning", text, fields))

    def resolve(self, node: Node, post: PendingPost) -> PendingPost | RejectedPost | None:
        """Return a post whose blobs are stored; None while some are missing, and fetch these.

        Called again when the post is the oldest: a blob may have been deleted meanwhile.
        """
        missing = False
        for blob in post.apart:
            name = blob_name(post.message, blob)
            size = self._size_of(name)
            if size is None:
                missing = True
                if Owned(name.owner, blob.digest) not in node.fetcher:
                    node.fetcher.add(name.owner, blob, *self._store.resume(name, blob.size))
            elif size != blob.size:
                text = f"expected blob {blob.digest.hex()} to have {size} bytes"
                return post.rejected(Code.BAD_BLOB, text)
        return None if missing else post

    def _size_of(self, name: BlobName) -> int | None:
        """Return the size of a blob that is stored, or will be at the end of this event."""
        if self.completed is not None and name == self.completed[0]:
            return self.completed[1]
        return self._store.size_of(name)

    def hold(self, node: Node, frame: PendingFrame) -> None:
        """Let a frame of a node wait for blobs, or for the frames before it."""
        if not node.pending_frames:
            self._holding = {k: each for k, each in self._holding.items() if each.pending_frames}
        node.hold(frame)
        self._holding[id(node)] = node

    def holds_too_much(self, node: Node, part: int = 1) -> bool:
        """Return whether the frames of a node that wait use too much memory.

        If those of all nodes do, each node may still have `RESERVED_BYTES`.

        Args:
            node: has at least one such frame.
            part: the fraction of the limits that counts as too much is one divided by this.
        """
        limits = self._limits
        if node.held_bytes * part >= limits.held_bytes:
            return True
        if node.held_bytes * part < RESERVED_BYTES:
            return False
        self._holding = {k: each for k, each in self._holding.items() if each.pending_frames}
        total = sum(each.held_bytes for each in self._holding.values())
        return total * part >= limits.held_bytes_total

    def take(self, node: Node, chunk: Chunk, buffers: Sequence[Buffer], out: list[Action]) -> bool:
        """Handle a chunk; return whether it changed anything."""
        name = Owned(chunk.owner, chunk.digest)
        if not buffers:
            if name in node.fetcher:
                reason = "the sender does not have the blob that its message names"
                self._fail(node, name, Code.MISSING_BLOB, reason)
            return True
        received = node.fetcher.receive(chunk, buffers[0])
        if received is None:
            return False
        blob_id = BlobName(node.run.id, chunk.owner, chunk.digest)
        # Its first chunks may have been deleted while its node was away: then it is fetched again.
        continues = self._store.have(blob_id) == received.start
        out.append(Put(blob_id, received.size, received.start, received.data))
        good = node.fetcher.check_complete(name)
        if good is False:
            out.append(Discard(blob_id, received.size))
            self._fail(node, name, Code.BAD_BLOB, "the bytes of a blob do not match its digest")
        elif good and continues:
            self.completed = (blob_id, received.size)
        return True

    def _fail(self, node: Node, name: Owned, code: Code, reason: str) -> None:
        """Stop fetching a blob, and reject the posts that wait for it."""
        node.fetcher.discard(name)
        text = f"{reason} ({name.digest.hex()})"
        node.pending_frames = deque(
            frame.rejected(code, text) if self._waits_for(frame, name) else frame
            for frame in node.pending_frames
        )

    def _waits_for(self, frame: PendingFrame, name: Owned) -> TypeGuard[PendingPost]:
        return isinstance(frame, PendingPost) and any(
            blob.digest == name.digest and self._size_of(blob_name(frame.message, blob)) is None
            for blob in frame.apart
        )

    def ask(self, node: Node, now: float, out: list[Action]) -> None:
        """Request chunks: all nodes that have chunks to send share the window."""
        if len(node.fetcher):
            self._busy[id(node)] = node
            self._busy = {k: each for k, each in self._busy.items() if _is_busy(each)}
            window = max(1, UPLOAD_CHUNKS // max(1, len(self._busy)))
            if (
                len(self._small_messages) == SMALL_MESSAGE_RATE
                and now - self._small_messages[0] < SMALL_MESSAGE_PERIOD_S
            ):
                window = min(window, UPLOAD_CHUNKS_AMID_SMALL_MESSAGES)
            out.extend(SendTo(node.peer, request) for request in node.fetcher.requests(window))


def _is_busy(node: Node) -> bool:
    return node.alive and bool(len(node.fetcher))
