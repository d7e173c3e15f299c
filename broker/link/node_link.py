"""`NodeLink`: a node's connection to its broker, for programs; the driver of the Link core."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from fedmq.broker.access.curve import NodeKeys
from fedmq.broker.errors import GaveUp, LinkClosed, Rejected, RunOver, VersionError
from fedmq.broker.link import events as link
from fedmq.broker.link.blob_reader import BlobReader
from fedmq.broker.link.contact import sentence
from fedmq.broker.link.core import Link
from fedmq.broker.link.dealer import DealerPort
from fedmq.broker.link.events import Delivery
from fedmq.broker.link.port import LinkPort
from fedmq.broker.wire.schema import Buffer, Done, Goodbye, Hello, Message, RunEnded, Welcome

_MAX_UNACKNOWLEDGED = 4096
_TAKEN_BATCH = 64
"""Number of taken deliveries that are reported to the core at once."""


class NodeLink:
    """A node's connection to its broker.

    Only `stop` and `hand_in` may be called from other threads than the main one. Either the main
    thread or the port runs the loop: see `LinkPort`.

    Args:
        port: the connection; `connect` makes a live one.
        hello: the node's Hello.

    Attributes:
        core: what the link sends, sends again, and has received.
        blobs: reads the blobs of deliveries.
    """

    def __init__(self, port: LinkPort, hello: Hello) -> None:
        self._port, self._hello = port, hello
        self.core = Link(hello)
        self._clock, self._lock = port.clock, port.lock
        self._inbox: deque[Delivery] = deque()
        """Deliveries that the program has not taken."""
        self._taken: deque[Delivery] = deque()
        """Deliveries that the program has taken, and the core does not know of yet."""
        self._handed_in: deque[Message] = deque()
        """Messages of other threads, to be posted in the next turn."""
        self.blobs = BlobReader(self._lock, self._handle, self._turn_until)
        self._welcome: Welcome | None = None
        self._ended: link.LinkEnded | None = None
        self._stopping = False
        port.start(self)

    @classmethod
    def connect(cls, endpoint: str, hello: Hello, keys: NodeKeys | None = None) -> NodeLink:
        """Connect to a broker.

        Args:
            endpoint: of the broker.
            hello: the node's Hello.
            keys: of the node and the broker; None for a broker without keys.

        Raises:
            LinkClosed: the endpoint is invalid, or its host name has no address.
        """
        return cls(DealerPort(endpoint, hello, keys), hello)

    def give_up_after(self, seconds: float) -> None:
        """Make waiting methods raise GaveUp after this time without the broker or the run."""
        with self._lock:
            self.core.give_up_after(seconds)

    def welcome(self) -> Welcome:
        """Wait until the broker admits this node, and return its Welcome.

        Raises:
            Rejected: the broker does not admit the node; the message is the reason.
            LinkClosed: the link was stopped.
        """
        while (welcome := self._welcome) is None:
            self._turn_until(lambda: self._welcome)
        return welcome

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` for a message; return whether `get` has one.

        Raises:
            LinkClosed: the run is over, or the link was stopped.
            Rejected: the broker does not admit this node any more.
        """
        if not self._inbox:
            deadline = self._clock() + timeout_s
            self._turn_until(lambda: self._inbox or self._clock() >= deadline, deadline)
        return bool(self._inbox)

    def get(self) -> Delivery:
        """Wait for the next message.

        Raises:
            LinkClosed: the run is over, or the link was stopped.
            Rejected: the broker does not admit this node any more.
        """
        if not self._inbox:
            self._turn_until(lambda: self._inbox)
        delivery = self._inbox.popleft()
        self._taken.append(delivery)
        if len(self._taken) >= _TAKEN_BATCH:
            with self._lock:
                self._catch_up()
                self._port.flush()
        return replace(delivery, source=self.blobs)

    def post(
        self, message: Message, data: Sequence[Buffer] = (), consumes: tuple[int, ...] = ()
    ) -> None:
        """Post a message with the bytes of its blobs; the caller must not change ``data`` any more.

        Waits while very many posts are unacknowledged, to bound the memory.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        self._handle(link.PostMessage(message, data, consumes))
        if self.core.unacknowledged > _MAX_UNACKNOWLEDGED:
            self.flush(_MAX_UNACKNOWLEDGED // 2)

    def hand_in(self, message: Message) -> None:
        """Post a message without blobs soon; may be called from another thread.

        Does nothing once the link has ended.
        """
        self._handed_in.append(message)
        if not self.has_ended:
            self._port.wake()

    def flush(self, limit: int = 0) -> None:
        """Wait until at most ``limit`` frames are unacknowledged.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        with self._lock:
            self._catch_up()
            self._turn_until(lambda: self.core.unacknowledged <= limit)

    def done(
        self,
        seqs: Sequence[int],
        refused: Mapping[int, str] | None = None,
        codes: Mapping[int, str] | None = None,
    ) -> None:
        """Report that deliveries have been handled, or rejected.

        Args:
            seqs: their numbers.
            refused: reasons of the rejected ones, by number; one that is not among ``seqs`` is
                delivered again to a new session.
            codes: codes of the reasons, by number: see `rejections.Code`.
        """
        reasons = {seq: why[:2000] for seq, why in (refused or {}).items()}
        if reasons:
            frame = Done(seqs=tuple(seqs), refused=reasons, codes=dict(codes) if codes else UNSET)
            self._handle(link.Publish(frame))
        used = tuple(seq for seq in seqs if seq not in reasons)
        if used:
            self._handle(link.Publish(Done(seqs=used)))

    def over(self, reason: str) -> None:
        """End the run; `get` raises RunOver once the broker has recorded the end."""
        self._handle(link.Publish(RunEnded(reason=reason)))

    def away(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for long work, in which the port runs the loop."""
        return self._port.away()

    def pause(self, seconds: float) -> None:
        """Wait for this many seconds.

        Raises:
            LinkClosed: the link ended meanwhile.
        """
        deadline = self._clock() + seconds
        self._turn_until(lambda: self._clock() >= deadline, deadline)

    def stop(self) -> None:
        """Make waiting methods raise LinkClosed soon; may be called from another thread."""
        self._stopping = True
        self._port.wake()

    def close(self, reason: str = "", *, failed: bool = False, silent: bool = False) -> None:
        """Say goodbye, and close the link.

        Args:
            reason: recorded in the ledger.
            failed: whether the node ends because of an error.
            silent: do not say goodbye, as if the node had been killed.
        """
        try:
            with self._lock:
                if self._ended is None and not silent:
                    self._handle(link.Publish(Goodbye(reason=reason, failed=failed)))
                self._stopping = True
                self._turn(self._clock())
        finally:
            self._port.close()
            self.blobs.files.close()

    # ---- the loop; only the holder of the lock may call these

    @property
    def has_ended(self) -> bool:
        """Return whether the link has ended, or was stopped."""
        return self._ended is not None or self._stopping

    @property
    def deadline(self) -> float | None:
        """Time by which the link needs a turn even if nothing arrives; None for never."""
        return self.core.deadline

    def turn_in_background(self) -> None:
        """Run one turn while the program does not; called by the port."""
        try:
            self._turn()
        except Exception as error:  # noqa: BLE001 - the program must learn of any error
            self._port.report_failure(error)
            self._ended = link.LinkEnded(f"the link failed: {error!r}")

    def _turn_until(self, done: Callable[[], object], until: float | None = None) -> None:
        """Run turns, none of which waits beyond ``until``, as long as the condition is false.

        Raises:
            LinkClosed: the link has ended, or was stopped.
        """
        with self._lock:
            while not done():
                if self._ended is not None:
                    raise self._error(self._ended)
                if self._stopping:
                    raise LinkClosed("the node was stopped")
                self._turn(until)

    def _error(self, ended: link.LinkEnded) -> Rejected | LinkClosed:
        """Return the exception for a link that has ended."""
        if ended.rejected:
            return Rejected(ended.reason, ended.code, ended.config)
        if (report := ended.out_of_touch) is not None:
            listener = self._port.listener() if report.answer is None else ""
            text = sentence(report, self._port.endpoint, self._hello.run)
            return GaveUp(f"gave up: {text}" + (f"; {listener}" if listener else ""))
        return RunOver(ended.reason) if ended.over else LinkClosed(ended.reason)

    def _turn(self, until: float | None = None) -> None:
        """Wait for an event, at most until ``until``, and handle it."""
        self._catch_up()
        deadline = self.core.deadline
        if deadline is None or (until is not None and until < deadline):
            deadline = until
        self._port.wait(deadline)
        now = self._clock()
        self._receive_all(now)
        while self._handed_in:
            event = link.PostMessage(self._handed_in.popleft(), (), ())
            self.carry_out(self.core.handle(event, now))
        self.carry_out(self.core.handle(link.Wake(), now))
        self._port.flush()

    def _catch_up(self) -> None:
        """Report to the core the deliveries that the program has taken since the last call."""
        if self._taken:
            taken = [self._taken.popleft() for _ in range(len(self._taken))]
            self.carry_out(self.core.handle(link.Taken(taken), self._clock()))

    def _handle(self, event: link.Event) -> None:
        with self._lock:
            self._catch_up()
            self.carry_out(self.core.handle(event, self._clock()))
            self._port.flush()

    def _receive_all(self, now: float) -> None:
        try:
            while self._ended is None and (frames := self._port.receive()):
                for frame, buffers in frames:
                    if isinstance(frame, Welcome):
                        self.blobs.files.open(frame)
                    self.carry_out(self.core.handle(link.FrameReceived(frame, buffers), now))
                self._port.flush()
        except VersionError as error:
            at = self._port.endpoint
            reason = f"the broker at {at} speaks another protocol version: {error}"
            self._ended = link.LinkEnded(reason, rejected=True, code="version")

    def carry_out(self, actions: Sequence[link.Action]) -> None:
        """Carry out actions of the core."""
        for action in actions:
            match action:  # the most frequent first
                case link.Send(frame=frame, buffers=buffers):
                    if isinstance(frame, Hello):
                        self._port.restart()  # the Welcome makes the core send all frames again
                    self._port.send(frame, buffers)
                case Delivery():
                    self._inbox.append(action)
                case link.ChunkStreamed(data):
                    self.blobs.streamed.append(data)
                case link.Fetched(owner, blob, data):
                    self.blobs.fetched[owner, blob.digest] = data
                case link.Admitted(welcome):
                    self._welcome = welcome
                case link.Blocked() | link.OutOfTouch() | link.BackInTouch():
                    self._port.report(action)
                case link.LinkEnded():
                    self._ended = action

    def validate_state(self) -> None:
        """Raise AssertionError if the state of the link is inconsistent."""
        self.core.validate_state()
        before = self.core.taken - 1
        for delivery in (*self._taken, *self._inbox):
            if delivery.seq <= before:
                raise AssertionError(f"delivery {delivery.seq} comes after {before}")
            before = delivery.seq
        if before >= self.core.received:
            raise AssertionError(f"delivery {before} is in the inbox, but was not received")
