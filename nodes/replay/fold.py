"""The aggregator's core, run again over its recorded inbox, and held against its record.

No network and no clock: a message's time is the one that was written down. Everything the
core says must stand in the ledger, in the same order and to the same digests; the first
that does not is where the code, or the machine, has parted from the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch

from fedmq.algorithms.allowed import NOTHING, Allowed
from fedmq.algorithms.base import Payload
from fedmq.algorithms.schedules.recorded_rounds import RecordedRounds
from fedmq.algorithms.schedules.rounds import Rounds
from fedmq.algorithms.toolkit.arithmetic import ARITHMETIC
from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, AnyEntry
from fedmq.broker.wire.addresses import AGGREGATOR, CHECKPOINT, CONTINUED, node_address
from fedmq.nodes.aggregator.checkpoint import unpack_checkpoint
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.errors import NodeError, own_code
from fedmq.nodes.messages.actions import AggregatorAction, EndRun, Inbound, PostMessage, Start
from fedmq.nodes.replay.record import RecordedOutput
from fedmq.nodes.replay.tolerance import TOLERANCE, tensor_distance
from fedmq.nodes.run.config import Config, parse
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.setup import Setup, set_up

INBOX = (AGGREGATOR, node_address(AGGREGATOR))


@dataclass(frozen=True)
class ReplayStep:
    """One event that the core has taken, and what it said to that."""

    event: Start | Inbound
    actions: list[AggregatorAction]


class Replay:
    """An aggregator of a recorded run, from its start or from a checkpoint.

    Args:
        trace: of the run.
        checkpoint: number of the checkpoint to start from; None starts from the beginning.
        setup: by default, what the record says.
        allowed: which code the record may name.

    Attributes:
        setup: what is learned, how, and when.
        computed: how the recorded aggregator's numbers were computed.
        version_0_distance: how far the version 0 that this machine would make lies from the
            recorded one, in units of what is tolerated; None where none was recorded.
        core: the aggregator; `steps` moves it.
        record: what was found in the trace of what the core has said.
        messages: how many the core has taken.
        at: time of the last of them.

    Raises:
        ConfigError: the run's configuration cannot be used here.
    """

    def __init__(
        self,
        trace: Trace,
        checkpoint: int | None = None,
        *,
        setup: Setup | None = None,
        allowed: Allowed = NOTHING,
    ) -> None:
        self.trace = trace
        self.setup = setup or recorded_setup(trace, allowed=allowed)
        self._run_record = _run_record(trace)
        self.computed = _computed(self._run_record)
        self.version_0_distance: float | None = None
        with own_code("algorithm.name"):
            self.core = Aggregator(self.setup, trace.run, AGGREGATOR, self.computed)
        self.record = RecordedOutput(trace, exact=self._is_exact())
        self._recorded = {} if self.record.exact else _checkpoints(trace)
        self.messages = 0
        self.at = trace.opened.at
        self._checkpoint = checkpoint
        self._rest: Iterator[AnyEntry] = trace.entries()
        self._begun = self._over = False

    def steps(self, until: int | None = None) -> Iterator[ReplayStep]:
        """Give the core its inbox, message by message; called again, it goes on from there.

        Args:
            until: number of the last message to take. If it is one of the aggregator's own,
                the core is stopped right after it has said it.

        Raises:
            Diverged: the core says something else than was recorded.
            LedgerError: the trace is damaged, the checkpoint is none, or there is no entry
                ``until``.
        """
        own = self._own_id(until) if until is not None else None
        stopped = False
        skipped: list[AnyEntry] = []
        if not self._begun:
            self._begun = True
            step = self._begin()
            yield step
            stopped = _says(step, own)
        for entry in self._rest:
            if until is not None and entry.seq > until:
                skipped.append(entry)
                break
            if not self._is_next(entry):
                self.record.compare(entry)
            elif stopped:
                skipped.append(entry)  # taken when the core goes on
            else:
                step = self._take(inbound(self.trace, entry))
                yield step
                stopped = _says(step, own)
            if entry.seq == until:
                break  # what lies behind may be damaged
        self._rest = itertools.chain(skipped, self._rest)

    def _begin(self) -> ReplayStep:
        if self._checkpoint is None:
            first = self._run_record if self.computed.arithmetic >= ARITHMETIC else None
            own = self.core.tensors()
            step = self._take(Start(run_record=inbound(self.trace, first) if first else None))
            if first is not None:
                one, other = Payload(exact=self.core.tensors()), Payload(exact=own)
                self.version_0_distance = tensor_distance(one, other) / TOLERANCE
            return step
        accepted = accepted_entry(self.trace, self._checkpoint)
        message = accepted.read()
        if message.to != CHECKPOINT:
            raise LedgerError(f"expected a checkpoint, message {self._checkpoint} is none")
        self.record.first = int(message.id.rpartition("/")[2]) + 1
        step = self._take(Start(inbound(self.trace, accepted)))
        self.record.after = self.core.state_snapshot()["position"]
        return step

    def _own_id(self, seq: int) -> str | None:
        """Return the id of an entry, if it is a message of this run's aggregator."""
        entry = self.trace.entry(seq)
        message = entry.read() if isinstance(entry, Accepted) else None
        if message is None or (message.sender, message.run) != (AGGREGATOR, self.trace.run):
            return None
        return message.id

    def _is_next(self, entry: AnyEntry) -> TypeGuard[Accepted]:
        """Tell whether this is a message that the core is to take."""
        if not isinstance(entry, Accepted):
            return False
        if (
            entry.seq <= self.record.after
            and entry.seq not in self.core.state_snapshot()["waiting"]
        ):
            return False
        message = entry.read()
        # After its end, a run takes only what may make it go further.
        return message.to in INBOX and (not self._over or message.kind == CONTINUED)

    def _take(self, event: Start | Inbound) -> ReplayStep:
        actions = self.core.handle(event)
        if isinstance(event, Inbound):
            self.messages += 1
            self.at = event.at
        self.record.expect(actions, event.seq if isinstance(event, Inbound) else -1)
        for action in actions:
            if isinstance(action, PostMessage) and action.message.id in self._recorded:
                self._anchor(self._recorded[action.message.id])
        if any(isinstance(each, EndRun) for each in actions):
            self._over = True
        elif self._over and not self.core.state_snapshot()["finishing"]:  # it was taken up again
            self._over = False
            self.record.expect_another_end()
        return ReplayStep(event, actions)

    def _is_exact(self) -> bool:
        """Tell whether this machine computes what was recorded to the bit."""
        if self.computed.arithmetic != ARITHMETIC:
            return False
        return self.setup.algorithm.reproducible or self.computed.device == kind_of("cpu")

    def _anchor(self, entry: Accepted) -> None:
        """Go on from the recorded state of a version, so that small distances do not add up."""
        recorded = inbound(self.trace, entry)
        # One that cannot be read is a difference, and found when the replay comes to it.
        with contextlib.suppress(NodeError, LedgerError):
            state, _ = unpack_checkpoint(self.setup.algorithm, self.setup.problem, recorded)
            self.core.adopt(state)


