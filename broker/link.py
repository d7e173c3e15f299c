"""The Link core: a node's side of the wire; no sockets, no clock, no threads.

``handle(event, now) -> [action]``. It says Hello until it is welcomed, sends posts again
until they are receipted, serves the blobs that it posted, pulls those that it was asked
to fetch, hands each delivery on once, and beats when it has nothing else to say.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from fedmq.broker.errors import WireError
from fedmq.broker.fetch import Fetcher, Owned
from fedmq.broker.wire import (
    AnyFrame,
    Beat,
    Blob,
    Buffer,
    Bye,
    Chunk,
    Deliver,
    Done,
    Frame,
    Hello,
    Message,
    Numbered,
    Over,
    Post,
    Receipt,
    Refused,
    Reject,
    Stranger,
    Tick,
    Wait,
    Want,
    Welcome,
    check_inline,
    decode_message,
    encode_message,
    inline_choice,
)

HELLO_AGAIN_S = 1.0
DONE_WITHIN_S = 0.02
_DONE_BATCH = 500


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the ledger: its number and time there, and the blobs that came along."""

    seq: int
    at: float
    message: Message
    inline: Mapping[int, Buffer]


# ---- events


@dataclass(frozen=True, slots=True)
class Received:
    """A frame from the broker."""

    frame: AnyFrame
    buffers: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The node posts a message; ``data[i]`` are the bytes of its i-th blob."""

    message: Message
    data: Sequence[Buffer] = ()
    consumes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fetch:
    """The node wants the bytes of a blob."""

    owner: str
    blob: Blob


@dataclass(frozen=True, slots=True)
class Say:
    """The node says something that needs no receipt: Done, Tick, Over or Bye."""

    frame: Done | Tick | Over | Bye


@dataclass(frozen=True, slots=True)
class Wake:
    """A deadline has passed."""


Event = Received | Outgoing | Fetch | Say | Wake


# ---- actions


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame to the broker."""

    frame: Frame
    buffers: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class Admitted:
    """The broker has welcomed this node for the first time."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Deliveries:
    """A message for the node."""

    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Fetched:
    """A blob is here; ``data`` is None if nobody holds it, or its bytes were wrong."""

    owner: str
    blob: Blob
    data: Buffer | None


@dataclass(frozen=True, slots=True)
class RefusedBack:
    """A message of this node was refused, with the reason."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The link is at its end. ``rejected``: the broker did not admit the node."""

    reason: str
    rejected: bool = False


Action = Send | Admitted | Deliveries | Fetched | RefusedBack | Ended


@dataclass
class _Said:
    """A numbered frame that has no receipt yet."""

    frame: Numbered
    buffers: Sequence[Buffer] = ()
    digests: tuple[bytes, ...] = ()
    consumes: tuple[int, ...] = ()


@dataclass
class _Served:
    data: Buffer
    posts: int = 0


@dataclass
class _Arriving:
    blob: Blob
    data: memoryview


