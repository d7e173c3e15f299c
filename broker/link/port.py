"""What the driver of a Link core needs of the world, live or virtual."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from fedmq.broker.link.events import BackInTouch, Blocked, OutOfTouch
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.schema import AnyFrame, Buffer, Frame

Received = Sequence[tuple[AnyFrame, Sequence[Buffer]]]
"""Frames, each with its buffers."""


class Loop(Protocol):
    """The loop of a link, which its port runs while the program does not."""

    @property
    def has_ended(self) -> bool:
        """Return whether the link has ended: no more turns are needed."""

    @property
    def deadline(self) -> float | None:
        """Time by which a turn is needed even if nothing arrives; None for never."""

    def turn_in_background(self) -> None:
        """Wait for an event, and handle it."""

    def validate_state(self) -> None:
        """Raise AssertionError if the state of the link is inconsistent."""


class LinkPort(Protocol):
    """The connection to the broker, the clock, and who runs the loop.

    The program runs the loop while it waits for the link. Meanwhile, and whenever it calls the
    link, it holds ``lock``. At all other times the port runs turns of the loop.
    """

    @property
    def endpoint(self) -> str:
        """Address of the broker, for reports."""

    @property
    def clock(self) -> Clock:
        """The clock of this process."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held by the program while it uses the link; may be nested."""

    def start(self, loop: Loop) -> None:
        """Begin to run turns of the loop while the program does not."""

    def away(self) -> AbstractContextManager[None]:
        """Return a context for long work of the program; cannot be nested."""

    def wake(self) -> None:
        """Make a turn that waits return soon; may be called from any thread."""

    # ---- the connection; only the holder of the lock may call these

    def restart(self) -> None:
        """Before a Hello: drop the frames that were queued and not sent."""

    def send(self, frame: Frame, buffers: Sequence[Buffer]) -> None:
        """Queue a frame; the caller must not change its buffers any more."""

    def flush(self) -> None:
        """Send the queued frames, as far as the connection accepts them now."""

    def wait(self, until: float | None) -> None:
        """Wait until a frame arrives, `wake` is called, or this time has come; None: no limit."""

    def receive(self) -> Received:
        """Return frames that have arrived; none if there are no more.

        Raises:
            VersionError: the broker speaks another major version of the protocol.
        """

    def close(self) -> None:
        """Stop running turns, and close the connection."""

    # ---- reports

    def report(self, report: Blocked | OutOfTouch | BackInTouch) -> None:
        """Tell people about the connection."""

    def report_failure(self, error: Exception) -> None:
        """Tell people about an error in a turn in the background, after which the link ends."""

    def listener(self) -> str:
        """Describe what listens at the endpoint of a silent broker; empty if unknown."""
