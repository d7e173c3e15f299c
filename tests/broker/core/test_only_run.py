"""A broker of one run: strangers' runs cannot join it, nor keep it from ending."""

from dataclasses import replace

import pytest

from fedmq.broker.rejections import RejectCode
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.schema import Goodbye, Reject, RunEnded, Wait, Welcome
from tests.broker.conftest import Bench

LEASE_S = 10.0


def bench_of(**settings) -> Bench:
    bench = Bench(LEASE_S)
    bench.settings = replace(BrokerSettings(LEASE_S), **settings)
    bench.restart()
    return bench


def rejected(bench, peer) -> str:
    [reject] = bench.take(peer, Reject)
    assert reject.code == RejectCode.RUN
    return reject.reason


@pytest.mark.parametrize("settings", [{"only_run": "r"}, {"once": True}], ids=str)
def test_another_run_is_rejected_and_does_not_delay_the_end(settings) -> None:
    bench = bench_of(**settings)
    waiting = bench.join("w0", clients=((0, 0),))
    bench.standing.add(waiting)
    assert bench.take(waiting, Wait)
    agg = bench.joined("agg", "aggregator")
    bench.wake()
    assert bench.take(waiting, Welcome), "which run it joins is not ambiguous"
    sentence = "this broker serves run r only"
    assert rejected(bench, bench.join("thief", "aggregator", run="q")) == sentence
    assert rejected(bench, bench.join("w1", clients=((1, 1),), run="q")) == sentence
    late = bench.joined("w2", clients=((2, 2),))
    bench.tell(agg, RunEnded(reason="done"))
    assert not bench.core.idle
    for peer in (agg, waiting, late):
        bench.say(peer, Goodbye())
    assert bench.core.idle
    assert rejected(bench, bench.join("thief", "aggregator", run="q")) == sentence
    assert bench.core.idle


def test_a_named_run_is_the_only_one_also_before_it_starts() -> None:
    bench = bench_of(only_run="r", once=True)
    assert "serves run r only" in rejected(bench, bench.join("thief", "aggregator", run="q"))
    assert not bench.core.idle, "its own run has not started"
    assert bench.take(bench.join("w1", clients=((1, 1),)), Wait)


def test_of_a_ledger_with_several_runs_the_named_one_counts() -> None:
    bench = bench_of()
    for run in ("r", "q"):
        bench.joined(f"agg-{run}", "aggregator", run=run)
    bench.settings = replace(bench.settings, only_run="r")
    bench.restart()
    again = bench.joined("agg-r", "aggregator")
    assert rejected(bench, bench.join("agg-q", "aggregator", run="q"))
    wait = bench.take(bench.join("w1", clients=((1, 1),), run=""), Welcome)
    assert wait[0].run == "r"
    bench.numbers.clear()
    bench.tell(again, RunEnded(reason="done"))
    bench.say(again, Goodbye())
    bench.say(b"w1:s1", Goodbye())
    assert bench.core.idle


def test_once_serves_all_runs_of_its_ledger_and_opens_no_other() -> None:
    bench = bench_of()
    aggregators = {run: bench.joined(f"agg-{run}", "aggregator", run=run) for run in ("r", "q")}
    bench.settings = replace(bench.settings, once=True)
    bench.restart()
    reason = rejected(bench, bench.join("thief", "aggregator", run="x"))
    assert reason == "this broker serves the runs r, q only"
    bench.numbers.clear()
    for run, peer in aggregators.items():
        bench.joined(f"agg-{run}", "aggregator", run=run)
        bench.tell(peer, RunEnded(reason="done"))
        bench.say(peer, Goodbye())
        assert bench.core.idle == (run == "q")
