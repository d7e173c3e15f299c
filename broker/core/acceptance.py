"""The way of a post through the broker: parse, resolve its blobs, accept or reject it.

`Acceptance.parse` makes a `PendingPost`, `fedmq.broker.core.uploads` finds or fetches its blobs,
and `Acceptance.apply` accepts it once they are stored. Each stage may return a `RejectedPost`
instead, which `apply` rejects in its turn. `fedmq.broker.core.mailboxes` delivers what is accepted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from fedmq.broker.access.rights import must_answer
from fedmq.broker.core.deduplication import PostFingerprint
from fedmq.broker.core.events import Action, Unpin
from fedmq.broker.core.mailboxes import MAX_TIMERS, Mailboxes, timer_of
from fedmq.broker.core.state import Node, PendingPost, RejectedPost
from fedmq.broker.errors import WireError
from fedmq.broker.ledger.entries import BlobName, blob_name
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire import schema
from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    AVAILABILITY,
    CHECKPOINT,
    CLIENT,
    CONTINUED,
    EVALUATOR,
    MAX_RANGES,
    RECORD,
    TIMER,
    node_address,
)
from fedmq.broker.wire.client_map import is_range
from fedmq.broker.wire.encoding import (
    Envelope,
    check_inline,
    decode_envelope,
    decode_message,
    is_deeper,
)
from fedmq.broker.wire.schema import MAX_DEPTH, Blob, Buffer, Message, Post

BROKERS_OWN = ("joined", "left", "tick", "refused", CONTINUED)
"""Kinds of messages that only the broker may send."""
_ADDRESSES = (AGGREGATOR, EVALUATOR, RECORD, CHECKPOINT, TIMER)
_CLIENTS = f"{CLIENT}/"

_SMALL_BYTES = 1024
"""A message of at most this size is decoded in one step: that takes as long as its envelope."""

_OF_ANSWERS = (Code.LIMIT, Code.BAD_BLOB, Code.MISSING_BLOB, Code.TOO_DEEP)
"""Reasons for which a post is rejected that was asked for."""


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
        """Decode a post's message, and check that the node may post it.

        The body of a large message, which can take long to decode, is decoded last.
        """
        envelope: Envelope | Message | None = None
        message: Message | None = None
        try:
            envelope = _decode_first(post.message)
            answers = _check_envelope(node, envelope)
            fingerprint = PostFingerprint.of(node.run.id, node.name, envelope.id, post.message)
            if self._mailboxes.seen(node, fingerprint) != "new":
                return _duplicate(post, envelope.id, fingerprint)
            if answers and _lacks_request(node, post):
                return _not_asked(node, post, envelope)
            message = envelope if isinstance(envelope, Message) else decode_message(post.message)
            if buffers or post.inline:
                check_inline(message.blobs, post.inline, buffers, schema.POST_BYTES)
            _check_body(node, message)
            if message.to == TIMER and not self._mailboxes.may_set_timer(node.run):
                text = f"{MAX_TIMERS:,} timers wait at this broker, many of them of this run"
                raise WireError(text, Code.LIMIT)
        except WireError as error:
            rejection = Rejection(error.code, str(error))
            # Its id may be another message's: its frame identifies it, so it is rejected once.
            frame_id, fingerprint = _frame_id(node, post)
            name = frame_id if envelope is None else envelope.id
            names = tuple(blob_name(message, each) for each in message.blobs) if message else ()
            return RejectedPost(post, rejection, name, fingerprint, names)
        return PendingPost(post, message, fingerprint, answers=answers)

    def unasked(self, node: Node, post: PendingPost) -> RejectedPost | None:
        """Return the rejection of a post that does not answer a delivery, as it must.

        The first message that it consumes must be a request to this node that it has not answered,
        and the one that it names in ``re``.
        """
        request = self._mailboxes.request_id(node, post.frame.consumes[0])  # `parse` has checked it
        if request == post.message.re:
            return None
        return _not_asked(node, post.frame, post.message, post.message.blobs)

    def apply(
        self, node: Node, post: PendingPost | RejectedPost, now: float, out: list[Action]
    ) -> None:
        """Accept a post whose blobs are stored, or reject it; ignore it if it is a duplicate."""
        mailboxes = self._mailboxes
        seen = mailboxes.seen(node, post.fingerprint)
        if seen == "other":
            post = _with_used_id(node, post)
            seen = mailboxes.seen(node, post.fingerprint)
        elif (
            seen == "new"
            and isinstance(post, PendingPost)
            and (post.answers and _lacks_request(node, post.frame))
        ):
            # The post before it was the answer.
            post = _not_asked(node, post.frame, post.message, post.message.blobs)
        if seen != "same" and isinstance(post, PendingPost):
            self.accept(node, post, now, out)
            return
        if seen != "same" and isinstance(post, RejectedPost):
            self._refuse_request(node, post, now, out)
        # Its sender has handled what the post consumes, in either case.
        mailboxes.consume(node, post.frame.consumes, now, out)
        if seen != "same" and isinstance(post, RejectedPost):
            mailboxes.rejected_window.add(node.run.id, node.name, post.fingerprint)
            mailboxes.refuse_post(node, post, now, out)
        out.append(Unpin(post.names))

    def _refuse_request(
        self, node: Node, post: RejectedPost, now: float, out: list[Action]
    ) -> None:
        """Tell who asked that the answer was rejected: no other one will come."""
        seq = post.frame.consumes[0] if post.frame.consumes else -1
        is_answer = post.rejection.code in _OF_ANSWERS and node.pending.get(seq) not in _own(node)
        if is_answer and node.hello.role != AGGREGATOR:
            text = f"its answer was rejected: {post.rejection.reason}"[:2000]
            code = post.rejection.code
            self._mailboxes.refuse(node.run, seq, node.name, text, now, out, code=code)

    def accept(self, node: Node, post: PendingPost, now: float, out: list[Action]) -> None:
        """Accept a post whose blobs are stored, and which `parse` has checked in the same event."""
        leads = node.hello.role == AGGREGATOR
        self._mailboxes.note_accepted(node.run, node.name, post.fingerprint, leads=leads)
        # A node can only consume messages that were delivered to it.
        consumes = post.frame.consumes and tuple(
            seq for seq in post.frame.consumes if node.finish(seq)
        )
        self._mailboxes.accept(node.run, post.message, post.frame.message, consumes, now, out)


def _decode_first(data: bytes) -> Envelope | Message:
    """Decode a small message; of a large one, which can take long to decode, only the envelope.

    Raises:
        WireError: the bytes are not a message.
    """
    if len(data) > _SMALL_BYTES:
        return decode_envelope(data)
    try:
        return decode_message(data)
    except WireError:
        return decode_envelope(data)  # it may be valid, and tells the id


def _frame_id(node: Node, post: Post) -> tuple[str, PostFingerprint]:
    """Return an id for a post's frame, and the fingerprint of the post under this id."""
    name = f"{node.hello.session}/{post.n}"
    return name, PostFingerprint.of(node.run.id, node.name, name, post.message)


