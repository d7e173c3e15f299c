"""Work beside the program of a virtual process: greenlets that wait for virtual times.

A program waits for one thing at a time. A process that does thousands of things at once, each with
pauses in between, runs each of them in a greenlet of its own. They take turns on the hub, in the
order of their times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import greenlet

from fedmq.broker.virtual.network import VirtualNetwork


class Killed(greenlet.GreenletExit):
    """Ends what a killed process was doing; handlers of `Exception` do not catch it."""


class SideTasks:
    """The tasks of one process.

    Args:
        network: has the time.
        hub: the greenlet that steps the network; exceptions of the tasks are raised there.
    """

    def __init__(self, network: VirtualNetwork, hub: greenlet.greenlet) -> None:
        self._network, self._hub = network, hub
        self._running: set[greenlet.greenlet] = set()
        self._waiting: list[greenlet.greenlet] = []
        """Tasks that wait for something other than a time."""
        self._late: list[Callable[[], object]] = []
        """What was due while the process was suspended, in order."""
        self._paused = self._killed = False
        self._due = 0
        """Number of times at which a task is to start or go on."""

    @property
    def busy(self) -> bool:
        """Return whether a task starts or goes on at some time."""
        return self._due > 0 or bool(self._late)

    def start_at(self, when: float, work: Callable[[], object]) -> None:
        """Start a task at a true time; at an infinite one, never."""
        if when < math.inf:
            self._at(when, functools.partial(self._start, work))

    def sleep_until(self, when: float) -> None:
        """Let the calling task wait until a true time; at an infinite one, until it is killed.

        Raises:
            Killed: the process was killed meanwhile.
        """
        if when < math.inf:
            self._at(when, functools.partial(self._resume, greenlet.getcurrent()))
        self._switch()

    def wait(self) -> None:
        """Let the calling task wait until `wake`.

        Raises:
            Killed: the process was killed meanwhile.
        """
        self._waiting.append(greenlet.getcurrent())
        self._switch()

    def wake(self) -> None:
        """On the hub: resume the tasks in `wait`."""
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            self._resume(task)

    def pause(self) -> None:
        """Suspend all tasks, until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """On the hub: continue after `pause` with what became due meanwhile."""
        self._paused = False
        late, self._late = self._late, []
        for act in late:
            act()

    def kill(self) -> None:
        """On the hub: end all tasks, and start no more."""
        self._killed = True
        running, self._running = self._running, set()
        for task in running:
            task.throw(Killed)

    def _at(self, when: float, act: Callable[[], object]) -> None:
        self._due += 1
        self._network.at(when, functools.partial(self._act, act))

    def _act(self, act: Callable[[], object]) -> None:
        self._due -= 1
        act()

    def _start(self, work: Callable[[], object]) -> None:
        if self._killed:
            return
        if self._paused:
            self._late.append(functools.partial(self._start, work))
            return
        task = greenlet.greenlet(work, self._hub)
        self._running.add(task)
        self._enter(task)

    def _resume(self, task: greenlet.greenlet) -> None:
        if self._paused:
            self._late.append(functools.partial(self._resume, task))
        elif not task.dead and not self._killed:
            self._enter(task)

    def _enter(self, task: greenlet.greenlet) -> None:
        try:
            task.switch()
        finally:
            if task.dead:
                self._running.discard(task)

    def _switch(self) -> None:
        if self._killed:
            raise Killed
        self._hub.switch()
