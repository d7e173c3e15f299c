"""The virtual port of a link, and the process of a node: its program runs in a greenlet.

The greenlet that steps the network is the *hub*. A program runs until it waits for its link: then
the hub goes on, and resumes the program when a frame arrives or the time has come. So programs
that block run in virtual time as they are, one at a time, in an order that depends only on the
seed.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import greenlet
from msgspec.structs import replace

from fedmq.broker.access.rights import KEYLESS, Origin
from fedmq.broker.link.events import BackInTouch, Blocked, OutOfTouch
from fedmq.broker.link.port import Loop, Received
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.network import LEDGER, VirtualNetwork
from fedmq.broker.virtual.side_tasks import Killed, SideTasks
from fedmq.broker.wire.clock import milliseconds_until
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import Ack, AnyFrame, Buffer, Frame, Post, Welcome


class VirtualPort:
    """A `LinkPort` on a virtual network, and the process that owns it.

    Without `run`, the hub itself uses the link: its waiting methods step the network meanwhile.

    Args:
        network: the virtual network.
        machine: where the process runs; has its clocks.
        name: of the node.
        switching: returns a context for the time in which the program waits; for state of the
            thread that others must not see, like torch's modes.
        origin: what the transport proves about the node.
        checked: whether to validate the link's state at each turn, and to keep all posts.

    Attributes:
        peer: the present connection.
        up: whether the process is running.
        on_exit: called on the hub when the program has ended, or was killed.
        on_welcome: called when a Welcome arrives, before the link handles it.
        doomed: after each frame that is sent: whether the process dies right now.
        reports: all reports about the connection.
        tasks: run beside the program, since `run`; they may use the link.
    """

    endpoint = "virtual"

    def __init__(
        self,
        network: VirtualNetwork,
        machine: Machine,
        name: str,
        switching: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        origin: Origin = KEYLESS,
        *,
        checked: bool = True,
    ) -> None:
        self.name, self.up, self.origin, self._checked = name, True, origin, checked
        self.clock = machine.clock()
        self.lock = threading.RLock()  # never contended: there is one thread
        self.on_exit: Callable[[], object] = lambda: None
        self.on_welcome: Callable[[], object] = lambda: None
        self.doomed: Callable[[Frame], bool] = lambda _: False
        self.reports: list[Blocked | OutOfTouch | BackInTouch] = []
        self._network, self._machine, self._switching = network, machine, switching
        self._loop: Loop | None = None
        self._hub = greenlet.getcurrent()
        self.tasks = SideTasks(network, self._hub)
        self._program: greenlet.greenlet | None = None
        self._suspended = False
        """Whether the program waits for the hub: in the loop, or while it works."""
        self._works_until = math.inf
        """True time at which the program's work is done; infinite unless it works."""
        self._in_background = False
        """Whether a turn is running that the program has not asked for."""
        self._woken = self._paused = False
        self._alarm = math.inf
        """True time of the next alarm."""
        self._arrived: list[tuple[AnyFrame, Sequence[Buffer]]] = []
        self.posts: dict[int, bytes] = {}
        """The messages of all posts, by frame number, if it is checked."""
        self.acknowledged_to = -1
        self.peer = network.connect(self)

    @property
    def posted(self) -> list[str]:
        """Return the ids of all messages that were sent, in order."""
        return [decode_message(each).id for each in self.posts.values()]

    @property
    def acknowledged(self) -> list[str]:
        """Return the ids of the messages whose acknowledgment has arrived, in order."""
        posts = self.posts.items()
        return [decode_message(each).id for n, each in posts if n <= self.acknowledged_to]

    # ---- the process

    def run(self, program: Callable[[], object]) -> None:
        """Start the program of this process; its exceptions are raised on the hub."""
        self._hub = greenlet.getcurrent()
        self.tasks = SideTasks(self._network, self._hub)
        self._program = greenlet.greenlet(program)
        self._suspended = True
        self._network.after(0.0, self._react)

    def pass_time(self, seconds: float) -> None:
        """Let time pass while the program works; the hub runs the loop meanwhile.

        Raises:
            Killed: the process was killed meanwhile.
        """
        self._works_until = self._machine.time_after(seconds)
        self._network.at(self._works_until, self._react)
        self._run_turn()
        self._suspend()
        self._works_until = math.inf

    def pause(self) -> None:
        """Suspend the process, like SIGSTOP: what arrives waits, and deadlines pass."""
        self._paused = True
        self.tasks.pause()

    def resume(self) -> None:
        """Resume a suspended process, like SIGCONT."""
        self._paused = False
        self._network.after(0.0, self._react)
        self._network.after(0.0, self.tasks.resume)

    def kill(self) -> None:
        """Kill the process: nothing that its program does from now on has an effect."""
        if not self.up:
            return
        self._exit()
        if greenlet.getcurrent() is self._hub:
            self._end_program()
        else:  # the caller is the program, or one of its tasks
            self._network.after(0.0, self._end_program)

    def _end_program(self) -> None:
        if self._program is not None and not self._program.dead:
            self._program.throw(Killed)

    def _exit(self) -> None:
        if self.up:
            self.up = False
            self._network.hang_up(self)
            self._network.after(0.0, self.tasks.kill)
            self._network.after(0.0, self.on_exit)

    def _react(self) -> None:
        """On the hub: something has arrived, or the time has come."""
        if self._paused or not self.up:
            return
        if self._suspended and not self._network.now < self._works_until < math.inf:
            self._suspended = False
            if self._program is not None:
                try:
                    self._program.switch()
                finally:
                    if self._program.dead:
                        self._exit()
        else:
            with contextlib.suppress(Killed):
                self._run_turn()
        self.tasks.wake()

    def _run_turn(self) -> None:
        """Run a turn while the program works, as the live port's thread does."""
        if self._loop is None or self._loop.has_ended or not self.up:
            return
        self._in_background = True
        try:
            self._loop.turn_in_background()
        finally:
            self._in_background = False
        if self._loop is not None:
            self._plan(milliseconds_until(self._loop.deadline, self.clock()))

    def _suspend(self) -> None:
        """Let the hub go on, until `_react` resumes the program."""
        if not self.up:
            raise Killed
        if self._program is not None and greenlet.getcurrent() is not self._program:
            self.tasks.wait()
            return
        self._suspended = True
        if self._program is None:
            while self._suspended:
                if not self._network.step():
                    raise AssertionError(f"{self.name} waits, and nothing else will happen")
            return
        try:
            with self._switching():
                self._hub.switch()
        except greenlet.GreenletExit:  # also if the garbage collector ends the greenlet
            self._exit()
            raise

    def _plan(self, wait_ms: int | None) -> None:
        """Set the alarm, unless it rings earlier anyway."""
        if wait_ms is not None:
            at = self._machine.time_after(wait_ms / 1000)
            if at < self._alarm:
                self._alarm = at
                self._network.at(at, self._ring)

    def _ring(self) -> None:
        if self._network.now >= self._alarm:
            self._alarm = math.inf
            self._react()

    # ---- the port

    def start(self, loop: Loop) -> None:
        """Begin to run turns of the loop while the program works."""
        self._loop = loop
        self._network.after(0.0, self._react)

    def away(self) -> AbstractContextManager[None]:
        """Return a context without an effect: the program is away in `pass_time`."""
        return contextlib.nullcontext()

    def wake(self) -> None:
        """Make a turn that waits return soon."""
        self._woken = True
        self._network.after(0.0, self._react)

    def restart(self) -> None:
        """Do nothing: frames are sent at once."""

    def send(self, frame: Frame, buffers: Sequence[Buffer]) -> None:
        """Send a frame, unless the process is dead.

        Raises:
            Killed: the process dies right after this frame.
        """
        if not self.up:
            return
        if self._checked and isinstance(frame, Post):
            self.posts.setdefault(frame.n, frame.message)
        self._network.to_broker(self.peer, frame, buffers)
        if self.doomed(frame):
            self._network.made["node killed after a frame"] += 1
            self.kill()
            raise Killed

    def flush(self) -> None:
        """Do nothing: frames are sent at once."""

    def wait(self, until: float | None) -> None:
        """Wait until a frame arrives, `wake` is called, or the time has come.

        Raises:
            Killed: the process is dead.
        """
        if not self.up:
            raise Killed
        if self._checked and self._loop is not None:
            self._loop.validate_state()
        if self._in_background or self._arrived or self._woken:
            self._woken = False
        elif (wait_ms := milliseconds_until(until, self.clock())) != 0:
            self._plan(wait_ms)
            self._suspend()

    def receive(self) -> Received:
        """Return all frames that have arrived."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def arrive(self, frame: AnyFrame, buffers: Sequence[Buffer]) -> None:
        """Handle a frame that arrives at the process; called by the network."""
        if isinstance(frame, Ack):
            self.acknowledged_to = max(self.acknowledged_to, frame.upto)
        if isinstance(frame, Welcome) and frame.ledger == LEDGER:
            frame = replace(frame, ledger=self._network.ledger)
        self._arrived.append((frame, buffers))
        if isinstance(frame, Welcome):
            self.on_welcome()
        self._react()

    def close(self) -> None:
        """Close the connection."""
        self._loop = None
        self._network.hang_up(self)

    def report(self, report: Blocked | OutOfTouch | BackInTouch) -> None:
        """Keep a report, if the process is checked."""
        if self._checked:
            self.reports.append(report)

    def report_failure(self, error: Exception) -> None:
        """Raise the error, so that it is not overlooked."""
        raise error

    def listener(self) -> str:
        """Return an empty description: nothing is known of the endpoint."""
        return ""
