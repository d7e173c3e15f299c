"""Clocks that tests control."""

from fedmq.broker.wire.clock import Clock


def stopped_clock(at=0.0):
    """Return a clock that stands still, in seconds since 1970."""
    return Clock(lambda: at, lambda: 0.0)
