"""When and how a node reports that it is not connected to its run, in virtual time."""

import pytest

from fedmq.broker.link.contact import sentence
from fedmq.broker.link.core import Link
from fedmq.broker.link.events import BackInTouch, LinkEnded, OutOfTouch, Wake
from fedmq.broker.wire.schema import Heartbeat, Hello, Serving, StorageFull, UnknownSession, Wait
from tests.broker.links import HELLO, WELCOME, frames, heard, welcomed


class Times:
    """A link, and its reports as (time, action)."""

    def __init__(self, link, now=0.0):
        self.link, self.now, self.told = link, now, []

    def _note(self, actions):
        kinds = OutOfTouch | BackInTouch | LinkEnded
        self.told += [(self.now, each) for each in actions if isinstance(each, kinds)]

    def go(self, until, answer=None):
        """Wake the link at each of its deadlines; each Hello and heartbeat gets ``answer``."""
        wakes = 0
        while (due := self.link.deadline) is not None and due <= until:
            wakes += 1
            assert wakes < 100_000, "it wakes for nothing"
            self.now = max(self.now, due)
            actions = self.link.handle(Wake(), self.now)
            self._note(actions)
            for _ in frames(actions, Hello | Heartbeat) if answer is not None else ():
                self.hear(answer)
        self.now = until

    def hear(self, frame):
        self._note(heard(self.link, frame, now=self.now))

    def take(self):
        told, self.told = self.told, []
        return told


def reports(times):
    told = times.take()
    assert all(isinstance(each, OutOfTouch) for _, each in told)
    return [(now, round(each.seconds), each.answer, each.admitted) for now, each in told]


def test_an_absent_broker_is_reported_at_growing_intervals():
    times = Times(Link(HELLO))
    times.go(215.0)
    expected = [3.0, 10.0, 30.0, 90.0, 150.0, 210.0]
    assert reports(times) == [(at, round(at), None, False) for at in expected]
    times.hear(WELCOME)
    assert times.take() == []  # admission is an action of its own


def test_a_silent_broker_and_its_return_are_reported():
    times = Times(welcomed())
    times.go(100.0, Heartbeat())
    assert times.take() == []
    times.go(114.0)
    silent_since = 100.0
    assert reports(times) == [(silent_since + after, after, None, True) for after in (3, 10)]
    times.hear(UnknownSession())
    assert times.take() == []  # the broker has started again, and does not know us yet
    times.hear(WELCOME)
    assert times.take() == [(114.0, BackInTouch(14.0))]
    times.go(200.0, Heartbeat())
    assert times.take() == []


def test_a_short_silence_is_not_reported():
    times = Times(welcomed())
    times.go(2.9)
    times.hear(Heartbeat())
    times.go(5.8)
    times.hear(Heartbeat())
    assert times.take() == []


WAIT = Wait(serving=Serving(("a", "b")))


def test_a_broker_without_the_run_and_its_later_silence_are_reported():
    times = Times(Link(HELLO))
    times.go(30.0)
    times.take()
    times.go(45.0, WAIT)
    [(first, *_), (second, *_)] = found = reports(times)
    assert (second - first, [each[2] for each in found]) == (7.0, [WAIT, WAIT])
    times.go(60.0)
    answers = [each[2] for each in reports(times)]
    assert answers == [None, None]


def test_a_broker_that_returns_without_the_run_is_reported_with_its_runs():
    times = Times(welcomed())
    times.hear(UnknownSession())
    times.go(20.0, WAIT)
    assert [each[2:] for each in reports(times)] == [(WAIT, True), (WAIT, True)]
    times.hear(WELCOME)
    assert [type(each) for _, each in times.take()] == [BackInTouch]


def test_a_full_disk_of_the_broker_is_reported_repeatedly():
    times = Times(welcomed())
    full = StorageFull(reason="no space left on device")
    times.hear(full)
    times.go(35.0, full)
    assert [each[2] for each in reports(times)] == [full] * 3


@pytest.mark.parametrize(("answer", "admitted"), [(None, False), (None, True), (WAIT, False)])
def test_a_node_gives_up_only_with_a_limit(answer, admitted):
    link = welcomed() if admitted else Link(HELLO)
    link.give_up_after(20.0)
    times = Times(link)
    times.go(1000.0, answer)
    now, ended = times.take()[-1]
    assert (now, type(ended), ended.out_of_touch.answer) == (20.0, LinkEnded, answer)
    assert (ended.over, ended.rejected) == (False, False)
    assert link.deadline is None


def test_a_connected_node_does_not_give_up():
    link = welcomed()
    link.give_up_after(20.0)
    times = Times(link)
    times.go(1000.0, Heartbeat())
    assert times.take() == []


def test_the_time_of_a_suspension_does_not_count_as_waiting():
    """A machine that slept for an hour must not end its nodes when it wakes up."""
    link = welcomed()
    link.give_up_after(20.0)
    times = Times(link)
    times.go(10.0, Heartbeat())
    times.now = 3610.0
    times.go(3625.0)
    assert {type(each) for _, each in times.take()} == {OutOfTouch}
    times.go(3700.0)
    now, ended = times.take()[-1]
    assert isinstance(ended, LinkEnded)
    assert 3625.0 < now <= 3635.0


@pytest.mark.parametrize(
    ("report", "run", "words"),
    [
        (OutOfTouch(3.0, None, admitted=False), "c", "waiting for the broker at E for 3 s"),
        (OutOfTouch(12.2, None, admitted=True), "c", "no answer from the broker at E for 12 s"),
        (
            OutOfTouch(9.0, WAIT, admitted=False),
            "c",
            "the broker at E serves runs a, b; waiting for run c for 9 s",
        ),
        (
            OutOfTouch(9.0, Wait(serving=Serving(("a",), 7, ("old",))), admitted=False),
            "c",
            "the broker at E serves run a and 7 others; run old ended; waiting for run c for 9 s",
        ),
        (
            OutOfTouch(9.0, Wait(serving=Serving((), 0, ("old",))), admitted=False),
            "",
            "the broker at E serves no run now; run old ended; waiting for a run to start for 9 s",
        ),
        (
            OutOfTouch(9.0, Wait(reason="x"), admitted=False),
            "c",
            "the broker at E has no run for this node yet; waiting for run c for 9 s",
        ),
        (
            OutOfTouch(9.0, Wait(reason="at most 3 (limit)", crowded=True), admitted=False),
            "c",
            "the broker at E lets no more nodes wait for 9 s, trying again: at most 3 (limit)",
        ),
        (
            OutOfTouch(9.0, StorageFull(reason="no space"), admitted=True),
            "c",
            "has not been able to write for 9 s: no space",
        ),
    ],
)
def test_each_report_is_a_sentence(report, run, words):
    assert words in sentence(report, "E", run)