def _run_record(trace: Trace) -> Accepted | None:
    """Return the message with which the aggregator began the run, if the trace holds it."""
    with contextlib.suppress(LedgerError):  # raised when the replay comes to it
        for entry in trace.entries():
            if isinstance(entry, Accepted):
                message = entry.read()
                if message.sender == AGGREGATOR and message.kind == "run":
                    return entry
    return None


def computed_by(trace: Trace) -> Computed:
    """Return how a recorded run was computed; 0.1.0 did not say."""
    return _computed(_run_record(trace))


def _computed(run_record: Accepted | None) -> Computed:
    # Without a record the trace holds nothing that was computed.
    return Computed.read(run_record.read().body) if run_record is not None else Computed()


def _checkpoints(trace: Trace) -> dict[str, Accepted]:
    """Return the aggregator's checkpoints by id, up to damage if there is some."""
    found: dict[str, Accepted] = {}
    with contextlib.suppress(LedgerError):
        for entry in trace.entries():
            if isinstance(entry, Accepted):
                message = entry.read()
                if message.to == CHECKPOINT and message.sender == AGGREGATOR:
                    found[message.id] = entry
    return found


def recorded_setup(trace: Trace, config: Config | None = None, allowed: Allowed = NOTHING) -> Setup:
    """Return the objects of a recorded run, as its aggregator made them.

    Args:
        trace: of the run.
        config: another configuration than the recorded one.
        allowed: which code it may name.

    Raises:
        ConfigError: its configuration cannot be used here, or names code that is not allowed.
        OwnCodeError: the problem cannot be made.
    """
    with own_code("problem.name"):
        setup = set_up(config or parse(trace.opened.config), allowed, trace.run)
    torch.set_num_threads(setup.config.worker.threads)
    old = computed_by(trace).arithmetic < ARITHMETIC
    if old and isinstance(setup.schedule, Rounds):
        schedule = RecordedRounds(**dataclasses.asdict(setup.schedule))
        setup = dataclasses.replace(setup, schedule=schedule)
    return setup


def last_checkpoint(trace: Trace, before: int | None = None) -> int:
    """Return the number of the newest checkpoint that a replay can go on from.

    Args:
        trace: of the run.
        before: number of an entry; only what was checkpointed before it counts.

    Raises:
        LedgerError: there is none.
    """
    found = None
    for entry in trace.entries():
        if before is not None and entry.seq >= before:
            break
        if isinstance(entry, Accepted):
            message = entry.read()
            if message.to == CHECKPOINT and message.kind != "finished":
                found = entry.seq
    if found is None:
        where = "" if before is None else f" before entry {before}"
        raise LedgerError(f"there is no checkpoint{where}: replay from the start")
    return found


def accepted_entry(trace: Trace, seq: int) -> Accepted:
    """Return a message's entry.

    Raises:
        LedgerError: the entry is no message, or not there.
    """
    entry = trace.entry(seq)
    if not isinstance(entry, Accepted):
        raise LedgerError(f"expected a message, entry {seq} is a {type(entry).__name__.lower()}")
    return entry


def inbound(trace: Trace, entry: Accepted) -> Inbound:
    """Return a recorded message as a core takes it."""
    message = entry.read()
    return Inbound(entry.seq, entry.at, message, functools.partial(trace.blob, message))


def _says(step: ReplayStep, name: str | None) -> bool:
    return name is not None and any(
        isinstance(each, PostMessage) and each.message.id == name for each in step.actions
    )
