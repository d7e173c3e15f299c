"""A network in memory with a virtual clock and seeded faults, for the very same cores.

Everything that happens follows from one seed: a history that went wrong can be run again.
`VirtualNetwork` carries frames between the `BrokerHost` and any number of `LinkHost`
objects; it loses, delays, duplicates and reorders them, and cuts connections. Hosts can
crash at any moment and start again: the broker's ledger is a real one in a folder, torn
where the crash caught it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmq.broker import link_state as link
from fedmq.broker import shared_files, state
from fedmq.broker.entries import MESSAGES, PAYLOAD, segment_numbers, segment_path
from fedmq.broker.headers import (
    decode_frame,
    decode_message,
    encode_frame,
)
from fedmq.broker.ledger import Ledger
from fedmq.broker.link import Link
from fedmq.broker.link_state import Delivery
from fedmq.broker.restore import open_broker
from fedmq.broker.wire import (
    AnyFrame,
    Blob,
    Buffer,
    Done,
    Frame,
    Hello,
    Message,
    Over,
    Post,
    Welcome,
)


@dataclass(frozen=True)
class Faults:
    """What becomes of each frame: probabilities, and seconds.

    loss, duplicate: of a frame. reorder: that a frame is held back for up to
    ``reorder_s``, while others pass it. delay_s: the mean of what every frame takes.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.5
    delay_s: float = 0.005


class VirtualNetwork:
    """The clock, and the connections between nodes and their broker.

    Args:
        rng: of all faults and delays.
        faults: may be replaced at any time.

    Attributes:
        now: virtual time, in seconds.
        broker: takes what nodes send; set by `BrokerHost`.
        share_files: nodes read blobs from the broker's ledger, as on one host.
    """

    def __init__(self, rng: random.Random, faults: Faults | None = None) -> None:
        self.rng = rng
        self.faults = faults or Faults()
        self.now = 1000.0
        self.broker: BrokerHost | None = None
        self.share_files = False
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self._ends: dict[bytes, LinkHost] = {}
        self._last_at: dict[tuple[bytes, bool], float] = {}
        self._away: set[str] = set()

    def at(self, when: float, act: Callable[[], object]) -> None:
        """Let something happen at a time."""
        heapq.heappush(self._events, (max(when, self.now), next(self._count), act))

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Let something happen after a while."""
        self.at(self.now + seconds, act)

    def step(self) -> bool:
        """Let the next thing happen; False if nothing is left."""
        if not self._events:
            return False
        self.now, _, act = heapq.heappop(self._events)
        act()
        return True

    def connect(self, host: LinkHost) -> bytes:
        """Give a node a new connection; the old one, and what is on it, is lost."""
        for peer in [peer for peer, each in self._ends.items() if each.name == host.name]:
            del self._ends[peer]
        peer = f"{host.name}#{next(self._count)}".encode()
        self._ends[peer] = host
        return peer

    def cut(self, host: LinkHost) -> None:
        """Break a node's connection; it has another one at once."""
        if host.peer in self._ends:
            host.peer = self.connect(host)

    def partition(self, name: str, seconds: float) -> None:
        """Lose everything between a node and the broker for a while."""
        self._away.add(name)
        self.after(seconds, lambda: self._away.discard(name))

    def is_up(self, peer: bytes) -> bool:
        """Tell whether a connection stands."""
        host = self._ends.get(peer)
        return host is not None and host.name not in self._away

    def to_broker(self, peer: bytes, frame: Frame, buffers: Sequence[Buffer]) -> None:
        """Carry a frame from a node."""
        header, parts = encode_frame(frame), [bytes(each) for each in buffers]
        self._carry(peer, lambda: self._arrive_at_broker(peer, header, parts), up=True)

    def to_node(self, peer: bytes, frame: Frame, buffers: Sequence[Buffer]) -> None:
        """Carry a frame to whoever is at the other end of a connection."""
        header, parts = encode_frame(frame), [bytes(each) for each in buffers]
        self._carry(peer, lambda: self._arrive_at_node(peer, header, parts), up=False)

    def _carry(self, peer: bytes, act: Callable[[], None], *, up: bool) -> None:
        if not self.is_up(peer):
            return
        faults, rng = self.faults, self.rng
        for _ in range(1 + (rng.random() < faults.duplicate)):
            if rng.random() < faults.loss:
                continue
            when = self.now + rng.expovariate(1 / faults.delay_s)
            if rng.random() < faults.reorder:
                when += rng.random() * faults.reorder_s
            else:
                # A connection keeps order, but for what is reordered on purpose.
                when = max(when, self._last_at.get((peer, up), 0.0))
                self._last_at[peer, up] = when
            self.at(when, act)

    def _arrive_at_broker(self, peer: bytes, header: bytes, parts: list[bytes]) -> None:
        if self.broker is not None and self.is_up(peer):
            self.broker.receive(peer, decode_frame(header), parts)

    def _arrive_at_node(self, peer: bytes, header: bytes, parts: list[bytes]) -> None:
        if self.is_up(peer):
            self._ends[peer].hear(link.Received(decode_frame(header), parts))