class Link:
    """The state of one node's connection to its broker.

    Args:
        hello: what the node says of itself; its session is drawn by the caller.
    """

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._welcome: Welcome | None = None
        self._connected = False
        self._ended = False
        self._next_hello = 0.0
        self._last_sent = 0.0
        self._last_heard = 0.0
        self._said: OrderedDict[int, _Said] = OrderedDict()
        self._next_n = 0
        self._served: dict[bytes, _Served] = {}
        self._done: list[int] = []
        self._done_due = math.inf
        self._delivered: set[int] = set()
        """Numbers that the broker may deliver again in this session."""
        self._fetcher = Fetcher()
        self._arriving: dict[Owned, _Arriving] = {}

    @property
    def deadline(self) -> float | None:
        """When the core next wants a Wake, whatever arrives."""
        if self._ended:
            return None
        if self._welcome is None or not self._connected:
            return self._next_hello
        quiet = self._last_heard + self._welcome.lease_s
        return min(self._last_sent + self._welcome.beat_s, quiet, self._done_due)

    @property
    def unreceipted(self) -> int:
        """Number of numbered frames that the broker has not receipted."""
        return len(self._said)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; return what is to be done, in order."""
        if self._ended:
            return []
        out: list[Action] = []
        match event:
            case Received(frame, buffers):
                self._last_heard = now
                self._received(frame, buffers, now, out)
            case Outgoing():
                self._post(event, out)
            case Fetch(owner, blob):
                name = Owned(owner, blob.digest)
                if blob.size == 0:
                    out.append(Fetched(owner, blob, b""))
                elif name not in self._arriving:
                    self._arriving[name] = _Arriving(blob, np.empty(blob.size, np.uint8).data)
                    self._fetcher.add(owner, blob)
                    self._ask(out)
            case Say(Done(seqs=seqs, refused=refused)) if not refused:
                # Not urgent: it goes out with the next post, or with others, a little later.
                self._done += seqs
                self._done_due = min(self._done_due, now + DONE_WITHIN_S)
            case Say(Done(refused=refused)):
                # One each: any number of reasons, of any length, fits the frames.
                for seq, reason in refused.items():
                    self._say(Done(refused={seq: reason}), out)
            case Say(frame):
                self._say_done(out)
                if isinstance(frame, Numbered):
                    self._say(frame, out)
                elif self._connected:
                    out.append(Send(frame))
            case Wake():
                self._wake(now, out)
        if any(isinstance(action, Send) for action in out):
            self._last_sent = now
        return out

    def _say(self, frame: Numbered, out: list[Action], **more: Any) -> None:
        """Send a frame until it is receipted; ``more``: what is kept with it."""
        frame = msgspec.structs.replace(frame, n=self._next_n)
        if isinstance(frame, Done):
            more["consumes"] = (*frame.seqs, *frame.refused)
        said = self._said[frame.n] = _Said(frame, **more)
        self._next_n += 1
        if self._connected:
            out.append(Send(frame, said.buffers))

    def _say_done(self, out: list[Action]) -> None:
        while self._done:
            done, self._done = self._done[:_DONE_BATCH], self._done[_DONE_BATCH:]
            self._say(Done(seqs=tuple(done)), out)
        self._done_due = math.inf

    def _say_hello(self, now: float, out: list[Action]) -> None:
        self._next_hello = now + HELLO_AGAIN_S
        first = next(iter(self._said), self._next_n)
        out.append(Send(msgspec.structs.replace(self._hello, first=first)))

    def _wake(self, now: float, out: list[Action]) -> None:
        if now >= self._done_due:
            self._say_done(out)
        if self._welcome is not None and self._connected:
            if now >= self._last_heard + self._welcome.lease_s:
                self._connected = False
                self._next_hello = now
            elif now >= self._last_sent + self._welcome.beat_s:
                out.append(Send(Beat()))
        if not self._connected and now >= self._next_hello:
            self._say_hello(now, out)

    def _received(
        self, frame: AnyFrame, buffers: Sequence[Buffer], now: float, out: list[Action]
    ) -> None:
        match frame:
            case Welcome():
                self._welcomed(frame, out)
            case Stranger():
                # Each frame on its way draws one; one Hello answers them all.
                if self._connected:
                    self._connected = False
                    self._say_hello(now, out)
            case Reject(reason=reason):
                self._ended = True
                out.append(Ended(reason, rejected=True))
            case Over(reason=reason):
                self._ended = True
                out += [Send(Bye(reason="the run is over")), Ended(reason)]
            case Receipt(upto=upto):
                self._receipted(upto)
            case Deliver():
                self._deliver(frame, buffers, out)
            case Want():
                self._serve(frame, out)
            case Chunk():
                self._chunk(frame, buffers, out)
            case Refused(id=name, reason=reason):
                out.append(RefusedBack(name, reason))
            case Wait() | Beat():
                pass
            case _:
                pass

    def _welcomed(self, welcome: Welcome, out: list[Action]) -> None:
        if self._welcome is None:
            out.append(Admitted(welcome))
        self._welcome = welcome
        self._connected = True
        out.extend(Send(said.frame, said.buffers) for said in self._said.values())
        self._fetcher.restart()
        self._ask(out)

    def _post(self, event: Outgoing, out: list[Action]) -> None:
        message = event.message
        # A model goes out with the first of its tasks; the broker has it for the others.
        inline = tuple(
            index
            for index in inline_choice(message.blobs)
            if message.blobs[index].digest not in self._served
        )
        data = encode_message(message)  # an error leaves everything as it was
        with_it, self._done = self._done[:_DONE_BATCH], self._done[_DONE_BATCH:]
        if not self._done:
            self._done_due = math.inf
        consumes = (*event.consumes, *with_it)
        digests = tuple(blob.digest for blob in message.blobs)
        for digest, each in zip(digests, event.data, strict=True):
            self._served.setdefault(digest, _Served(each)).posts += 1
        self._say(
            Post(message=data, inline=inline, consumes=consumes),
            out,
            buffers=[event.data[index] for index in inline],
            digests=digests,
            consumes=consumes,
        )

    def _receipted(self, upto: int) -> None:
        while self._said and next(iter(self._said)) <= upto:
            _, said = self._said.popitem(last=False)
            self._delivered.difference_update(said.consumes)
            for digest in said.digests:
                served = self._served[digest]
                served.posts -= 1
                if not served.posts:
                    del self._served[digest]

    def _deliver(self, frame: Deliver, buffers: Sequence[Buffer], out: list[Action]) -> None:
        if frame.seq in self._delivered:
            return
        try:
            message = decode_message(frame.message)
            check_inline(message.blobs, frame.inline, buffers)
        except WireError as error:
            self._delivered.add(frame.seq)
            self._say(Done(refused={frame.seq: str(error)[:2000]}), out)
            return
        self._delivered.add(frame.seq)
        inline = dict(zip(frame.inline, buffers, strict=True))
        out.append(Deliveries(Delivery(frame.seq, frame.at, message, inline)))

    def _serve(self, want: Want, out: list[Action]) -> None:
        reply = Chunk(owner=want.owner, digest=want.digest, start=want.start)
        served = self._served.get(want.digest) if want.owner == self._hello.node else None
        if served is None or want.start + want.size > memoryview(served.data).nbytes:
            out.append(Send(reply))
            return
        piece = memoryview(served.data).cast("B")[want.start : want.start + want.size]
        out.append(Send(reply, [piece]))

    def _chunk(self, chunk: Chunk, buffers: Sequence[Buffer], out: list[Action]) -> None:
        name = Owned(chunk.owner, chunk.digest)
        arriving = self._arriving.get(name)
        if arriving is None:
            return
        if not buffers:
            self._fetcher.drop(name)
            out.append(Fetched(name.owner, arriving.blob, None))
            del self._arriving[name]
        else:
            piece = self._fetcher.receive(chunk, buffers[0])
            if piece is None:
                return
            arriving.data[piece.start : piece.start + memoryview(piece.data).nbytes] = piece.data
            good = self._fetcher.finished(name)
            if good is not None:
                out.append(Fetched(name.owner, arriving.blob, arriving.data if good else None))
                del self._arriving[name]
        self._ask(out)

    def _ask(self, out: list[Action]) -> None:
        if self._connected:
            out.extend(Send(want) for want in self._fetcher.wants())
