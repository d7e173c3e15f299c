"""The Link core: a node's side of the wire; no sockets, no clock, no threads.

``handle(event, now) -> [action]``. The core sends Hello until it is welcomed, resends frames until
they are acknowledged, serves the blobs that it posted, pulls the blobs that the node fetches, hands
on each delivery once and in order, and sends heartbeats. Recovery from any loss: send Hello again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from fedmq.broker.errors import WireError
from fedmq.broker.link.contact import LINK, Contact, LinkEvent, LinkState
from fedmq.broker.link.downloads import Arrivals
from fedmq.broker.link.events import (
    Action,
    Admitted,
    Blocked,
    Delivery,
    Event,
    Fetch,
    FrameReceived,
    Leave,
    LinkEnded,
    More,
    PostMessage,
    Publish,
    ReadInPlace,
    Send,
    Taken,
    Wake,
    another_run,
)
from fedmq.broker.link.unacknowledged import Stall, UnacknowledgedFrames
from fedmq.broker.wire import schema
from fedmq.broker.wire.encoding import (
    check_inline,
    decode_message,
    encode_message,
    inline_choice,
)
from fedmq.broker.wire.schema import (
    AnyFrame,
    Buffer,
    Chunk,
    ChunkRequest,
    Deliver,
    DeliverAll,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    NumberedFrame,
    Post,
    RunEnded,
    Welcome,
)

HELLO_AGAIN_S = 1.0
BLOCKED_S = 0.5
CREDIT_BATCH = 256
"""Number of deliveries, or KiB of them, after which a heartbeat returns their credit."""
DONE_WITHIN_S = 0.02
_DONE_BATCH = 500
_CONNECTED, _ENDED = LinkState.CONNECTED, LinkState.ENDED  # a member of an enum is read slowly


class Link:
    """The state of one node's connection to its broker.

    Args:
        hello: the node's Hello, with a session that the caller has drawn.

    Attributes:
        state: changes as the table `LINK` lists.
        received: number of the next delivery: all earlier ones have been received.
        taken: number after the last delivery that the node has taken.
    """

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        """Sent until the node is admitted, and at each reconnect."""
        self.state = LinkState.CONNECTING
        self.received = self.taken = 0
        self._identity: str | None = None
        """Of the run, since the node was admitted."""
        self._beat_s = self._lease_s = math.inf
        """Of the last Welcome, in seconds."""
        self._next_hello = 0.0
        """Time of the next Hello, unless connected."""
        self._last_heard = 0.0
        """Time of the last frame from the broker."""
        self._last_beat = 0.0
        """Time of the last heartbeat."""
        self._unacknowledged = UnacknowledgedFrames()
        self._done: list[int] = []
        """Numbers of handled deliveries, to be reported."""
        self._done_due = math.inf
        """Time at which they are reported, unless a post takes them along before."""
        self._read = 0
        """Number of bytes of blobs that the node has read from the ledger's files."""
        self._unreported_credit = 0
        """Deliveries, and KiB of them, taken since `taken` was last reported."""
        self._chunks = 0
        """Number of chunks that have arrived or were requested here: grows with progress."""
        self._stall = Stall()
        self._last_stall_check = -math.inf
        """Time of the last answer to a heartbeat that was checked for progress."""
        self._arrivals = Arrivals()
        self._contact = Contact()

    @property
    def deadline(self) -> float | None:
        """Time at which the core needs a Wake even if nothing arrives; None for never."""
        if self.state is _ENDED:
            return None
        if self.state is not _CONNECTED:
            return min(self._next_hello, self._contact.due)
        beat, quiet = self._last_beat + self._beat_s, self._last_heard + self._lease_s
        return min(beat, quiet, self._done_due, self._contact.due)

    @property
    def unacknowledged(self) -> int:
        """Number of unacknowledged frames."""
        return len(self._unacknowledged)

    def validate_state(self) -> None:
        """Raise AssertionError if the state is inconsistent; for tests and simulation."""
        self._unacknowledged.validate_state()
        self._arrivals.validate_state()
        self._contact.validate_state()
        admitted = self._identity is not None
        if self.state is _CONNECTED:
            if not admitted or max(self._beat_s, self._lease_s) == math.inf:
                raise AssertionError("the link is connected, but has no Welcome")
        elif self.state is LinkState.CONNECTING and admitted:
            raise AssertionError("the link is connecting, but was admitted")
        elif self.state is LinkState.RECONNECTING and not admitted:
            raise AssertionError("the link is reconnecting, but was never admitted")
        if not 0 <= self.taken <= self.received:
            raise AssertionError(f"{self.taken} taken, but {self.received} received")
        if self._done and (self._done_due == math.inf or max(self._done) >= self.received):
            raise AssertionError(f"{self._done} are handled, {self.received} received")
        if self._unreported_credit < 0:
            raise AssertionError(f"the credit to return is {self._unreported_credit}")

    def _move(self, event: LinkEvent) -> bool:
        """Go to the next state of the table; return False if the event has no effect now."""
        after = LINK[self.state].get(event)
        if after is not None:
            self.state = after
        return after is not None

    def handle(self, event: Event, now: float) -> list[Action]:
        """Handle one event; return the actions to carry out, in order."""
        if self.state is _ENDED:
            return []
        out: list[Action] = []
        match event:  # the most frequent first
            case FrameReceived(frame=frame, buffers=buffers):
                self._last_heard = now
                self._received(frame, buffers, now, out)
                if self.state is _CONNECTED and (back := self._contact.connected(now)):
                    out.append(back)
            case Wake():
                self._wake(now, out)
            case Taken(deliveries=deliveries):
                self._take(deliveries, now, out)
            case PostMessage():
                self._post(event, out)
            case Fetch():
                self._arrivals.fetch(event, out)
                self._ask(out)
            case More():
                self._arrivals.chunk_was_read()
                self._ask(out)
            case Leave(owner, blob):
                self._arrivals.leave(owner, blob)
            case Publish(Done(seqs=seqs, refused=refused)) if not refused:
                # Not urgent: it is sent with the next post, or a little later.
                self._done += seqs
                self._done_due = min(self._done_due, now + DONE_WITHIN_S)
            case Publish(Done(seqs=seqs, refused=refused) as done):
                # One frame each, so that any number of reasons of any length fits.
                for seq, why in refused.items():
                    self._send_numbered(
                        done.rejecting(seq, why, done.code_of(seq), {seq} & {*seqs}), out
                    )
            case Publish(frame):
                self._send_done(out)
                if isinstance(frame, NumberedFrame):
                    self._send_numbered(frame, out)
                elif self.state is _CONNECTED:
                    out.append(Send(frame))
            case ReadInPlace(nbytes):
                self._read += nbytes
        return out

    def _send_numbered(self, frame: NumberedFrame, out: list[Action], **more: Any) -> None:
        """Send a frame until it is acknowledged; ``more``: see `UnacknowledgedFrames.add`."""
        frame = msgspec.structs.replace(frame, taken=self.taken, read=self._read)
        self._unreported_credit = 0
        self._unacknowledged.add(frame, **more)
        if self.state is _CONNECTED:
            self._send_ready(out)

    def _send_ready(self, out: list[Action]) -> None:
        """Send the numbered frames that the window allows."""
        out.extend(self._unacknowledged.ready())
        if self._unacknowledged.wants_ack():
            out.append(Send(Heartbeat(taken=self.taken, ack=True)))

    def _send_done(self, out: list[Action]) -> None:
        while self._done:
            done, self._done = self._done[:_DONE_BATCH], self._done[_DONE_BATCH:]
            self._send_numbered(Done(seqs=tuple(done)), out)
        self._done_due = math.inf

    def _send_hello(self, now: float, out: list[Action]) -> None:
        self._contact.begin(now)
        self._next_hello = now + HELLO_AGAIN_S
        first = self._unacknowledged.oldest
        out.append(Send(msgspec.structs.replace(self._hello, first=first, got=self.received)))

    def give_up_after(self, seconds: float) -> None:
        """End the link once the node has been without its run for this long."""
        self._contact.give_up_s = seconds

    def _wake(self, now: float, out: list[Action]) -> None:
        if now >= self._contact.due:
            if given_up := self._contact.given_up(now):
                self._move(LinkEvent.GIVE_UP)
                out.append(LinkEnded("the node gave up", out_of_touch=given_up))
                return
            if report := self._contact.wake(now):
                out.append(report)
        if now >= self._done_due:
            self._send_done(out)
        if self.state is not _CONNECTED:
            if now >= self._next_hello:
                self._send_hello(now, out)
        elif now >= self._last_heard + self._lease_s:
            self._move(LinkEvent.SILENCE)
            self._send_hello(now, out)
        elif now >= self._last_beat + self._beat_s:
            self._beat(now, out)

    def _beat(self, now: float, out: list[Action]) -> None:
        self._last_beat = now
        self._unreported_credit = 0
        out.append(Send(Heartbeat(taken=self.taken)))

    def _take(self, deliveries: Sequence[Delivery], now: float, out: list[Action]) -> None:
        self.taken = deliveries[-1].seq + 1
        nbytes = sum(sum(map(len, each.inline.values())) for each in deliveries)
        self._unreported_credit += len(deliveries) + (nbytes >> 10)
        if self._unreported_credit >= CREDIT_BATCH and self.state is _CONNECTED:
            self._beat(now, out)

    def _answered(self, beat: Heartbeat, now: float, out: list[Action]) -> None:
        """Handle the answer to a heartbeat: find out whether frames were lost.

        What the broker sent before this answer has arrived before it. If something is outstanding
        at two answers in a row, and nothing has arrived in between, it was lost.
        """
        if self._identity is None or now < self._last_stall_check + self._beat_s / 2:
            return  # heartbeats that return credit follow one another closely
        self._last_stall_check = now
        due = (
            bool(self._unacknowledged)
            or bool(self._arrivals.outstanding)
            or beat.sent > self.received
        )
        moved = (self._unacknowledged.oldest, self._chunks, self.received)
        if self._stall.is_stuck(due=due, moved=moved):
            self._send_hello(now, out)

    def _received(
        self, frame: AnyFrame, buffers: Sequence[Buffer], now: float, out: list[Action]
    ) -> None:
        match frame:  # the most frequent first
            case Deliver():
                self._deliver(frame, buffers, out)
            case Chunk():
                self._chunks += 1
                self._arrivals.receive(frame, buffers, out)
                self._ask(out)
            case schema.Ack(upto=upto):
                self._unacknowledged.acknowledged(upto)
                if self.state is _CONNECTED:
                    self._send_ready(out)
            case Heartbeat():
                self._answered(frame, now, out)
            case ChunkRequest():
                self._serve(frame, out)
            case DeliverAll():
                for each in frame.each():
                    self._deliver(each, (), out)
            case Welcome():
                self._welcomed(frame, out)
            case schema.UnknownSession(dropped=dropped):
                # Each frame in flight draws one; a single Hello answers them all.
                if self._move(LinkEvent.UNKNOWN_SESSION):
                    if dropped is True:
                        self._unacknowledged.shrink_window()
                    self._send_hello(now, out)
            case schema.Reject(code=code, reason=reason, config=config):
                self._move(LinkEvent.REJECT)
                out.append(LinkEnded(reason, rejected=True, code=code, config=config or ""))
            case RunEnded(reason=reason):
                self._move(LinkEvent.RUN_END)
                out += [Send(Goodbye(reason="the run is over")), LinkEnded(reason, over=True)]
            case schema.StorageFull(reason=reason):
                self._move(LinkEvent.STORAGE_FULL)
                self._next_hello = now + BLOCKED_S
                self._contact.answered(frame, now)
                out.append(Blocked(reason))
            case schema.Wait():
                self._contact.answered(frame, now)
            case _:
                pass  # a frame of a later version

    def _welcomed(self, welcome: Welcome, out: list[Action]) -> None:
        if self._identity is None:
            out.append(Admitted(welcome))
        elif welcome.identity != self._identity:
            self._move(LinkEvent.OTHER_RUN)
            out += another_run(welcome.run)
            return
        self._move(LinkEvent.WELCOME)
        self._identity, self._beat_s, self._lease_s = (
            welcome.identity,
            welcome.beat_s,
            welcome.lease_s,
        )
        self._unacknowledged.restart()
        self._send_ready(out)
        self._arrivals.restart()
        self._ask(out)

    def _post(self, event: PostMessage, out: list[Action]) -> None:
        message = event.message
        # A model is sent with the first of its tasks; for the others, the broker has it.
        inline = tuple(
            index
            for index in inline_choice(message.blobs, schema.POST_BYTES)
            if not self._unacknowledged.serves(message.blobs[index].digest)
        )
        data = encode_message(message)  # before any change of state: it may raise
        done, self._done = self._done[:_DONE_BATCH], self._done[_DONE_BATCH:]
        if not self._done:
            self._done_due = math.inf
        self._send_numbered(
            Post(message=data, inline=inline, consumes=event.consumes + tuple(done)),
            out,
            buffers=[event.data[index] for index in inline],
            blobs=[blob.digest for blob in message.blobs],
            data=event.data,
        )

    def _deliver(self, frame: Deliver, buffers: Sequence[Buffer], out: list[Action]) -> None:
        if self._identity is None or not frame.after <= self.received <= frame.seq:
            return  # before the Welcome, a duplicate, or after a gap; it is sent again
        self.received = frame.seq + 1
        try:
            message = decode_message(frame.message)
            check_inline(message.blobs, frame.inline, buffers, schema.INLINE_BYTES)
        except WireError as error:
            seq = frame.seq
            self._send_numbered(Done.rejecting(seq, str(error)[:2000], error.code, (seq,)), out)
            return
        inline = dict(zip(frame.inline, buffers, strict=True))
        out.append(Delivery(frame.seq, frame.at, message, inline, frame.extents))

    def _serve(self, request: ChunkRequest, out: list[Action]) -> None:
        self._chunks += 1
        own = request.owner == self._hello.node
        data = self._unacknowledged.chunk(request) if own else None
        reply = Chunk(owner=request.owner, digest=request.digest, start=request.start)
        out.append(Send(reply, () if data is None else (data,)))

    def _ask(self, out: list[Action]) -> None:
        if self.state is _CONNECTED:
            out.extend(Send(request) for request in self._arrivals.requests())
