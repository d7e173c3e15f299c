"""A Link on a virtual network, with its inbox."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from fedmq.broker.link import events as link
from fedmq.broker.link import local_blobs
from fedmq.broker.link.core import Link
from fedmq.broker.link.events import Delivery
from fedmq.broker.virtual.network import VirtualNetwork
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    Blob,
    Buffer,
    Done,
    Hello,
    Message,
    Post,
    RunEnded,
    Welcome,
)


class LinkHost:
    """A Link core and its inbox, from which the node takes deliveries.

    Args:
        network: the virtual network.
        hello: of this session.

    Attributes:
        acknowledged: ids of the posts that the broker has acknowledged.
        posted: ids of all posts, in order.
        doomed: if set, this session ends right after its next post, and this is called.
    """

    def __init__(self, network: VirtualNetwork, hello: Hello) -> None:
        self.name = hello.node
        self.network = network
        self.core = Link(hello)
        self.inbox: deque[Delivery] = deque()
        self.fetched: dict[tuple[str, bytes], Buffer | None] = {}
        self.admitted: link.Admitted | None = None
        self.ended: link.LinkEnded | None = None
        self.acknowledged: list[str] = []
        self.posted: list[str] = []
        self.on_news: Callable[[], None] = lambda: None
        self.doomed: Callable[[], object] | None = None
        self.files = local_blobs.LocalBlobs()
        self._unacknowledged: dict[int, str] = {}
        """Ids of unacknowledged posts, by the number of their frame."""
        self._last_seq = -1
        self._wake_at = float("inf")
        self.up = True
        self.peer = network.connect(self)
        self.hear(link.Wake())

    def hear(self, event: link.Event) -> None:
        """Pass an event to the core, and carry out its actions."""
        if not self.up:
            return
        if isinstance(event, link.FrameReceived) and isinstance(event.frame, Welcome):
            self.files.open(event.frame)
        changed = self._carry_out(self.core.handle(event, self.network.now))
        oldest = self.core.oldest_unacknowledged
        while self._unacknowledged and (first := next(iter(self._unacknowledged))) < oldest:
            self.acknowledged.append(self._unacknowledged.pop(first))
        due = self.core.deadline
        if due is not None and (due < self._wake_at or self._wake_at <= self.network.now):
            self._wake_at = due
            self.network.at(due, self._wake)
        if changed:
            self.network.after(0.0, self._notify)

    def post(self, message: Message, data: Sequence[Buffer], consumes: tuple[int, ...]) -> None:
        """Post a message."""
        if not self.up:
            return
        self.posted.append(message.id)
        self.hear(link.PostMessage(message, data, consumes))
        if self.doomed is not None:
            self.crash()
            self.doomed()

    def publish(self, frame: Done | RunEnded) -> None:
        """Send a frame that is not a message."""
        self.hear(link.Publish(frame))

    def fetch(self, owner: str, blob: Blob) -> None:
        """Fetch a blob; it will be in `fetched`."""
        self.hear(link.Fetch(owner, blob))

    def take(self) -> Delivery:
        """Take the next delivery out of the inbox."""
        delivery = self.inbox.popleft()
        self.hear(link.Taken([delivery]))
        return delivery

    def crash(self) -> None:
        """Stop at once, and lose everything that is not on a disk."""
        self.up = False
        self.files.close()

    def _carry_out(self, actions: Sequence[link.Action]) -> bool:
        changed = False
        for action in actions:
            changed |= not isinstance(action, link.Send)
            match action:
                case link.Send(frame=frame, buffers=buffers):
                    if isinstance(frame, Post) and frame.n >= self.core.oldest_unacknowledged:
                        message = decode_message(frame.message)
                        self._unacknowledged.setdefault(frame.n, message.id)
                    self.network.to_broker(self.peer, frame, buffers)
                case link.Deliveries(deliveries):
                    for delivery in deliveries:
                        if delivery.seq <= self._last_seq:
                            text = f"{self.name} got delivery {delivery.seq} out of order"
                            raise AssertionError(text)
                        self._last_seq = delivery.seq
                    self.inbox.extend(deliveries)
                case link.Fetched(owner, blob, data):
                    self.fetched[owner, blob.digest] = data
                case link.Admitted():
                    self.admitted = action
                case link.LinkEnded():
                    self.ended = action
        return changed

    def _notify(self) -> None:
        if self.up:
            self.on_news()

    def _wake(self) -> None:
        if self.up and self.network.now >= self._wake_at:
            self._wake_at = float("inf")
            self.hear(link.Wake())
