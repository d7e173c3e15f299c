"""One seeded history: a run with random faults, and the checks of the guarantees."""

import contextlib
import functools
import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from fedmq.broker.access.rights import KEYLESS, Access, Origin
from fedmq.broker.ledger import blob_store, retention, writer
from fedmq.broker.ledger.entries import PAYLOAD, Accepted, AnyEntry, segment_numbers
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.virtual.disk import DiskFault
from fedmq.broker.virtual.network import Faults
from fedmq.broker.wire import chunked_transfer, schema
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import Setup, set_up
from fedmq.nodes.simulation.virtual_run import RUN, Chances, Simulation
from tests.sim.access import FileInMemory, key_of
from tests.sim.keyed import KeyedSimulation, KeyPlan
from tests.sim.promises import CHECKS
from tests.sim.strangers import MALLORY, Mallory
from tests.sim.witness import Witness

SCHEDULES = (
    {"name": "rounds", "fraction": 0.5},
    {"name": "rounds", "fraction": 1.0, "deadline_s": 3.0},
    {"name": "buffered", "size": 2, "concurrency": 3},
    {"name": "stream", "concurrency": 3, "max_staleness": 1},
)
CALM_AFTER_S = 25.0
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


@dataclass(frozen=True)
class Plan:
    """What the seed of a history decides.

    Attributes:
        schedule, algorithm, checkpoint_s: see `setup_of`.
        chances: fault rates.
        broker: lease and heartbeat; its limit of deliveries is never reached, because the crashes
            here have nothing to do with the message that they interrupt.
        retain_bytes: of the ledger.
        inline_bytes, chunk_bytes: see `sizes`.
        messages_bytes, payload_bytes: sizes of a full segment of the ledger.
        keys: what happens to the keys; None for a run without keys.
        mallory: whether there is a node that attacks.
    """

    schedule: int
    algorithm: str
    checkpoint_s: float
    chances: Chances
    broker: BrokerSettings
    retain_bytes: int | None = None
    inline_bytes: int = schema.INLINE_BYTES
    chunk_bytes: int = schema.CHUNK_BYTES
    messages_bytes: int = 64 << 20
    payload_bytes: int = 128 << 20
    keys: KeyPlan | None = None
    mallory: bool = False

    @contextlib.contextmanager
    def sizes(self):
        """Let a model of a few bytes travel and be stored as large ones: in chunks and segments."""
        with (
            mock.patch.object(schema, "INLINE_BYTES", self.inline_bytes),
            mock.patch.object(schema, "POST_BYTES", self.inline_bytes),
            mock.patch.object(chunked_transfer, "CHUNK_BYTES", self.chunk_bytes),
            mock.patch.object(blob_store, "CHUNK_BYTES", self.chunk_bytes),
            mock.patch.object(writer, "_MESSAGES_SEGMENT_BYTES", self.messages_bytes),
            mock.patch.object(writer, "_PAYLOAD_SEGMENT_BYTES", self.payload_bytes),
            mock.patch.object(retention, "LEAST_SEGMENT_BYTES", self.payload_bytes),
        ):
            yield


def draw_plan(seed):
    """Draw how much trouble there is; most histories have none of some kinds."""
    rng = random.Random(seed)  # noqa: S311 - a test's own dice

    def some(most, share=0.6):
        return rng.random() * most if rng.random() < share else 0.0

    chances = Chances(
        faults=Faults(
            loss=some(0.15),
            duplicate=some(0.2),
            reorder=some(0.2),
            reorder_s=rng.random(),
            delay_s=rng.choice([0.001, 0.01, 0.1]),
        ),
        crash=some(0.12),
        doom=some(0.15),
        power=some(0.12),
        disk={
            DiskFault.WRITE_ERROR: some(0.02),
            DiskFault.SHORT_WRITE: some(0.2),
            DiskFault.NO_SPACE: some(0.03),
            DiskFault.SYNC_ERROR: some(0.04, share=0.8),
            DiskFault.TRUNCATE_ERROR: some(0.5),
            DiskFault.CLOSE_ERROR: some(0.1),
            DiskFault.UNLINK_ERROR: some(0.9, share=0.8),
            DiskFault.READ_ERROR: some(0.02),
            DiskFault.FLIPPED_BIT: some(0.02),
        },
        full=some(0.06, share=0.7),
        pause=some(0.1, share=0.8),
        cut=some(0.2),
        partition=some(0.08),
        jump=some(0.1),
        jump_s=rng.choice([1.0, 60.0, 3600.0]),
        drift=rng.choice([0.0, 0.01, 0.1]),
        train_s=rng.choice([0.05, 0.5, 3.0]),
        batch_s=rng.choice([0.0, 0.0, 0.01, 0.2]),
        chat=some(1.0, share=0.15),
        share_files=rng.random() < 0.5,
    )
    # Dice of their own: other histories stay as they are.
    coming = random.Random(f"availability {seed}")  # noqa: S311 - a test's own dice
    if coming.random() < 0.25:
        chances.availability = coming.random()
    lease_s = rng.choice([2.0, 3.0, 6.0])
    inline_bytes, chunk_bytes = rng.choice([(schema.INLINE_BYTES, schema.CHUNK_BYTES), (100, 64)])
    payload_bytes = rng.choice([1 << 10, 1 << 10, 4 << 10, 128 << 20])
    return Plan(
        schedule=rng.randrange(len(SCHEDULES)),
        algorithm=rng.choice(["Tally", "Tally", "BesideTally"]),
        checkpoint_s=rng.choice([0.0, 1.0, 5.0]),
        chances=chances,
        broker=BrokerSettings(lease_s, lease_s / rng.choice([3, 4, 6]), deliveries=1000),
        retain_bytes=rng.choice([None, None, None, None, 4 * payload_bytes]),
        inline_bytes=inline_bytes,
        chunk_bytes=chunk_bytes,
        messages_bytes=rng.choice([1 << 10, 8 << 10, 64 << 20]),
        payload_bytes=payload_bytes,
        keys=draw_keys(rng) if rng.random() < 0.5 else None,
        mallory=rng.random() < 0.5,
    )