def _duplicate(post: Post, name: str, fingerprint: PostFingerprint) -> RejectedPost:
    """Return the rejection of a post that is applied only if its id is another message's."""
    reason = f"another message with the id {name!r} was accepted or rejected before"
    return RejectedPost(post, Rejection(Code.DUPLICATE_ID, reason), name, fingerprint)


def _with_used_id(node: Node, post: PendingPost | RejectedPost) -> RejectedPost:
    """Return the rejection of a post whose id another message has."""
    _, fingerprint = _frame_id(node, post.frame)
    if isinstance(post, PendingPost):
        found = _duplicate(post.frame, post.message.id, fingerprint)
        return msgspec.structs.replace(found, names=post.names)
    return msgspec.structs.replace(post, fingerprint=fingerprint)


def _lacks_request(node: Node, post: Post) -> bool:
    """Return whether a post consumes no request to its node first that it could answer."""
    seq = post.consumes[0] if post.consumes else -1
    # What comes to the node's own address is about its messages, and asks for nothing.
    return seq >= node.sent or node.pending.get(seq) in _own(node)


def _own(node: Node) -> tuple[str | None, str]:
    """Return the addresses of messages that nobody waits for an answer to; None: there is none."""
    return None, node_address(node.name)


def _not_asked(
    node: Node, post: Post, message: Envelope | Message, blobs: Sequence[Blob] = ()
) -> RejectedPost:
    """Return the rejection of a post that nobody asked for; ``blobs``: that it may have stored."""
    text = (
        f"expected {message.kind!r} to answer a message that this node has received and not "
        "answered, to name it in re, and to consume it"
    )
    # Its id is not used up: the same answer may come again once it was asked.
    _, fingerprint = _frame_id(node, post)
    names = tuple(BlobName(node.run.id, node.name, each.digest) for each in blobs)
    return RejectedPost(post, Rejection(Code.NOT_ASKED, text), message.id, fingerprint, names)


