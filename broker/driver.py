"""The broker's driver: carries out the actions of a Broker core, on any network, disk and clock.

A turn handles a batch of events, writes the ledger once, and only then sends: nothing is
acknowledged before it is in the ledger. While the disk is full, the frames of the unwritten batch
wait until it is written. What differs between a real and a virtual broker is behind `BrokerPort`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from fedmq.broker.access.rights import AccessStore
from fedmq.broker.blob_locations import point_to_blobs, shareable_name
from fedmq.broker.core.broker import Broker
from fedmq.broker.core.events import (
    AccessChanged,
    Action,
    Append,
    Charge,
    Discard,
    Disconnect,
    DiskFull,
    Enlist,
    Event,
    Forget,
    Gone,
    Log,
    Probe,
    Put,
    SendTo,
    TimerFired,
    Unpin,
)
from fedmq.broker.errors import BrokerFailed, LedgerDamage, LedgerError, NoSpace
from fedmq.broker.file_modes import restrict_folder
from fedmq.broker.ledger.disk import LOCAL_DISK, Disk
from fedmq.broker.ledger.entries import BlobName
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.log_limit import LimitedLog
from fedmq.broker.recovery import open_broker, random_identity
from fedmq.broker.settings import BrokerSettings, Continuation, LedgerSettings, Limits
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.schema import Buffer, Chunk, Deliver
from fedmq.broker.wire.send_queues import WaitingChunks

FULL_RETRY_S = 0.25
"""Time between two attempts to write to a full disk, in seconds."""
ACCESS_EACH_S = 0.5
"""Time between two looks whether the keys or their rights have changed, in seconds."""
_MOST_READS = 5
"""Requests of an unreadable blob after which the node learns that it is missing."""
_LOGGED_DAMAGE = 5
"""Most damaged ranges that are logged one by one."""


class BrokerPort(Protocol):
    """What the driver needs of the world that it runs in."""

    def send(self, peer: bytes, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Queue an encoded frame for a connection; it is lost if the connection is gone."""

    def has_room(self, peer: bytes) -> bool:
        """Return whether a connection has read enough to be sent a chunk."""

    def charge(self, peer: bytes) -> None:
        """Count the last message of a connection as a costly one."""

    def is_up(self, peer: bytes) -> bool:
        """Return whether a connection is up."""

    def disconnect(self, peer: bytes) -> None:
        """Close a connection, as far as the transport can; the core rejects what still comes."""

    def on_space(self, reason: str) -> None:
        """Report that the disk is full (``reason``), or that it is writable again ("")."""

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Log an event for people; ``level`` as in `logging`."""


class BrokerDriver:
    """Drives one Broker core and its ledger.

    Args:
        core: the core.
        ledger: its ledger.
        port: the network, and where logs go.
        clock: in seconds since 1970.
        settings: of the ledger; `share_files` decides whether nodes may read its files.
        access: who may connect; None for a broker without keys.
        log_lines_per_s: see `Limits`.

    Attributes:
        core, ledger: as given.

    Raises:
        OSError: who may connect cannot be read.
        ValueError: what says who may connect is invalid.
    """

    def __init__(
        self,
        core: Broker,
        ledger: Ledger,
        port: BrokerPort,
        clock: Clock,
        settings: LedgerSettings,
        access: AccessStore | None = None,
        log_lines_per_s: float = Limits.log_lines_per_s,
    ) -> None:
        self.core, self.ledger = core, ledger
        self._port, self._clock, self._access = port, clock, access
        self._log = LimitedLog(port.log, clock, log_lines_per_s)
        self._sends: list[SendTo] = []
        """Frames of this turn, to be sent once the ledger has been written."""
        self._chunks = WaitingChunks[SendTo](port.has_room)
        """By connection: chunks that it has requested, and that wait until it has read others."""
        self._held: list[SendTo] | None = None
        """While the disk is full: frames to send once the ledger has been written."""
        self._retry_at = 0.0
        self._failed_reads: Counter[BlobName] = Counter()
        self._shared = self._shareable_folder() if settings.share_files else ""
        """The ledger's folder as nodes are to open it; "" if files are not shared."""
        self._log_opening()
        self._access_at = math.inf
        """Time of the next look whether the keys or their rights have changed."""
        if access is not None:
            now = clock()
            self._who = access.load()
            """Who may connect, as last read."""
            self.carry_out(core.handle(AccessChanged(self._who), now), now)
            self._access_at = now + ACCESS_EACH_S

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: BrokerSettings,
        ledger_settings: LedgerSettings,
        port: BrokerPort,
        clock: Clock,
        *,
        disk: Disk = LOCAL_DISK,
        continuation: Continuation | None = None,
        draw_identity: Callable[[], str] = random_identity,
        access: AccessStore | None = None,
    ) -> BrokerDriver:
        """Open or create a ledger, and return the driver of a core that continues from it.

        Args:
            folder: the ledger's folder.
            settings: of the core.
            ledger_settings: of the ledger.
            port: see `BrokerDriver`.
            clock: see `open_broker`.
            disk: holds the folder.
            continuation: a run that continues with new sessions of all nodes.
            draw_identity: see `Broker`.
            access: see `BrokerDriver`.

        Raises:
            LedgerError: the ledger cannot be read or written.
            OSError, ValueError: see `BrokerDriver`.
        """
        ledger, core = open_broker(
            folder,
            settings,
            clock,
            durability=ledger_settings.durability,
            disk=disk,
            retain_bytes=ledger_settings.retain_bytes,
            redeliver_dead_letters=ledger_settings.redeliver_dead_letters,
            continuation=continuation,
            draw_identity=draw_identity,
        )
        lines_per_s = settings.limits.log_lines_per_s
        if reason := restrict_folder(folder):
            port.log("warning", "other users may be able to read the ledger", {"reason": reason})
        try:
            return cls(core, ledger, port, clock, ledger_settings, access, lines_per_s)
        except (OSError, ValueError):
            ledger.close()
            raise

    @property
    def deadline(self) -> float | None:
        """Time at which a turn is needed even if nothing arrives; None for never."""
        core = self.core.deadline if self._held is None else self._retry_at
        deadline = min(math.inf if core is None else core, self._access_at, self._log.due)
        return None if deadline == math.inf else deadline

    def turn(self, events: Iterable[Event]) -> None:
        """Handle a batch of events and the timers that are due, write the ledger, then send.

        Raises:
            BrokerFailed: the ledger cannot be read or written, other than for a full disk.
        """
        now = self._clock()
        try:
            if now >= self._access_at:
                self._look_at_access(now)
            for event in events:
                self.carry_out(self.core.handle(event, now), now)
            self.carry_out(self.core.handle(TimerFired(), now), now)
            self.write_and_send(now)
            if now >= self._log.due:
                self._log.report()
        except LedgerError as error:
            raise BrokerFailed(f"stopped serving, the ledger failed: {error}") from None

    def carry_out(self, actions: Sequence[Action], now: float) -> None:
        """Carry out the core's actions; entries, blobs and frames wait for the end of the turn."""
        answers: list[Event] = []
        ledger = self.ledger
        for action in actions:
            match action:  # the most frequent first
                case SendTo():
                    self._sends.append(action)
                case Append(entry=entry, uses=uses, kept=kept):
                    ledger.use(entry.seq, uses, kept=kept)
                    ledger.append(entry)
                case Put(name=name, size=size, start=start, data=data):
                    ledger.put(name, size, start, data)
                case Discard(name, size):
                    ledger.discard(name, size)
                case Unpin(names):
                    ledger.unpin(names)
                case Probe(peer):
                    if not self._port.is_up(peer):
                        answers.append(Gone(peer))
                case Forget(peer):
                    for sends in (self._sends, self._held or []):
                        sends[:] = [each for each in sends if each.peer != peer]
                    self._chunks.discard(peer)
                case Disconnect(peer):
                    self._port.disconnect(peer)
                case Charge(peer):
                    self._port.charge(peer)
                case Enlist(key, invite):
                    answers.append(self._enlist(key, invite, now))
                case Log(level, event, fields):
                    self._log(level, event, fields)
        for each in answers:
            self.carry_out(self.core.handle(each, now), now)

    def write_and_send(self, now: float) -> None:
        """Write the ledger, then send the frames that the core wants to send; end a turn.

        Raises:
            LedgerError: the ledger cannot be read or written, other than for a full disk.
        """
        if self._held is None:
            self._commit(now)
        elif now >= self._retry_at:
            self._retry(now)
        sends, self._sends = self._sends, []
        for send in sends:
            if not isinstance(send.frame, Chunk) or self._chunks.may_send(send.peer, send):
                self._send(send)
        if self._chunks:
            for send in self._chunks.take():
                self._send(send)

    @property
    def has_chunks(self) -> bool:
        """Return whether chunks wait until their connections have read others."""
        return bool(self._chunks)

    def close(self) -> None:
        """Write what is queued, and close the ledger."""
        try:
            self.ledger.close()
        except LedgerError as error:
            self._log("error", "cannot write the last entries", {"reason": str(error)})
        self._log.report()

    def check_access(self) -> None:
        """Look now whether the keys or their rights have changed: a peer wants to connect.

        Raises:
            BrokerFailed: see `turn`.
        """
        self._access_at = -math.inf
        self.turn(())

    def _look_at_access(self, now: float) -> None:
        """Tell the core if the keys or their rights have changed; keep those before if invalid."""
        self._access_at = now + ACCESS_EACH_S
        if self._access is None or not self._access.changed():
            return
        try:
            self._who = self._access.load()
        except (OSError, ValueError) as error:
            event = "cannot read who has access: the keys and rights from before still apply"
            self._log("error", event, {"reason": str(error)})
        else:
            self.carry_out(self.core.handle(AccessChanged(self._who), now), now)

    def _enlist(self, key: str, invite: str, now: float) -> AccessChanged:
        """Store a key that came with an invite; return who has access then."""
        if self._access is None:
            raise AssertionError("only a broker with keys has invites")
        try:
            self._who = self._access.enroll(key, invite, now)
        except (OSError, ValueError) as error:
            return AccessChanged(self._who, key, str(error))
        return AccessChanged(self._who)

    # ---- the ledger

    def _commit(self, now: float) -> None:
        """Write the ledger; if the disk is full, hold back the frames of this turn."""
        try:
            self.ledger.commit()
        except NoSpace as error:
            self._held, self._sends = self._sends, []
            self._retry_at = now + FULL_RETRY_S
            self._port.on_space(str(error))
            self.carry_out(self.core.handle(DiskFull(str(error)), now), now)

    def _retry(self, now: float) -> None:
        """Try again to write the ledger after the disk was full."""
        answers = self._sends  # to frames of this turn, of which the ledger holds nothing
        self._sends, self._held = self._held or [], None
        self._commit(now)
        self._sends += answers
        if self._held is None:
            self.carry_out(self.core.handle(DiskFull(""), now), now)
            self._port.on_space("")

    def _send(self, send: SendTo) -> None:
        """Hand a frame to the port, with its blobs from the ledger."""
        frame = send.frame
        if self._shared:
            try:
                frame = point_to_blobs(send, self.ledger, self._shared)
            except (OSError, RuntimeError, ValueError, LedgerError) as error:
                self._shared = ""
                self._cannot_share(repr(error))
        try:
            buffers = [self.ledger.payload.read(*blob) for blob in send.blobs] if send.blobs else []
        except LedgerError as error:
            if self._held is not None:
                return  # not written yet: the node requests it again
            self._log("warning", "cannot read a blob", {"reason": str(error)})
            passing = not isinstance(error, LedgerDamage)  # damage was read several times
            if isinstance(frame, Chunk) and passing and self._may_be_readable(send.blobs[0][0]):
                return  # the node requests it again
            # Without it, the node requests the blob, and gets a chunk without bytes.
            buffers = []
            if isinstance(frame, Deliver):
                frame = msgspec.structs.replace(frame, inline=())
        else:
            if self._failed_reads and send.blobs:
                self._failed_reads.pop(send.blobs[0][0], None)
        self._port.send(send.peer, encode_frame(frame), buffers)

    def _may_be_readable(self, name: BlobName) -> bool:
        """Return whether a blob that could not be read may be at a later request."""
        self._failed_reads[name] += 1
        return self._failed_reads[name] < _MOST_READS and self.ledger.size_of(name) is not None

    def _shareable_folder(self) -> str:
        try:
            return shareable_name(self.ledger.folder)
        except ValueError as error:
            self._cannot_share(str(error))
            return ""

    def share_as(self, name: str) -> None:
        """Name the ledger's folder to nodes other than by its path, if its files are shared."""
        self._shared = self._shared and name

    # ---- logs

    def _cannot_share(self, reason: str) -> None:
        event = "cannot share the ledger's files: nodes get blobs over the socket"
        self._log("warning", event, {"reason": reason})

    def _log_opening(self) -> None:
        """Log what opening the ledger has found."""
        log, ledger = self._log, self.ledger
        if ledger.cut_bytes:
            log("warning", "truncated an incomplete record", {"bytes": ledger.cut_bytes})
        skipped = "skipped damaged payload: no unfinished message needs it"
        for damage in ledger.damage[:_LOGGED_DAMAGE]:
            log("warning", skipped, {"at": str(damage)})
        if ledger.damage:
            log("warning", "run `fedmq ledger check`", {"damaged": len(ledger.damage)})
        if ledger.next_seq:
            log("info", "resuming from the ledger", {"entries": ledger.next_seq})