def draw_keys(rng):
    """Draw what happens to the keys."""

    def at():
        return rng.uniform(1.0, CALM_AFTER_S)

    return KeyPlan(
        revoke_s=at() if rng.random() < 0.5 else None,
        replace=(rng.choice(["worker-0", "aggregator", "evaluator"]), at())
        if rng.random() < 0.5
        else None,
        guests=rng.choice([0, 0, 3, 4]),
        edits=tuple(at() for _ in range(rng.randrange(3))),
    )


@dataclass
class History:
    """A finished history, to be checked.

    Attributes:
        seed, plan: of the history.
        setup: objects of the run.
        folder: of the ledger.
        witness: has seen it.
        ended: whether the run has ended within ``limit_s`` of virtual time.
        aggregator: core of the session that has ended the run, or of the last one.
        entries: the ledger's entries.
        messages: the accepted messages, by number.
        faults: number of faults of each kind.
        simulation: what ran.
        access: the content of the access file at the end; None without keys.
        mallory: the node that attacked, if there was one.
    """

    seed: int
    plan: Plan
    setup: Setup
    folder: Path
    witness: Witness
    ended: bool
    aggregator: Aggregator
    entries: list[AnyEntry] = field(default_factory=list)
    messages: Mapping[int, Message] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    limit_s: float = LIMIT_S
    simulation: Simulation | None = None
    access: Access | None = None
    mallory: Mallory | None = None

    @property
    def is_whole(self):
        """Return whether the ledger still has all blobs: the retention policy deleted none."""
        numbers = segment_numbers(self.folder, PAYLOAD)
        return numbers == list(range(len(numbers)))


def run_history(seed, plan, folder):
    """Run one history; raise AssertionError if a promise is broken meanwhile."""
    setup = setup_of(plan.schedule, plan.checkpoint_s, plan.algorithm)
    witness = Witness(folder, plan.chances.drift, plan.broker.lease_s)
    ledger = LedgerSettings(retain_bytes=plan.retain_bytes)
    about = (setup, 2, folder, seed, plan.chances, plan.broker, ledger, witness)
    file, access = FileInMemory(random.Random(seed)), None  # noqa: S311 - a test's own dice
    with file.in_place_of_files():
        simulation = KeyedSimulation(plan.keys, file, *about) if plan.keys else Simulation(*about)
        witness.simulation = simulation
        origin = Origin(key_of(MALLORY), "10.0.0.66") if plan.keys else KEYLESS
        mallory = Mallory(simulation, origin) if plan.mallory else None
        try:
            ended = simulation.run(CALM_AFTER_S, LIMIT_S)
        finally:
            simulation.close()
        if plan.keys:
            access = simulation.operator.load()
    finished = [each.core for each in simulation.sessions if getattr(each, "finished", "")]
    aggregator = (finished or [simulation.aggregator.core])[-1]
    faults = simulation.network.made + simulation.broker.disk.made  # `+` drops those made 0 times
    return History(
        seed,
        plan,
        setup,
        folder,
        witness,
        ended,
        aggregator,
        faults=faults,
        simulation=simulation,
        access=access,
        mallory=mallory,
    )


def check_history(seed, plan=None, keep=None):
    """Run one history, and check everything that is promised; return it.

    keep: new folder in which its ledger stays; by default, it is deleted.
    """
    plan = plan or draw_plan(seed)
    with tempfile.TemporaryDirectory(prefix="fedmq-sim-") as folder, plan.sizes():
        history = run_history(seed, plan, Path(keep or folder))
        witness = history.witness
        witness.check_durability()
        history.entries = witness.entries
        history.messages = {
            each.seq: witness.message_of(each)
            for each in history.entries
            if isinstance(each, Accepted)
        }
        for check in CHECKS:
            check(history)
    return history
