"""Decide about posts whose blobs have arrived: duplicate, rejected or accepted."""

from __future__ import annotations

from collections.abc import Sequence

from fedmq.broker.core.admission import check_message
from fedmq.broker.core.deduplication import PostFingerprint
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.state import Action, Node, PendingPost, Unpin
from fedmq.broker.errors import WireError
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire import schema
from fedmq.broker.wire.encoding import check_inline, decode_message
from fedmq.broker.wire.schema import Buffer, Post


class Acceptance:
    """The part of the Broker core that accepts or rejects posts, in order.

    Args:
        mailboxes: where accepted messages go.
    """

    def __init__(self, mailboxes: Mailboxes) -> None:
        self._mailboxes = mailboxes

    def check(self, node: Node, post: Post, buffers: Sequence[Buffer] = ()) -> PendingPost:
        """Decode a post's message; return it with the reason for a rejection, if there is one."""
        pending = PendingPost(post)
        try:
            message = pending.message = decode_message(post.message)
            check_inline(message.blobs, post.inline, buffers, schema.POST_BYTES)
            check_message(node, message)
        except WireError as error:
            pending.refusal = Rejection(error.code, str(error))
        else:
            pending.fingerprint = PostFingerprint.of(
                node.run.id, node.name, message.id, post.message
            )
        return pending

    def accept(
        self,
        node: Node,
        post: Post,
        pending: PendingPost,
        now: float,
        out: list[Action],
    ) -> None:
        """Accept or reject a post that `check` returned; ignore it if it is a duplicate."""
        message, refusal = pending.message, pending.refusal
        window = self._mailboxes.dedup_window
        # A message without an id is identified by its frame, so it is rejected only once.
        frame_name = f"{node.hello.session}/{post.n}"
        fingerprint = pending.fingerprint or PostFingerprint.of(
            node.run.id, node.name, frame_name, post.message
        )
        seen = window.seen(fingerprint)
        if seen == "other" and message is not None:
            reason = f"another message with the id {message.id!r} was accepted or rejected before"
            refusal = refusal or Rejection(Code.DUPLICATE_ID, reason)
            fingerprint = PostFingerprint.of(node.run.id, node.name, frame_name, post.message)
            seen = window.seen(fingerprint)
        if seen != "same":
            window.add(fingerprint)
        if seen == "same" or refusal or message is None:
            # Its sender has handled what the post consumes, in either case.
            self._mailboxes.consume(node, post.consumes, now, out)
            if seen != "same" and refusal is not None:
                name = message.id if message else frame_name
                self._mailboxes.refuse_post(node, name, refusal, fingerprint, now, out)
            out.append(Unpin(pending.names()))
            return
        # A node can only consume messages that were delivered to it.
        consumes = post.consumes and tuple(
            seq for seq in post.consumes if node.pending.pop(seq, None) is not None
        )
        self._mailboxes.accept(node.run, message, post.message, consumes, now, out)
