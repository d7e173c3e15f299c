"""What becomes of a post once its blobs are here: known already, refused, or accepted."""

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
    """The part of the Broker core that takes posts, in their order.

    Args:
        box: where accepted messages go.
    """

    def __init__(self, box: Mailboxes) -> None:
        self._mailboxes = box

    def check(self, node: Node, post: Post, buffers: Sequence[Buffer] = ()) -> PendingPost:
        """Read a post's message, and note why it cannot be taken, if so."""
        held = PendingPost(post)
        try:
            message = held.message = decode_message(post.message)
            check_inline(message.blobs, post.inline, buffers, schema.POST_BYTES)
            check_message(node, message)
        except WireError as error:
            held.refusal = Rejection(error.code, str(error))
        else:
            held.fingerprint = PostFingerprint.of(node.run.id, node.name, message.id, post.message)
        return held

    def accept(
        self,
        node: Node,
        post: Post,
        held: PendingPost,
        now: float,
        out: list[Action],
    ) -> None:
        """Accept a post that was checked, or refuse it; or neither, if it was here before."""
        message, refusal = held.message, held.refusal
        remembered = self._mailboxes.dedup_window
        # What has no id of its own is known by its number: it is refused, and only once.
        own_name = f"{node.hello.session}/{post.n}"
        mark = held.fingerprint or PostFingerprint.of(
            node.run.id, node.name, own_name, post.message
        )
        known = remembered.seen(mark)
        if known == "other" and message is not None:
            why = f"another message of the id {message.id!r} was here before"
            refusal = refusal or Rejection(Code.DUPLICATE_ID, why)
            mark = PostFingerprint.of(node.run.id, node.name, own_name, post.message)
            known = remembered.seen(mark)
        if known != "same":
            remembered.add(mark)
        if known == "same" or refusal or message is None:
            # Its sender is done with what it consumes all the same.
            self._mailboxes.consume(node, post.consumes, now, out)
            if known != "same" and refusal is not None:
                name = message.id if message else own_name
                self._mailboxes.refuse_post(node, name, refusal, mark, now, out)
            out.append(Unpin(held.names()))
            return
        # What is consumed is what the sender has, whatever it claims.
        consumes = post.consumes and tuple(
            seq for seq in post.consumes if node.pending.pop(seq, None) is not None
        )
        self._mailboxes.accept(node.run, message, post.message, consumes, now, out)