def _check_envelope(node: Node, message: Envelope | Message) -> bool:
    """Check that a node may post a message: its sender and run, its kind and address.

    Returns:
        Whether the message must be an answer.

    Raises:
        WireError: the reason for a rejection.
    """
    if message.sender != node.name or message.run != node.run.id:
        raise WireError(
            f"expected a message from {node.name} in run {node.run.id}, "
            f"got one from {message.sender} in {message.run}",
            Code.NOT_OWN,
        )
    if message.kind in BROKERS_OWN:
        raise WireError(f"only the broker may send {message.kind!r}", Code.RESERVED_KIND)
    to_client = message.to.startswith(_CLIENTS)
    answers = must_answer(node.hello.role, message.kind, CLIENT if to_client else message.to)
    if answers is None:
        if fault := _address_fault(message.to, node.run.total_clients):
            raise WireError(fault, Code.NO_ADDRESS)
        text = f"the {node.hello.role} may not post {message.kind!r} to {message.to!r}"
        raise WireError(text, Code.NOT_ALLOWED)
    if to_client and (fault := _address_fault(message.to, node.run.total_clients)):
        raise WireError(fault, Code.NO_ADDRESS)
    return answers


def _check_body(node: Node, message: Message) -> None:
    """Check the body of a message.

    Raises:
        WireError: the reason for a rejection.
    """
    if is_deeper(message.body, MAX_DEPTH):
        raise WireError(f"expected a body nested at most {MAX_DEPTH} deep", Code.TOO_DEEP)
    if message.to == TIMER:
        timer_of(message)
    if message.kind == AVAILABILITY:
        _check_availability(node, message)


def _check_availability(node: Node, message: Message) -> None:
    """Check that a message is about the availability of clients that its sender hosts.

    Raises:
        WireError: the reason for a rejection.
    """
    ranges = []
    if type(message.body.get("more", False)) is not bool:
        raise WireError("expected true or false as more", Code.MALFORMED)
    if message.blobs:
        raise WireError("expected no blobs in a message about availability", Code.MALFORMED)
    for name in ("back", "away"):
        part = message.body.get(name)
        if not isinstance(part, list) or not all(map(is_range, part)):
            text = f"expected a body with back and away, lists of ranges [low, high]; {name} is not"
            raise WireError(text, Code.MALFORMED)
        ranges += part
    if len(ranges) > MAX_RANGES:
        text = f"expected at most {MAX_RANGES} ranges of clients, got {len(ranges)}"
        raise WireError(text, Code.LIMIT)
    hosted = sorted(node.hello.clients)
    for low, high in ranges:
        at = bisect_right(hosted, (low, math.inf)) - 1
        if at < 0 or high > hosted[at][1]:
            text = f"clients {low} to {high} are not in one range of clients of {node.name}"
            raise WireError(text, Code.WRONG_CLIENT)


def _address_fault(address: str, clients: int) -> str:
    """Return why an address does not exist in a run with this number of clients; "" if it does."""
    if address in _ADDRESSES:
        return ""
    kind, _, number = address.partition("/")
    if kind != CLIENT or not number.isascii() or not number.isdigit():
        return f"no such address: {address!r}"
    if number != str(int(number)):
        return f"no such address: {address!r}; expected client/{int(number)}"
    if int(number) >= clients:
        return (
            f"client {number} is out of range: this run has {clients} clients, 0 to {clients - 1}"
        )
    return ""
