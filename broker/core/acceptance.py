"""The way of a post through the broker: parse, resolve its blobs, accept or reject it.

`Acceptance.parse` makes a `PendingPost`, `fedmq.broker.core.uploads` finds or fetches its blobs,
and `Acceptance.apply` accepts it once they are stored. Each stage may return a `RejectedPost`
instead, which `apply` rejects in its turn. `fedmq.broker.core.mailboxes` delivers what is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmq.broker.core.admission import check_message
from fedmq.broker.core.deduplication import PostFingerprint
from fedmq.broker.core.events import Action, Unpin
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.state import Node, PendingPost, RejectedPost
from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import blob_name
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire import schema
from fedmq.broker.wire.encoding import check_inline, decode_message
from fedmq.broker.wire.schema import Buffer, Message, Post


class Acceptance:
    """The first and the last stage of a post.

    Args:
        mailboxes: where accepted messages go.
    """

    def __init__(self, mailboxes: Mailboxes) -> None:
        self._mailboxes = mailboxes

    def parse(
        self, node: Node, post: Post, buffers: Sequence[Buffer] = ()
    ) -> PendingPost | RejectedPost:
        """Decode a post's message, and check that the node may post it."""
        message: Message | None = None
        try:
            message = decode_message(post.message)
            check_inline(message.blobs, post.inline, buffers, schema.POST_BYTES)
            check_message(node, message)
        except WireError as error:
            rejection = Rejection(error.code, str(error))
            # Its id may be another message's: its frame identifies it, so it is rejected once.
            frame_id, fingerprint = _frame_id(node, post)
            if message is None:
                return RejectedPost(post, rejection, frame_id, fingerprint)
            names = tuple(blob_name(message, blob) for blob in message.blobs)
            return RejectedPost(post, rejection, message.id, fingerprint, names)
        fingerprint = PostFingerprint.of(node.run.id, node.name, message.id, post.message)
        return PendingPost(post, message, fingerprint)

    def is_new(self, post: PendingPost) -> bool:
        """Return whether no message with this id was accepted or rejected before."""
        return self._mailboxes.dedup_window.seen(post.fingerprint) == "new"

    def apply(
        self, node: Node, post: PendingPost | RejectedPost, now: float, out: list[Action]
    ) -> None:
        """Accept a post whose blobs are stored, or reject it; ignore it if it is a duplicate."""
        window = self._mailboxes.dedup_window
        seen = window.seen(post.fingerprint)
        if seen == "other":
            post = _with_used_id(node, post)
            seen = window.seen(post.fingerprint)
        if seen != "same":
            window.add(post.fingerprint)
            if isinstance(post, PendingPost):
                self._accept(node, post, now, out)
                return
        # Its sender has handled what the post consumes, in either case.
        self._mailboxes.consume(node, post.frame.consumes, now, out)
        if seen != "same" and isinstance(post, RejectedPost):
            self._mailboxes.refuse_post(node, post, now, out)
        out.append(Unpin(post.names))

    def _accept(self, node: Node, post: PendingPost, now: float, out: list[Action]) -> None:
        # A node can only consume messages that were delivered to it.
        consumes = post.frame.consumes and tuple(
            seq for seq in post.frame.consumes if node.pending.pop(seq, None) is not None
        )
        self._mailboxes.accept(node.run, post.message, post.frame.message, consumes, now, out)


def _frame_id(node: Node, post: Post) -> tuple[str, PostFingerprint]:
    """Return an id for a post's frame, and the fingerprint of the post under this id."""
    name = f"{node.hello.session}/{post.n}"
    return name, PostFingerprint.of(node.run.id, node.name, name, post.message)


def _with_used_id(node: Node, post: PendingPost | RejectedPost) -> RejectedPost:
    """Return the rejection of a post whose id another message has."""
    if isinstance(post, PendingPost):
        reason = f"another message with the id {post.message.id!r} was accepted or rejected before"
        post = post.rejected(Code.DUPLICATE_ID, reason)
    _, fingerprint = _frame_id(node, post.frame)
    return RejectedPost(post.frame, post.rejection, post.id, fingerprint, post.names)
