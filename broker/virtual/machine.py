"""The clocks of a virtual machine, which may be wrong, jump, and run at their own rate."""

from __future__ import annotations

from collections.abc import Callable

from fedmq.broker.virtual.network import VirtualNetwork
from fedmq.broker.wire.clock import Clock


class Machine:
    """A computer in the virtual world: its two clocks, over the network's true time.

    Args:
        network: has the true time.
        ahead_s: by how much the wall clock is ahead, in seconds; negative if it is behind.
        rate: seconds that its clocks advance in a true second.
    """

    def __init__(self, network: VirtualNetwork, ahead_s: float = 0.0, rate: float = 1.0) -> None:
        self._network, self._ahead_s, self._rate = network, ahead_s, rate
        self._jumped_s = 0.0
        """By how much the wall clock has jumped since a process was last started."""
        if rate != 1.0:
            network.made["clock at another rate"] += 1

    def monotonic(self) -> float:
        """Return the seconds since the machine was started."""
        return self._network.now * self._rate

    def wall(self) -> float:
        """Return the wall clock's time, in seconds since 1970."""
        return self.monotonic() + self._ahead_s

    def true_time(self) -> float:
        """Return the network's time, which no clock of the machine shows."""
        return self._network.now

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back."""
        self._ahead_s += seconds
        self._jumped_s += seconds

    def clock(self) -> Clock:
        """Return the clock of a process that starts now."""
        if self._jumped_s:
            way = "forward" if self._jumped_s > 0 else "back"
            self._network.made[f"clock set {way}"] += 1
            self._jumped_s = 0.0
        return Clock(self.wall, self.monotonic)

    def time_after(self, seconds: float) -> float:
        """Return the true time at which the machine's clocks will have advanced by ``seconds``."""
        return self._network.now + max(0.0, seconds) / self._rate

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Schedule a call once the machine's clocks have advanced by ``seconds``."""
        self._network.at(self.time_after(seconds), act)
