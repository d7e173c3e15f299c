"""What other systems lose when a process dies or comes back: here, each in one drill."""

from __future__ import annotations

import shutil
import signal
import time

import pytest

from fedmq.broker.ledger.blob_store import _RECENT_BYTES
from fedmq.broker.wire.chunked_transfer import WINDOW_CHUNKS
from fedmq.broker.wire.schema import CHUNK_BYTES
from tests.chaos.crew import Crew, Process, wait_until
from tests.chaos.ledgers import Seen, Watch, check_books

pytestmark = pytest.mark.end_to_end

LEASE_S = 5.0
BUFFERED = {"schedule__name": "buffered", "schedule__size": 3, "schedule__concurrency": 6}
ROUNDS = {"schedule__name": "rounds", "schedule__fraction": 1.0}
MODEL_MB = 100.0
SLACK_MB = 30.0


def ends_well(crew: Crew, aggregator: Process, broker: Process) -> None:
    assert aggregator.wait(60) == 0, aggregator.said()[-3000:]
    assert broker.wait(LEASE_S + 20) == 0, broker.said()[-3000:]


def large(megabytes: float) -> dict[str, object]:
    """Return the settings for a model of this size, which is sent to and fro."""
    return {
        "problem__name": "chaos_models:Vector",
        "problem__dim": int(megabytes * 1e6 / 4),
        "problem__model": None,
        "problem__examples": None,
        "algorithm__name": "chaos_models:Echo",
        "algorithm__pause_s": None,
    }


def joined(watch: Watch, name: str) -> list[Seen]:
    return watch.of_kind("joined", node=name)


def pause_after(watch: Watch, moment: float) -> float:
    """Return how long it was from the last version before a moment to the first one after."""
    watch.read()
    times = [each.at for each in watch.of_kind("version")]
    return min(each for each in times if each > moment) - max(
        each for each in times if each <= moment
    )


def test_a_dead_worker_costs_synchronous_rounds_at_most_its_lease(crew: Crew, watch: Watch) -> None:
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(
        problem__clients=4, run__versions=6, algorithm__pause_s=0.3, **ROUNDS
    )
    crew.worker("one", "0-1")
    two = crew.worker("two", "2-3")
    watch.until_version(2)
    watch.until("tasks of the next round", lambda _: watch.of_kind("task", model_version=2))
    two.kill()
    killed = time.time()
    assert watch.version == 2, "this machine is too slow: it was not killed mid-round"
    ends_well(crew, aggregator, broker)
    pause = pause_after(watch, killed)
    # The lease counts from its last beat; then there is the rest of the round, and noise.
    assert pause <= LEASE_S + 2, f"the round took {pause:.1f} s, the lease is {LEASE_S} s"
    books = check_books(crew.folder / "run", crew.folder / "model")
    assert (books.versions, books.open_at_end) == (6, 2)
    results = [each.message.body["results"] for each in watch.of_kind("version")]
    assert results == [4, 4, 2, 2, 2, 2]
    print(f"round with a death: {pause:.2f} s, lease {LEASE_S} s")  # noqa: T201 - for pytest -s


def test_a_dead_worker_costs_an_asynchronous_run_nothing(crew: Crew, watch: Watch) -> None:
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(
        **{**BUFFERED, "schedule__concurrency": 8},
        problem__clients=12,
        run__versions=45,
        algorithm__pause_s=0.1,
    )
    for name, clients in (("one", "0-3"), ("three", "8-11")):
        crew.worker(name, clients)
    two = crew.worker("two", "4-7")
    watch.until_version(5)
    two.kill()
    killed = time.time()
    ends_well(crew, aggregator, broker)
    watch.read()
    lapsed = watch.of_kind("left", node="two")
    assert lapsed, "the run ended before the lease did: nothing was tested"
    longest = max(watch.pauses(start=killed - 1))
    # Ten tasks a second are done by each of the others: a version takes 0.15 s, plus noise.
    assert longest < 1.5, f"no version for {longest:.2f} s after a worker's death"
    check_books(crew.folder / "run", crew.folder / "model")
    print(f"longest pause after a death: {longest:.2f} s")  # noqa: T201 - for pytest -s


