"""Run cores on a virtual network: a Broker with a real ledger, and Links with their inboxes.

Hosts can crash at any moment and start again. A crash tears the broker's ledger, which is in a
folder.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmq.broker.core import state
from fedmq.broker.core.blob_locations import point_to_blobs
from fedmq.broker.core.recovery import open_broker
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_numbers, segment_path
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.link import events as link
from fedmq.broker.link import local_blobs
from fedmq.broker.link.core import Link
from fedmq.broker.link.events import Delivery
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.network import VirtualNetwork
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import (
    AnyFrame,
    Blob,
    Buffer,
    Done,
    Hello,
    Message,
    Post,
    RunEnded,
    Welcome,
)


class BrokerHost:
    """A Broker core with a real ledger, which can crash and start again.

    Args:
        network: the virtual network.
        folder: of its ledger.
        settings: of its core.
        draw_identity: see `Broker`; by default ``virtual1``, ``virtual2``, ..., across crashes.

    Attributes:
        up: whether it is running.
        doomed: whether it crashes in the middle of its next batch.
    """

    def __init__(
        self,
        network: VirtualNetwork,
        folder: Path,
        settings: BrokerSettings,
        draw_identity: Callable[[], str] | None = None,
    ) -> None:
        self._network, self._folder, self._settings = network, folder, settings
        # Counted, so that a history depends only on its seed.
        self._draw_identity = draw_identity or map("virtual{}".format, itertools.count(1)).__next__
        self._wake_at = float("inf")
        network.broker = self
        self.doomed = False
        self.ledger: Ledger
        self.start()

    def start(self) -> None:
        """Open the ledger and continue from it."""
        self.ledger, self.core = open_broker(
            self._folder,
            self._settings,
            Clock(self._now, self._now),
            draw_identity=self._draw_identity,
        )
        self.up = True
        self.handle([])

    def _now(self) -> float:
        return self._network.now

    def receive(self, peer: bytes, frame: AnyFrame, buffers: Sequence[Buffer]) -> None:
        """Handle a frame from a connection."""
        if self.up:
            self.handle([state.ReceivedFrom(peer, frame, buffers, 1)])

    def handle(self, events: Sequence[state.Event]) -> None:
        """Handle a batch: write the ledger, then send."""
        sends = self.queue(events)
        if self.doomed:
            self.crash()
            return
        self.ledger.commit()
        for send in sends:
            self._send(send)
        self._plan_wake()

    def _send(self, send: state.SendTo) -> None:
        shared = self._network.share_files
        frame = point_to_blobs(send, self.ledger, str(self._folder)) if shared else send.frame
        parts = [self.ledger.payload.read(*blob) for blob in send.blobs]
        self._network.to_node(send.peer, frame, parts)

    def queue(self, events: Sequence[state.Event]) -> list[state.SendTo]:
        """Handle a batch of events: queue writes; return the frames to send after the commit."""
        sends: list[state.SendTo] = []
        queue = deque([*events, state.TimerFired()])
        while queue:
            for action in self.core.handle(queue.popleft(), self._network.now):
                match action:  # the most frequent first
                    case state.SendTo():
                        sends.append(action)
                    case state.Append(entry=entry, uses=uses, kept=kept):
                        self.ledger.use(entry.seq, uses, kept=kept)
                        self.ledger.append(entry)
                    case state.Put(name, size, start, data):
                        self.ledger.put(name, size, start, data)
                    case state.Discard(name, size):
                        self.ledger.discard(name, size)
                    case state.Unpin(names):
                        self.ledger.unpin(names)
                    case state.Probe(peer):
                        if not self._network.is_up(peer):
                            queue.append(state.Gone(peer))
        return sends

    def crash(self) -> None:
        """Stop at once: writes that were not committed are torn at a random byte."""
        rng = self._network.rng
        self.up = self.doomed = False
        before = self._sizes()
        self.ledger.commit()
        for path, size in self._sizes().items():
            start = before.get(path, 0)
            torn = rng.randint(start, size)
            with path.open("r+b") as file:
                file.truncate(torn)
            if path.name.startswith(PAYLOAD) and torn < size:
                # Messages are written after their payload, so none of this batch was written.
                for other, begin in before.items():
                    if other.name.startswith(MESSAGES):
                        with other.open("r+b") as file:
                            file.truncate(begin)
                break
        self.ledger.close()

    def _sizes(self) -> dict[Path, int]:
        paths = [
            segment_path(self._folder, family, number)
            for family in (PAYLOAD, MESSAGES)
            for number in segment_numbers(self._folder, family)
        ]
        return {path: path.stat().st_size for path in paths}

    def _plan_wake(self) -> None:
        due = self.core.deadline
        if due is not None and (due < self._wake_at or self._wake_at <= self._network.now):
            self._wake_at = due
            self._network.at(due, self._wake)

    def _wake(self) -> None:
        if self.up and self._network.now >= self._wake_at:
            self._wake_at = float("inf")
            self.handle([])


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