class BrokerHost:
    """A Broker core with a real ledger, which crashes and starts again.

    Args:
        network: where it is reached.
        folder: of its ledger.
        settings: of its core.

    Attributes:
        up: whether it runs.
        doomed: it crashes in the middle of its next batch.
    """

    def __init__(
        self, network: VirtualNetwork, folder: Path, settings: state.BrokerSettings
    ) -> None:
        self._network, self._folder, self._settings = network, folder, settings
        self._wake_at = float("inf")
        network.broker = self
        self.doomed = False
        self.ledger: Ledger
        self.start()

    def start(self) -> None:
        """Open the ledger and go on from it."""
        self.ledger, self.core = open_broker(self._folder, self._settings, self._network.now)
        self.up = True
        self.handle([])

    def receive(self, peer: bytes, frame: AnyFrame, buffers: Sequence[Buffer]) -> None:
        """Take a frame."""
        if self.up:
            self.handle([state.Received(peer, frame, buffers, 1)])

    def handle(self, events: Sequence[state.Event]) -> None:
        """Take a batch: write the ledger, then send."""
        sends = self.queue(events)
        if self.doomed:
            self.crash()
            return
        self.ledger.commit()
        for send in sends:
            self._put_out(send)
        self._plan_wake()

    def _put_out(self, send: state.Send) -> None:
        shared = self._network.share_files
        frame = shared_files.point(send, self.ledger) if shared else send.frame
        parts = [self.ledger.payload.read(*blob) for blob in send.blobs]
        self._network.to_node(send.peer, frame, parts)

    def queue(self, events: Sequence[state.Event]) -> list[state.Send]:
        """Queue what a batch wants written; return what is to be sent once it is."""
        sends: list[state.Send] = []
        todo = deque([*events, state.Wake()])
        while todo:
            for action in self.core.handle(todo.popleft(), self._network.now):
                match action:
                    case state.Append(entry, uses, kept):
                        self.ledger.use(entry.seq, uses, kept=kept)
                        self.ledger.append(entry)
                    case state.Put(name, size, start, data):
                        self.ledger.put(name, size, start, data)
                    case state.Drop(name, size):
                        self.ledger.drop(name, size)
                    case state.Release(names):
                        self.ledger.release(names)
                    case state.Probe(peer):
                        if not self._network.is_up(peer):
                            todo.append(state.Gone(peer))
                    case state.Send():
                        sends.append(action)
        return sends

    def crash(self) -> None:
        """End at once; what was being written is torn anywhere, what was written is not."""
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
                # Messages are written after their payload: none of this batch was.
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
    """A Link core and the inbox behind it; `take` is for whoever lives there.

    Args:
        network: where it is connected.
        hello: of this session.

    Attributes:
        receipted: ids of the posts that the broker has receipted.
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
        self.ended: link.Ended | None = None
        self.receipted: list[str] = []
        self.posted: list[str] = []
        self.on_news: Callable[[], None] = lambda: None
        self.doomed: Callable[[], object] | None = None
        self.files = shared_files.SharedFiles()
        self._numbers: dict[int, str] = {}
        self._last_seq = -1
        self._wake_at = float("inf")
        self.up = True
        self.peer = network.connect(self)
        self.hear(link.Wake())

    def hear(self, event: link.Event) -> None:
        """Give the core an event and carry out what it says."""
        if not self.up:
            return
        if isinstance(event, link.Received) and isinstance(event.frame, Welcome):
            self.files.look(event.frame)
        news = self._carry_out(self.core.handle(event, self.network.now))
        oldest = self.core.oldest_unreceipted
        for n in [n for n in self._numbers if n < oldest]:
            self.receipted.append(self._numbers.pop(n))
        due = self.core.deadline
        if due is not None and (due < self._wake_at or self._wake_at <= self.network.now):
            self._wake_at = due
            self.network.at(due, self._wake)
        if news:
            self.network.after(0.0, self._tell)

    def post(self, message: Message, data: Sequence[Buffer], consumes: tuple[int, ...]) -> None:
        """Post a message."""
        if not self.up:
            return
        self.posted.append(message.id)
        self.hear(link.Outgoing(message, data, consumes))
        if self.doomed is not None:
            self.crash()
            self.doomed()

    def say(self, frame: Done | Over) -> None:
        """Say something that is no message."""
        self.hear(link.Say(frame))

    def fetch(self, owner: str, blob: Blob) -> None:
        """Ask for a blob, which will be among `fetched`."""
        self.hear(link.Fetch(owner, blob))

    def take(self) -> Delivery:
        """Take the next delivery out of the inbox."""
        delivery = self.inbox.popleft()
        self.hear(link.Taken(delivery))
        return delivery

    def crash(self) -> None:
        """End at once, with everything that is not on a disk."""
        self.up = False
        self.files.close()

    def _carry_out(self, actions: Sequence[link.Action]) -> bool:
        news = False
        for action in actions:
            news |= not isinstance(action, link.Send)
            match action:
                case link.Send(frame, buffers):
                    if isinstance(frame, Post):
                        self._number(frame)
                    self.network.to_broker(self.peer, frame, buffers)
                case link.Deliveries(delivery):
                    if delivery.seq <= self._last_seq:
                        raise AssertionError(f"{self.name} was handed {delivery.seq} out of order")
                    self._last_seq = delivery.seq
                    self.inbox.append(delivery)
                case link.Fetched(owner, blob, data):
                    self.fetched[owner, blob.digest] = data
                case link.Admitted():
                    self.admitted = action
                case link.Ended():
                    self.ended = action
        return news

    def _number(self, post: Post) -> None:
        """Note under which number a message went out first."""
        if post.n >= self.core.oldest_unreceipted:
            self._numbers.setdefault(post.n, decode_message(post.message).id)

    def _tell(self) -> None:
        if self.up:
            self.on_news()

    def _wake(self) -> None:
        if self.up and self.network.now >= self._wake_at:
            self._wake_at = float("inf")
            self.hear(link.Wake())
