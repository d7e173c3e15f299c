"""Runs during which everything dies, again and again; and the books that they leave.

Seven kills in one run and four in the other; FEDMQ_CHAOS_KILLS=30 is the long form of both,
FEDMQ_CHAOS_SEED=2 another havoc.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from tests.chaos.crew import Crew, Process, Proxy, wait_until
from tests.chaos.keyring import Keyring
from tests.chaos.ledgers import Watch, check_books

pytestmark = pytest.mark.end_to_end

KILLS = int(os.environ.get("FEDMQ_CHAOS_KILLS", "0"))
SEED = int(os.environ.get("FEDMQ_CHAOS_SEED", "1"))
LEASE_S = 2.0
STEP = 8
"""Versions between two kills, on average."""
WHILE_STOPPED = 40
"""Versions that the others may commit while a worker is stopped: each task takes 0.05 s."""
ESSENTIAL = ("broker", "aggregator")
OTHERS = ("one", "two", "three", "evaluator")
TOGETHER = 0.25
"""How often a second one is killed before the first is back."""
CLIENTS = {"one": "0-3", "two": "4-7", "three": "8-11"}
BUFFERED = {
    "schedule__name": "buffered",
    "schedule__size": 4,
    "schedule__concurrency": 8,
    "schedule__max_staleness": 6,
}
ROUNDS = {
    "schedule__name": "rounds",
    "schedule__fraction": 0.5,
    "schedule__over_select": 1.3,
    "schedule__deadline_s": 0.5,
    "run__evaluate_every": 3,
}
"""With timers, and an evaluator: both are to outlive a broker."""


class Havoc:
    """Who is hit, when, and how; all from one seed."""

    def __init__(self, crew: Crew, proxy: Proxy, watch: Watch, procs: dict[str, Process]) -> None:
        self._crew, self._proxy, self._watch, self._procs = crew, proxy, watch, procs
        self._rng = random.Random(SEED)  # noqa: S311 - nothing secret
        self.told: list[str] = []
        self.killed: list[str] = []

    def wreak(self, kills: int) -> None:
        at = 2
        victims: list[str] = []
        number = 0
        while number < kills:
            at += self._rng.randint(STEP // 2, STEP * 3 // 2)
            self._watch.until_version(at, 60)
            self._linger(0.2)
            # Among any four, the broker and the aggregator.
            victims = victims or self._rng.sample([*ESSENTIAL, *self._rng.sample(OTHERS, 2)], 4)
            chosen = [victims.pop()]
            if victims and victims[-1] not in chosen and self._rng.random() < TOGETHER:
                chosen.append(victims.pop())
            self._kill(*chosen[: kills - number])
            match number % 6:
                case 0 | 4:
                    self._cut()
                case 1:
                    self._proxy.rate = 2e6
                    self._note("connection at 2 MB/s")
                case 2:
                    self._proxy.rate = None
                    self._cut()
                case 3:
                    self._stop("two")
            number += len(chosen)

    def _kill(self, *names: str) -> None:
        for name in names:
            self._procs[name].kill()
            self.killed.append(name)
        self._note(f"{' and '.join(names)} killed")
        for name in names:
            self._linger(0.6)
            self._procs[name] = self._procs[name].again()

    def _cut(self) -> None:
        wait_until("a connection to cut", lambda: self._proxy.connected, 20)
        self._proxy.cut()
        self._note("connection cut")

    def _stop(self, name: str) -> None:
        """Stop a worker for longer than its lease."""
        process, seen = self._procs[name], self._watch
        seen.until(f"{name} to be there", lambda _: self._is_here(name))
        process.send(signal.SIGSTOP)
        seen.until(f"{name} to have left", lambda _: not self._is_here(name), LEASE_S + 10)
        process.send(signal.SIGCONT)
        seen.until(f"{name} to be back", lambda _: self._is_here(name), 20)
        self._note(f"{name} stopped for longer than its lease")

    def _is_here(self, name: str) -> bool:
        moves = self._watch.of_kind("joined", "left", node=name)
        return bool(moves) and moves[-1].message.kind == "joined"

    def _linger(self, most_s: float) -> None:
        """Let a random time pass: that a kill comes at any moment is what is tested."""
        time.sleep(self._rng.uniform(0, most_s))

    def _note(self, what: str) -> None:
        self.told.append(f"{what} at version {self._watch.version}")


def keyring(crew: Crew) -> Keyring:
    """Return the keys of all processes."""
    keys = Keyring(crew.folder / "keys", crew.endpoint)
    keys.authorize("aggregator", "aggregator")
    keys.authorize("evaluator", "evaluator")
    for name, clients in CLIENTS.items():
        low, high = clients.split("-")
        keys.authorize(name, "worker", ((int(low), int(high)),))
    return keys


def replace_by_invite(crew: Crew, keys: Keyring, procs: dict[str, Process], watch: Watch) -> None:
    """Revoke a worker's key; a worker with an invite takes over its clients, and dies once."""
    keys.revoke("two")
    watch.until("two to have left", lambda it: it.of_kind("left", node="two"), 10)
    assert procs["two"].wait(20) == 2, procs["two"].said()[-3000:]
    invite = crew.folder / "invite"
    invite.write_text(keys.invite("four", ((4, 7),)))
    invite.chmod(0o600)
    own = ("--join-file", str(invite), "--keys", str(crew.folder / "keys-four"))
    procs["four"] = crew.worker("four", CLIENTS["two"], *own)
    for starts in (1, 2):
        watch.until(f"work of four after start {starts}", lambda it, n=starts: works(it, n), 20)
        if starts == 1:
            procs["four"].kill()
            procs["four"] = procs["four"].again()


