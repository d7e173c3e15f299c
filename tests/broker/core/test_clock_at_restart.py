"""The machine's clock was set while no broker ran: the ledger's time goes on, never back."""

import pytest

from fedmq.broker.core.events import Append, TimerFired
from fedmq.broker.ledger.entries import Accepted, Opened
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.recovery import open_broker
from fedmq.broker.settings import BrokerSettings, Continuation
from fedmq.broker.wire.addresses import TIMER
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message

STOPPED_AT = 1_700_000_000.0
HOUR_S = 3600.0


class Time:
    """A machine's two clocks; the broker's time is measured from `STOPPED_AT`."""

    def __init__(self, ahead_s):
        self.passed_s = 0.0
        self.clock = Clock(lambda: STOPPED_AT + ahead_s, lambda: self.passed_s)


@pytest.fixture
def folder(tmp_path):
    """A ledger that ends with the request of a timer after 3 s."""
    ledger = Ledger(tmp_path)
    ledger.append(Opened(seq=0, at=STOPPED_AT - 5.0, run="r", config="c", total_clients=1))
    body = {"token": "deadline", "after_s": 3.0}
    message = Message(kind="timer", id="agg/1", run="r", sender="agg", to=TIMER, body=body)
    ledger.append(Accepted(seq=1, at=STOPPED_AT, message=encode_message(message)))
    ledger.close()
    return tmp_path


def ticks(core, now):
    """Return the times of the entries that the broker appends when it is woken."""
    return [each.entry.at for each in core.handle(TimerFired(), now) if isinstance(each, Append)]


@pytest.mark.parametrize("ahead_s", [-HOUR_S, -4.0, -0.5, 0.0, 1.0, HOUR_S])
def test_a_deadline_passes_within_its_time_after_a_restart(folder, ahead_s):
    time = Time(ahead_s)
    ledger, core = open_broker(folder, BrokerSettings(), time.clock)
    expected = max(0.0, 3.0 - max(0.0, ahead_s))
    time.passed_s = expected - 0.01
    if expected:
        assert ticks(core, time.clock()) == []
    time.passed_s = expected + 0.01
    assert len(ticks(core, time.clock())) == 1
    ledger.close()


@pytest.mark.parametrize("ahead_s", [-HOUR_S, HOUR_S])
def test_the_times_of_the_entries_never_go_back(folder, ahead_s):
    for ahead in (ahead_s, 0.0):
        time = Time(ahead)
        continuation = Continuation("r", "c", further=False)
        ledger, core = open_broker(folder, BrokerSettings(), time.clock, continuation=continuation)
        time.passed_s = 4.0
        for action in core.handle(TimerFired(), time.clock()):
            if isinstance(action, Append):
                ledger.append(action.entry)
        ledger.close()
    times = [entry.at for entry in read_entries(folder)]
    assert len(times) > 3
    assert times == sorted(times)


def test_a_continued_run_gets_the_rest_of_its_timer_when_the_clock_was_set_back(folder):
    time = Time(-HOUR_S)
    continuation = Continuation("r", "c", further=False)
    ledger, core = open_broker(folder, BrokerSettings(), time.clock, continuation=continuation)
    assert core.deadline - time.clock() == pytest.approx(3.0)
    ledger.close()