def test_a_large_model_goes_on_in_the_middle_when_the_broker_dies(crew: Crew, watch: Watch) -> None:
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(
        **ROUNDS, **large(68), run__versions=2, problem__clients=2, run__checkpoint_s=0
    )
    crew.worker("one", "0")
    crew.worker("two", "1")

    def models() -> float:
        return sum(each.stat().st_size for each in crew.ledger.glob("payload-*.log")) / 68e6

    for crossed in (0.5, 2.3, 4.1):
        wait_until(f"{crossed} models to have crossed", lambda it=crossed: models() > it)
        broker.kill()
        broker = broker.again()
    ends_well(crew, aggregator, broker)
    # Three versions and four results, each stored once: what was there did not cross again.
    assert 7 <= models() < 7.1
    assert check_books(crew.folder / "run", crew.folder / "model").used == 4
    shutil.rmtree(crew.folder / "run")


@pytest.mark.parametrize("victim", ["broker", "aggregator"])
def test_a_run_goes_on_at_the_same_version_when_this_is_killed(
    crew: Crew, watch: Watch, victim: str
) -> None:
    procs = {
        "broker": crew.broker(LEASE_S, "--once"),
        "aggregator": crew.aggregator(problem__clients=6, run__versions=25, **BUFFERED),
    }
    crew.worker("one", "0-2")
    crew.worker("two", "3-5")
    watch.until_version(8)
    procs[victim].kill()
    killed = time.time()
    before = watch.version
    kept = list(watch.entries)
    procs[victim] = procs[victim].again()
    watch.until_version(before + 1)
    pause = pause_after(watch, killed)
    ends_well(crew, procs["aggregator"], procs["broker"])
    assert watch.entries[: len(kept)] == kept
    following = [each for each in watch.of_kind("version") if each.seq >= len(kept)]
    assert following[0].message.body["version"] == before + 1
    tasks = [each for each in watch.of_kind("task") if each.seq >= len(kept)]
    assert min(each.message.body["model_version"] for each in tasks) >= before
    assert check_books(crew.folder / "run", crew.folder / "model").versions == 25
    # A broker is up in 0.5 s and an aggregator in 0.3; a node looks for it every second.
    assert pause < LEASE_S, f"no version for {pause:.2f} s after the death of the {victim}"
    print(f"{victim} killed at version {before}: pause {pause:.2f} s")  # noqa: T201 - for pytest -s


def test_a_late_worker_joins_and_gets_tasks(crew: Crew, watch: Watch) -> None:
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(
        problem__clients=4, run__versions=20, run__min_clients=2, **BUFFERED
    )
    crew.worker("early", "0-1")
    watch.until_version(3)
    assert {each.message.to for each in watch.of_kind("task")} == {"client/0", "client/1"}
    crew.worker("late", "2-3")
    ends_well(crew, aggregator, broker)
    watch.read()
    came = joined(watch, "late")[0]
    first = next(each for each in watch.of_kind("result") if each.message.sender == "late")
    assert first.at - came.at < 2
    check_books(crew.folder / "run", crew.folder / "model")


