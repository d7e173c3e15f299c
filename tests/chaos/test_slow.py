"""Slow is not dead: who computes, sleeps or has a thin line keeps its lease, and its work."""

from __future__ import annotations

import signal
import time

import pytest

from tests.chaos.crew import Crew, Proxy
from tests.chaos.ledgers import Watch, check_books

pytestmark = pytest.mark.end_to_end

ROUNDS = {"schedule__name": "rounds", "schedule__fraction": 1.0}
ECHO = {
    **ROUNDS,
    "problem__name": "chaos_models:Vector",
    "problem__model": None,
    "problem__examples": None,
    "algorithm__name": "chaos_models:Echo",
    "algorithm__pause_s": None,
}


def test_a_worker_that_holds_the_gil_for_three_leases_has_not_left(
    crew: Crew, watch: Watch
) -> None:
    lease_s, hold_s = 2.0, 6.0
    broker = crew.broker(lease_s, "--once")
    aggregator = crew.aggregator(
        **ECHO, run__versions=1, problem__dim=1000, problem__clients=1, algorithm__hold_s=hold_s
    )
    worker = crew.worker("clinger", "0")
    assert aggregator.wait(hold_s + 30) == 0, aggregator.said()[-3000:]
    assert broker.wait(20) == 0, broker.said()[-3000:]
    assert worker.wait(20) == 0
    watch.read()
    (task,), (result,) = watch.of_kind("task"), watch.of_kind("result")
    assert result.at - task.at >= hold_s, "the GIL was not held"
    assert not watch.of_kind("left")
    assert len(watch.of_kind("joined", node="clinger")) == 1
    assert check_books(crew.folder / "run", crew.folder / "model").used == 1


def test_a_stopped_worker_leaves_after_its_lease_and_its_work_counts_once(
    crew: Crew, watch: Watch
) -> None:
    lease_s = 3.0
    broker = crew.broker(lease_s, "--once")
    aggregator = crew.aggregator(
        problem__clients=6,
        run__versions=50,
        algorithm__pause_s=0.2,
        schedule__name="buffered",
        schedule__size=2,
        schedule__concurrency=5,
    )
    crew.worker("steady", "0-3")
    sleepy = crew.worker("sleepy", "4-5")
    watch.until_version(2)

    # For less than the lease: nothing happens.
    sleepy.send(signal.SIGSTOP)
    time.sleep(lease_s / 3)
    sleepy.send(signal.SIGCONT)
    continued = time.time()
    watch.until(
        "its next result",
        lambda _: any(
            each.message.sender == "sleepy" and each.at > continued
            for each in watch.of_kind("result")
        ),
        10,
    )
    version = watch.version
    watch.until_version(version + 2)
    assert not watch.of_kind("left")

    # For longer: it leaves, and joins.
    watch.until("it to have tasks", lambda _: len(_unanswered(watch)) == 2)
    sleepy.send(signal.SIGSTOP)
    stopped = time.time()
    watch.until("it to have left", lambda _: watch.of_kind("left", node="sleepy"), lease_s + 8)
    left = watch.of_kind("left", node="sleepy")[0]
    unfinished = _unanswered(watch)
    assert unfinished, "it had tasks when it was stopped"
    version = watch.version
    watch.until_version(version + 2)
    assert _unanswered(watch) == unfinished
    sleepy.send(signal.SIGCONT)
    watch.until("it to be back", lambda _: len(watch.of_kind("joined", node="sleepy")) == 2, 10)
    watch.until("its results", lambda _: not unfinished & _unanswered(watch), 10)
    assert aggregator.wait(60) == 0, aggregator.said()[-3000:]
    assert broker.wait(20) == 0, broker.said()[-3000:]
    books = check_books(crew.folder / "run", crew.folder / "model")
    assert books.used == books.tasks - books.open_at_end, "a result was lost"
    answers = [each.message.re for each in watch.of_kind("result")]
    assert all(answers.count(name) == 1 for name in unfinished)
    sessions = {each.message.body["session"] for each in watch.of_kind("joined", node="sleepy")}
    assert len(sessions) == 1
    print(f"left {left.at - stopped:.1f} s after it was stopped, lease {lease_s} s")  # noqa: T201 - for pytest -s


def _unanswered(watch: Watch) -> set[str]:
    """Return the ids of the tasks that are with the worker of clients 4 and 5."""
    watch.read()
    answered = {each.message.re for each in watch.of_kind("result", "failed")}
    tasks = [each.message for each in watch.of_kind("task")]
    return {each.id for each in tasks if each.to in ("client/4", "client/5")} - answered


def test_a_worker_on_a_thin_line_has_not_left_while_a_large_model_crosses(
    crew: Crew, proxy: Proxy, watch: Watch
) -> None:
    lease_s = 3.0
    proxy.rate = 2e6
    broker = crew.broker(lease_s, "--once", "--no-share-files")
    aggregator = crew.aggregator(
        **ECHO, run__versions=1, problem__dim=2_500_000, problem__clients=2
    )
    crew.worker("near", "0")
    crew.worker("far", "1", endpoint=proxy.endpoint)
    assert aggregator.wait(60) == 0, aggregator.said()[-3000:]
    assert broker.wait(20) == 0, broker.said()[-3000:]
    watch.read()
    assert not watch.of_kind("left")
    took = watch.of_kind("version")[0].at - watch.of_kind("task")[0].at
    # 10 MB down and 10 MB up, at 2 MB/s: longer than three leases.
    assert took > 3 * lease_s, f"the line was not slow: {took:.1f} s"
    assert check_books(crew.folder / "run", crew.folder / "model").used == 2
    print(f"a round over 2 MB/s: {took:.1f} s")  # noqa: T201 - for pytest -s
