"""One seeded history: a run with trouble of every kind, and what must hold of it."""

import contextlib
import functools
import random
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger import blob_store
from fedmq.broker.ledger.entries import Accepted, Consumed, Ended, Refusal
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.network import Faults
from fedmq.broker.wire import chunked_transfer, schema
from fedmq.broker.wire.addresses import RECORD
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.virtual_run import RUN, Chances, Simulation
from tests.broker.ledger.payload import open_payload

SCHEDULES = (
    {"name": "rounds", "fraction": 0.5},
    {"name": "rounds", "fraction": 1.0, "deadline_s": 3.0},
    {"name": "buffered", "size": 2, "concurrency": 3},
    {"name": "stream", "concurrency": 3, "max_staleness": 1},
)
CALM_AFTER_S = 40.0
LIMIT_S = 400.0


@functools.cache
def setup_of(index, checkpoint_s, algorithm="Tally"):
    return set_up(
        build(
            {
                "run": {
                    "id": RUN,
                    "versions": 4,
                    "evaluate_every": 2,
                    "checkpoint_s": checkpoint_s,
                },
                "problem": {"name": "tests.sim.tally:Vector"},
                "algorithm": {"name": f"tests.sim.tally:{algorithm}"},
                "schedule": SCHEDULES[index],
            }
        )
    )


@contextlib.contextmanager
def pieces_of(inline_bytes, chunk_bytes):
    """Let a model of a few bytes travel as large ones do: apart, in chunks, under credit."""
    with (
        mock.patch.object(schema, "INLINE_BYTES", inline_bytes),
        mock.patch.object(schema, "POST_BYTES", inline_bytes),
        mock.patch.object(chunked_transfer, "CHUNK_BYTES", chunk_bytes),
        mock.patch.object(blob_store, "CHUNK_BYTES", chunk_bytes),
    ):
        yield


def chances_of(rng):
    """Draw how much trouble there is; some histories have none of one kind."""

    def some(most, share=0.7):
        return rng.random() * most if rng.random() < share else 0.0

    return Chances(
        faults=Faults(
            loss=some(0.15),
            duplicate=some(0.2),
            reorder=some(0.2),
            reorder_s=rng.random(),
            delay_s=rng.choice([0.001, 0.01, 0.1]),
        ),
        crash=some(0.15),
        doom=some(0.15),
        cut=some(0.3),
        partition=some(0.1),
        train_s=rng.choice([0.05, 0.5, 3.0]),
        chat=some(1.0, share=0.15),
        share_files=rng.random() < 0.5,
    )


def check_history(seed):
    """Run one history and check everything that is promised of it."""
    rng = random.Random(seed)  # noqa: S311 - a test's own dice
    index, checkpoint_s = rng.randrange(len(SCHEDULES)), rng.choice([0.0, 1.0, 5.0])
    chances = chances_of(rng)
    setup = setup_of(index, checkpoint_s, rng.choice(["Tally", "Tally", "BesideTally"]))
    # Crashes here have nothing to do with the message that they interrupt.
    settings = BrokerSettings(lease_s=3.0, beat_s=0.5, deliveries=1000)
    sizes = rng.choice([(schema.INLINE_BYTES, schema.CHUNK_BYTES), (100, 64)])
    with tempfile.TemporaryDirectory(prefix="fedmq-sim-") as folder, pieces_of(*sizes):
        simulation = Simulation(setup, 2, Path(folder), seed, chances, settings)
        try:
            ended = simulation.run(CALM_AFTER_S, LIMIT_S)
            assert ended, f"not over after {LIMIT_S:g} s of virtual time"
        finally:
            simulation.close()
        entries = list(read_entries(Path(folder)))
        index = open_payload(Path(folder))
        check_kept(simulation, entries)
        check_order(simulation, entries)
        check_account(entries)
        check_timers(entries)
        check_locals(entries)
        check_fold(simulation, setup, Path(folder))
        index.close()
    return entries