def test_a_worker_comes_back_at_once_and_nobody_else_under_its_name(
    crew: Crew, watch: Watch
) -> None:
    lease_s = 30.0
    broker = crew.broker(lease_s, "--once")
    aggregator = crew.aggregator(problem__clients=4, run__versions=30, **BUFFERED)
    one = crew.worker("one", "0-1")
    crew.worker("two", "2-3")
    watch.until_version(3)
    one.kill()
    killed = time.time()
    one = one.again()
    watch.until("its new session", lambda _: len(joined(watch, "one")) == 2, 10)
    came = joined(watch, "one")[-1]
    assert came.at - killed < 4, f"it waited for {came.at - killed:.1f} s of a lease of {lease_s} s"
    claim = ("--clients", "0-1", "--name", "one", "--state", "another-key")
    claimant = crew.node("claimant", "worker", *claim)
    assert claimant.wait(20) == 2
    assert claimant.said() == "fedmq: a node named 'one' is already connected\n"
    ends_well(crew, aggregator, broker)
    assert one.wait(10) == 0
    watch.read()
    assert len(joined(watch, "one")) == 2
    assert any(
        each.message.sender == "one" and each.seq > came.seq for each in watch.of_kind("result")
    )
    check_books(crew.folder / "run", crew.folder / "model")
    print(f"back after {came.at - killed:.2f} s, lease {lease_s} s")  # noqa: T201 - for pytest -s


def test_clients_move_to_another_node_with_their_unfinished_tasks(crew: Crew, watch: Watch) -> None:
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(
        **{**BUFFERED, "schedule__size": 2, "schedule__concurrency": 4},
        problem__clients=4,
        run__versions=10,
        algorithm__pause_s=0.2,
    )
    here = crew.worker("here", "0-3")
    watch.until_version(2)
    here.send(signal.SIGTERM)
    assert here.wait(10) == 130
    watch.until("its goodbye", lambda _: watch.of_kind("left", node="here"), 10)
    answered = {each.message.re for each in watch.of_kind("result")}
    unfinished = {each.message.id for each in watch.of_kind("task")} - answered
    assert len(unfinished) == 4, "four tasks are kept out at all times"
    crew.worker("there", "0-3")
    ends_well(crew, aggregator, broker)
    watch.read()
    by = {each.message.re: each.message.sender for each in watch.of_kind("result")}
    assert {by.get(name) for name in unfinished} == {"there"}
    books = check_books(crew.folder / "run", crew.folder / "model")
    assert books.used == books.tasks - books.open_at_end


def test_memory_goes_back_after_large_rounds(crew: Crew, watch: Watch) -> None:
    broker = crew.broker(LEASE_S, "--retain", "unfinished")
    aggregator = crew.aggregator(
        **ROUNDS,
        **large(MODEL_MB),
        run__versions=9,
        problem__clients=2,
        algorithm__rest_at=3,
        algorithm__rest_s=600.0,
    )
    one = crew.worker("one", "0")
    watch.until("the first worker", lambda _: joined(watch, "one"), 20)
    nodes = {"broker": broker, "aggregator": aggregator, "one": one}
    wait_until("the worker to be ready", lambda: "admitted" in one.said())
    before = {name: each.rss() for name, each in nodes.items()}
    crew.worker("two", "1")
    watch.until_version(3, 60)
    # What may stay, however many rounds there were. A worker has a task in hand, which is a
    # model. The aggregator has its model and its sum, as before: results so large are added up
    # as they come. A broker keeps the newest pieces at hand, and has had a window of chunks
    # from and for each node; it never holds a model. SLACK_MB is for malloc.
    chunks = 2 * WINDOW_CHUNKS * 3 * CHUNK_BYTES
    most = {"broker": (chunks + _RECENT_BYTES) / 1e6, "aggregator": 0.0, "one": MODEL_MB}
    assert most["broker"] + SLACK_MB < MODEL_MB
    last = watch.of_kind("version")[-1].at
    grown: dict[str, float] = {}

    def is_back() -> bool:
        grown.update({name: each.rss() - before[name] for name, each in nodes.items()})
        if time.time() < last + 3:
            return False
        return all(grown[name] <= most[name] + SLACK_MB for name in nodes)

    try:
        wait_until("memory to go back", is_back, 15)
    except AssertionError:
        pytest.fail(f"in MB, before {before}, grown by {grown} long after the last round")
    finally:
        crew.end()
        shutil.rmtree(crew.folder / "run")
    print("MB before:", before, "and what it has grown by:", grown)  # noqa: T201 - for pytest -s