def works(watch: Watch, starts: int) -> bool:
    """Return whether worker four has a result after it has joined this many times."""
    joined, results = watch.of_kind("joined", node="four"), watch.of_kind("result", sender="four")
    return len(joined) == starts and bool(results) and results[-1].seq > joined[-1].seq


@pytest.mark.timeout(120 + 12 * KILLS)
@pytest.mark.parametrize(
    ("schedule", "kills", "with_keys"),
    [(BUFFERED, 7, False), (ROUNDS, 4, True)],
    ids=["async", "sync-with-keys"],
)
def test_whatever_dies_the_run_ends_and_every_update_is_accounted_for(
    crew: Crew,
    proxy: Proxy,
    watch: Watch,
    schedule: dict[str, object],
    kills: int,
    with_keys: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    if with_keys:
        crew.keys = keyring(crew)
    kills = KILLS or kills
    versions = 10 + kills * STEP * 3 // 2 + WHILE_STOPPED * ((kills + 2) // 6)
    started = time.monotonic()
    settings = {"problem__clients": 12, "run__versions": versions, "run__checkpoint_s": 0.5}
    procs = {
        "broker": crew.broker(LEASE_S, "--once"),
        "aggregator": crew.aggregator(**{**settings, **schedule}),
        "one": crew.worker("one", CLIENTS["one"]),
        "two": crew.worker("two", CLIENTS["two"]),
        "three": crew.worker("three", CLIENTS["three"], endpoint=proxy.endpoint),
    }
    evaluating = ("--evaluator", "--name", "evaluator", "--state", "state-evaluator")
    procs["evaluator"] = crew.node("evaluator", "worker", *evaluating)
    havoc = Havoc(crew, proxy, watch, procs)
    havoc.wreak(kills)
    codes = dict.fromkeys(("aggregator", "broker", *OTHERS), 0)
    if crew.keys is not None:
        replace_by_invite(crew, crew.keys, procs, watch)
        codes |= {"two": 2, "four": 0}
    for name, code in codes.items():
        assert procs[name].wait(60 + versions / 4) == code, procs[name].said()[-3000:]
    took = time.monotonic() - started

    books = check_books(crew.folder / "run", crew.folder / "model")
    assert books.versions == versions
    assert books.used > 3 * versions
    assert proxy.cuts == sum("cut" in each for each in havoc.told) > 0
    watch.read()
    sessions = {each.message.body["session"] for each in watch.of_kind("joined")}
    deaths = [each for each in havoc.killed if each != "broker"]
    starts = 5 + len(deaths) + (2 if with_keys else 0)
    assert len(sessions) == starts, "each start is one session, whatever was cut"
    for each in crew.started:
        assert "Traceback" not in each.said(), each.said()[-3000:]
    told = {"took_s": round(took, 1), "kills": len(havoc.killed), "havoc": havoc.told}
    print(json.dumps(told, indent=1), books)  # noqa: T201 - for pytest -s