def check_kept(simulation, entries):
    """Accepted is kept: whatever has a receipt is in the ledger, once, or was refused there."""
    accepted = Counter(
        (message.sender, message.id)
        for message in (each.read() for each in entries if isinstance(each, Accepted))
    )
    twice = [name for name, times in accepted.items() if times > 1]
    assert not twice, f"accepted twice: {twice}"
    refused = {each.id for each in entries if isinstance(each, Refusal) and each.of is None}
    for host in simulation.sessions:
        for name in host.port.acknowledged:
            known = (host.port.name, name) in accepted or name in refused
            assert known, f"{name} of {host.port.name} has a receipt, but is not in the ledger"


def check_order(simulation, entries):
    """In order: a session's messages stand in the ledger in the order of their posting."""
    position = {}
    for entry in entries:
        if isinstance(entry, Accepted):
            message = entry.read()
            position[message.sender, message.id] = entry.seq
    assert [each.seq for each in entries] == list(range(len(entries)))
    posted_before = defaultdict(set)
    for host in simulation.sessions:
        name = host.port.name
        fresh = [each for each in host.port.posted if each not in posted_before[name]]
        found = [position[name, each] for each in fresh if (name, each) in position]
        assert found == sorted(found), f"{name} is out of order in the ledger"
        posted_before[name] |= set(host.port.posted)


def check_account(entries):
    """Refused is said: accepted = consumed + pending + refused, and each refusal has its word."""
    accepted, consumed, refused = set(), set(), set()
    told = Counter()
    for entry in entries:
        match entry:
            case Accepted():
                message = entry.read()
                if message.to != RECORD:
                    accepted.add(entry.seq)
                for seq in entry.consumes:
                    assert seq in accepted, f"consumed what was not accepted: {seq}"
                    assert seq not in consumed, f"consumed twice: {seq}"
                    consumed.add(seq)
                if message.kind == "refused":
                    told[message.re] += 1
            case Consumed(of=of):
                for seq in of:
                    assert seq in accepted
                    assert seq not in consumed, f"consumed twice: {seq}"
                    consumed.add(seq)
            case Refusal(of=int(seq)):
                assert seq in accepted
                assert seq not in refused, f"refused twice: {seq}"
                refused.add(seq)
    for entry in entries:
        if isinstance(entry, Refusal):
            assert told[entry.id], f"nobody told the sender of {entry.id}: {entry.reason}"
    assert consumed | refused <= accepted


def check_timers(entries):
    """A tick that was asked for comes, though the broker was away when it was due."""
    due = {}
    for entry in entries:
        match entry:
            case Accepted():
                message = entry.read()
                if message.to == "timer":
                    due[entry.seq] = entry.at + message.body["after_s"]
                for seq in entry.consumes:
                    due.pop(seq, None)
            case Ended(at=at):
                late = [seq for seq, when in due.items() if when < at - 10]
                assert not late, f"timers {late} were forgotten"


def check_locals(entries):
    """A task changes its client once: what it kept counts its tasks without a gap."""
    tasks = defaultdict(list)
    for entry in entries:
        if isinstance(entry, Accepted):
            message = entry.read()
            if message.kind == "result":
                tasks[message.body["client"]].append(message.body["numbers"]["tasks"])
    for client, numbers in tasks.items():
        assert numbers == list(range(1, len(numbers) + 1)), f"client {client} did {numbers}"


def check_fold(simulation, setup, folder):
    """Applied once: the aggregator's state is the fold of its inbox, whatever died meanwhile.

    And all that it said, in whatever session, is what the fold says: a replay checks that.
    """
    replay = Replay(Trace(folder, RUN), setup=setup)
    for _ in replay.steps():
        pass
    (live, *_) = [
        each.core for each in reversed(simulation.sessions) if getattr(each, "finished", "")
    ]
    assert replay.core.version == live.version == setup.config.run.versions
    assert model_digest(replay.core.tensors()) == model_digest(live.tensors())
    assert replay.core.state_snapshot()["counts"] == live.state_snapshot()["counts"]
    assert not replay.record.unmatched
