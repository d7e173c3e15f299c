"""A broker in the virtual world: the broker's own driver, over a virtual network, disk and clock.

Its process can crash between turns, in a disk operation, or before it sends a frame; its machine
can lose power. It can be paused, and started again.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedmq.broker.access.rights import KEYLESS, AccessStore, Origin
from fedmq.broker.core.broker import Broker
from fedmq.broker.core.events import Event, ReceivedFrom
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.errors import BrokerFailed, LedgerError
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.virtual.disk import Crash, VirtualDisk
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.network import LEDGER, VirtualNetwork
from fedmq.broker.virtual.plain_disk import PlainDisk
from fedmq.broker.wire.clock import milliseconds_until
from fedmq.broker.wire.schema import AnyFrame, Buffer

_CLOSES_S = 1.0
"""Time after which a connection is broken whose key was revoked, in seconds."""
_RESTART_S = 2.0
"""Longest time after which a broker that its ledger has stopped starts again, in seconds."""


class VirtualBroker:
    """A broker's process on a virtual machine; also its driver's port.

    Args:
        network: the virtual network; the new broker becomes its broker.
        folder: of its ledger.
        settings: of its core.
        ledger_settings: of its ledger.
        machine: has its clocks; by default one whose clocks are right.
        disk: of the machine; by default one without faults.
        draw_identity: see `Broker`; by default ``virtual1``, ``virtual2``, ..., across crashes.
        access: who may connect; by default a broker without keys.
        on_start: called with it whenever it has opened its ledger.
        checked: whether to validate the state of its core after each turn.

    Attributes:
        network: as given.
        up: whether the process exists; also true while it is paused.
        driver: of the present process, or of the last one.
        disk: as given; faults and crashes in the middle of a commit are planned there.
        batch_s: longest time that a frame waits so that more frames join its turn, in seconds.
        crash_at_send: number of frames that it still sends before it crashes; None for no crash.
        loses_power: whether the next crash in the middle of a turn is a power failure.
        failures: why it stopped or could not start, each time.
    """

    driver: BrokerDriver

    def __init__(
        self,
        network: VirtualNetwork,
        folder: Path,
        settings: BrokerSettings,
        ledger_settings: LedgerSettings | None = None,
        *,
        machine: Machine | None = None,
        disk: VirtualDisk | PlainDisk | None = None,
        draw_identity: Callable[[], str] | None = None,
        access: AccessStore | None = None,
        on_start: Callable[[VirtualBroker], object] = lambda _: None,
        checked: bool = True,
    ) -> None:
        self.network, self._folder, self._settings = network, folder, settings
        self._ledger_settings = ledger_settings or LedgerSettings()
        self._machine = machine or Machine(network)
        # Counted, so that a history depends only on its seed.
        self._draw_identity = draw_identity or map("virtual{}".format, itertools.count(1)).__next__
        self._access, self._on_start, self._checked = access, on_start, checked
        self.disk = disk or VirtualDisk(network.rng)
        self.up = self._paused = self.loses_power = False
        self._starts_later = False
        self.batch_s = 0.0
        self.crash_at_send: int | None = None
        self.failures: list[str] = []
        self.no_space = ""
        self._arrived: list[Event] = []
        self._wake_at = math.inf
        """Time of the next planned turn, on the clock of the process."""
        self._plans = 0
        network.broker = self
        self.start()

    @property
    def core(self) -> Broker:
        """Return the core of the driver."""
        return self.driver.core

    @property
    def ledger(self) -> Ledger:
        """Return the ledger of the driver."""
        return self.driver.ledger

    # ---- the process

    def start(self) -> None:
        """Start a process that continues from the ledger; does nothing while one is running.

        If the ledger cannot be opened, it is tried again later.
        """
        if self.up:
            return
        self._clock = self._machine.clock()
        self.up = True
        try:
            self.driver = BrokerDriver.open(
                self._folder,
                self._settings,
                self._ledger_settings,
                self,
                self._clock,
                disk=self.disk,
                draw_identity=self._draw_identity,
                access=self._access,
            )
        except Crash:
            self.crash(power=self.loses_power)
        except LedgerError as error:
            self._fail(str(error))
        else:
            self.driver.share_as(LEDGER)
            self.network.ledger = str(self._folder.resolve())
            self._on_start(self)
            self._turn()

    def crash(self, *, power: bool = False) -> None:
        """End the process at once; with ``power``, as the machine loses power."""
        self.up = self._paused = self.loses_power = False
        self.crash_at_send = None
        self._arrived.clear()
        self._wake_at = math.inf
        self._plans += 1
        if power and isinstance(self.disk, VirtualDisk):
            self.disk.lose_power()
        else:
            self.disk.die()

    def close(self) -> None:
        """End the process as one that is stopped does: what is queued is written."""
        if self.up:
            self.driver.close()
            self.crash()

    def _fail(self, reason: str) -> None:
        """End the process, because of its ledger, and start again later."""
        self.crash()
        self.failures.append(reason)
        if not self._starts_later:
            self._starts_later = True
            self.network.after(self.network.rng.random() * _RESTART_S, self._start_later)

    def _start_later(self) -> None:
        self._starts_later = False
        self.start()

    def pause(self) -> None:
        """Stop the process, if it is up: frames wait, and timers are late."""
        self._paused = self.up

    def resume(self) -> None:
        """Continue the process after `pause`."""
        self._paused = False
        if self.up:
            self._plan(self._clock())

    # ---- turns

    def receive(
        self, peer: bytes, frame: AnyFrame, buffers: Sequence[Buffer], origin: Origin = KEYLESS
    ) -> None:
        """Handle a frame from a connection, in the next turn."""
        if self.up:
            nbytes = sum(map(len, buffers))
            self._arrived.append(ReceivedFrom(peer, frame, buffers, nbytes, origin))
            wait_s = self.batch_s * self.network.rng.random() if self.batch_s else 0.0
            self._plan(self._clock() + wait_s)

    def _plan(self, at: float) -> None:
        """Plan a turn; only the earliest of all planned turns is done."""
        if at < self._wake_at and not self._paused:
            self._wake_at = at
            self._plans += 1
            wait_ms = milliseconds_until(at, self._clock()) or 0
            self._machine.after(wait_ms / 1000, functools.partial(self._wake, self._plans))

    def _wake(self, plan: int) -> None:
        if plan == self._plans:
            self._turn()

    def _turn(self) -> None:
        """Handle what has arrived."""
        self._wake_at = math.inf
        if self._paused:
            return
        events, self._arrived = self._arrived, []
        try:
            self.driver.turn(events)
            if self._checked:
                self.core.validate_state()
            if (deadline := self.driver.deadline) is not None:
                self._plan(deadline)
        except Crash:
            self.crash(power=self.loses_power)
        except BrokerFailed as error:
            self._stop(str(error))

    def _stop(self, reason: str) -> None:
        """Close the ledger, as the process does before it ends."""
        try:
            self.driver.close()
        except Crash:
            self.crash(power=self.loses_power)
        else:
            self._fail(reason)

    # ---- the port of its driver

    def send(self, peer: bytes, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Send a frame; crash first if it is the last moment of the process."""
        if self.crash_at_send is not None:
            if self.crash_at_send == 0:
                self.network.made["broker killed while it sends"] += 1
                raise Crash
            self.crash_at_send -= 1
        self.network.to_node(peer, header, buffers)
        self.core.sent(peer, len(header) + sum(map(len, buffers)))

    def has_room(self, peer: bytes) -> bool:  # noqa: ARG002 - the virtual network queues nothing
        """Return True."""
        return True

    def charge(self, peer: bytes) -> None:
        """Ignore it: the virtual network has no limit of messages a second."""

    def disconnect(self, peer: bytes) -> None:
        """Break a connection, once the rejection has arrived; the core rejects what still comes."""
        self.network.after(_CLOSES_S, functools.partial(self.network.disconnect, peer))

    def is_up(self, peer: bytes) -> bool:
        """Return whether a connection is up."""
        return self.network.is_up(peer)

    def on_space(self, reason: str) -> None:
        """Keep the reason why the disk is full, or ""."""
        self.no_space = reason

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Do nothing."""
