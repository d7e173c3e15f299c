"""Run an aggregator's core again on its recorded inbox, and compare its actions with the record.

There is no network and no clock: messages have their recorded times. Every action of the core
must be in the ledger, in the same order and with the same digests. At the first one that is not,
the code or the machine differs from that of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch

import fedmq
from fedmq.algorithms.allowed import NOTHING, Allowed
from fedmq.algorithms.base import Payload
from fedmq.algorithms.schedules.recorded_rounds import RecordedRounds
from fedmq.algorithms.schedules.rounds import Rounds
from fedmq.algorithms.toolkit.arithmetic import ARITHMETIC
from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, AnyEntry
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.wire.addresses import AGGREGATOR, CHECKPOINT, CONTINUED, node_address
from fedmq.broker.wire.schema import Buffer
from fedmq.nodes.aggregator.checkpoint import unpack_checkpoint
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.aggregator.driver import AggregatorDriver
from fedmq.nodes.errors import NodeError, own_code
from fedmq.nodes.messages.actions import AggregatorAction, Start
from fedmq.nodes.replay.record import RecordedOutput
from fedmq.nodes.replay.tolerance import TOLERANCE, tensor_distance
from fedmq.nodes.run.config import Config, parse
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.setup import Setup, set_up

INBOX = (AGGREGATOR, node_address(AGGREGATOR))
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ReplayStep:
    """One event that the core has handled, and its actions."""

    event: Start | Delivery
    actions: list[AggregatorAction]


class Replay:
    """An aggregator of a recorded run, from its start or from a checkpoint.

    Args:
        trace: of the run.
        checkpoint: number of the checkpoint to start from; None: from the beginning.
        setup: by default, from the recorded configuration.
        allowed: the code that the record may name.

    Attributes:
        setup: problem, algorithm, schedule and codecs.
        computed: how the recorded aggregator computed.
        version_0_distance: distance between the recorded version 0 and the one that this machine
            would create, as a multiple of `TOLERANCE`; None if none was recorded.
        core: the aggregator; `steps` runs it.
        record: compares the core's actions with the trace.
        messages: number of messages that the core has handled.
        at: time of the last of them, in seconds since 1970.

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
        self.record = RecordedOutput(
            trace,
            exact=self._is_exact(),
            same_release=self.computed.release == fedmq.__version__,
        )
        self._driver = AggregatorDriver(self.core, self.record)
        self._recorded = {} if self.record.exact else _checkpoints(trace)
        self.messages = 0
        self.at = trace.opened.at
        self._checkpoint = checkpoint
        self._rest: Iterator[AnyEntry] = trace.entries()
        self._begun = False

    def steps(self, until: int | None = None) -> Iterator[ReplayStep]:
        """Run the core on its inbox, message by message; a second call continues.

        Args:
            until: number of the last message to handle. If the aggregator sent it itself, the
                core stops right after sending it.

        Raises:
            Diverged: an action differs from the record.
            LedgerError: the trace is damaged, there is no entry ``until``, or the entry
                ``checkpoint`` is not a checkpoint.
        """
        own = self._own_id(until) if until is not None else None
        stopped = False
        skipped: list[AnyEntry] = []
        if not self._begun:
            self._begun = True
            step = self._start()
            yield step
            stopped = _sends(step, own)
        for entry in self._rest:
            if until is not None and entry.seq > until:
                skipped.append(entry)
                break
            if not self._is_next(entry):
                self.record.compare(entry)
            elif stopped:
                skipped.append(entry)  # for the next call
            else:
                step = self._handle(recorded_delivery(self.trace, entry))
                yield step
                stopped = _sends(step, own)
            if entry.seq == until:
                break  # later entries may be damaged
        self._rest = itertools.chain(skipped, self._rest)

    def _start(self) -> ReplayStep:
        if self._checkpoint is None:
            first = self._run_record if self.computed.arithmetic >= ARITHMETIC else None
            own = self.core.tensors()
            step = self._handle(
                Start(run_record=recorded_delivery(self.trace, first) if first else None)
            )
            if first is not None:
                one, other = Payload(exact=self.core.tensors()), Payload(exact=own)
                self.version_0_distance = tensor_distance(one, other) / TOLERANCE
            return step
        accepted = accepted_entry(self.trace, self._checkpoint)
        message = accepted.read()
        if message.to != CHECKPOINT:
            raise LedgerError(
                f"message {self._checkpoint}: expected a checkpoint, got {message.kind}"
            )
        self.record.first = int(message.id.rpartition("/")[2]) + 1
        step = self._handle(Start(recorded_delivery(self.trace, accepted)))
        self.record.after = self.core.position
        return step

    def _own_id(self, seq: int) -> str | None:
        """Return the id of an entry, if it is a message of this run's aggregator."""
        entry = self.trace.entry(seq)
        message = entry.read() if isinstance(entry, Accepted) else None
        if message is None or (message.sender, message.run) != (AGGREGATOR, self.trace.run):
            return None
        return message.id

    def _is_next(self, entry: AnyEntry) -> TypeGuard[Accepted]:
        """Return whether the core handles this entry next."""
        if not isinstance(entry, Accepted):
            return False
        if entry.seq <= self.record.after and entry.seq not in self.core.deferred:
            return False
        message = entry.read()
        # After its end, a run handles only messages that may extend it.
        return message.to in INBOX and (not self.record.ended or message.kind == CONTINUED)

    def _handle(self, event: Start | Delivery) -> ReplayStep:
        actions = self._driver.handle(event)
        if isinstance(event, Delivery):
            self.messages += 1
            self.at, self.record.trigger = event.at, event.seq
        self._driver.carry_out(actions)
        for action in actions:
            if isinstance(action, PostMessage) and action.message.id in self._recorded:
                self._adopt(self._recorded[action.message.id])
        if self.record.ended and not self.core.finishing:  # it was extended
            self.record.expect_new_end()
        return ReplayStep(event, actions)

    def _is_exact(self) -> bool:
        """Return whether this machine must compute the recorded values to the bit."""
        if self.computed.arithmetic != ARITHMETIC:
            return False
        return self.setup.algorithm.reproducible or self.computed.device == kind_of("cpu")

    def _adopt(self, entry: Accepted) -> None:
        """Continue from the recorded state of a version, so that small distances do not add up."""
        recorded = recorded_delivery(self.trace, entry)
        # The comparison of this entry reports one that cannot be read.
        with contextlib.suppress(NodeError, LedgerError):
            state, _ = unpack_checkpoint(self.setup.algorithm, self.setup.problem, recorded)
            self.core.adopt(state)


def _run_record(trace: Trace) -> Accepted | None:
    """Return the aggregator's first message of the run, if the trace contains it."""
    with contextlib.suppress(LedgerError):  # the replay raises it later
        for entry in trace.entries():
            if isinstance(entry, Accepted):
                message = entry.read()
                if message.sender == AGGREGATOR and message.kind == "run":
                    return entry
    return None


def computed_by(trace: Trace) -> Computed:
    """Return how a recorded run was computed; 0.1.0 did not record it."""
    return _computed(_run_record(trace))


def _computed(run_record: Accepted | None) -> Computed:
    # Without a record the trace contains no computed values.
    return Computed.read(run_record.read().body) if run_record is not None else Computed()


def _checkpoints(trace: Trace) -> dict[str, Accepted]:
    """Return the aggregator's checkpoints by id, up to damage."""
    found: dict[str, Accepted] = {}
    with contextlib.suppress(LedgerError):
        for entry in trace.entries():
            if isinstance(entry, Accepted):
                message = entry.read()
                if message.to == CHECKPOINT and message.sender == AGGREGATOR:
                    found[message.id] = entry
    return found


def recorded_setup(trace: Trace, config: Config | None = None, allowed: Allowed = NOTHING) -> Setup:
    """Return the setup of a recorded run, as its aggregator had it.

    Args:
        trace: of the run.
        config: replaces the recorded configuration.
        allowed: the code that it may name.

    Raises:
        ConfigError: the configuration cannot be used here, or names code that is not allowed.
        OwnCodeError: the problem's own code fails.
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
    """Return the number of the newest checkpoint that a replay can start from.

    Args:
        trace: of the run.
        before: number of an entry; later checkpoints do not count.

    Raises:
        LedgerError: there is no checkpoint.
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
        LedgerError: there is no such entry, or it is not a message.
    """
    entry = trace.entry(seq)
    if not isinstance(entry, Accepted):
        raise LedgerError(f"entry {seq}: expected a message, got {type(entry).__name__.lower()}")
    return entry


def recorded_delivery(trace: Trace, entry: Accepted) -> Delivery:
    """Return a recorded message as a core receives it."""
    return Delivery(entry.seq, entry.at, entry.read(), source=_TraceBlobs(trace))


@dataclass(frozen=True)
class _TraceBlobs:
    """The blobs of a trace, as a `BlobSource`."""

    trace: Trace

    def read(self, delivery: Delivery, index: int) -> Buffer:
        return self.trace.blob(delivery.message, index)

    def chunks(self, delivery: Delivery, index: int) -> Iterator[Buffer]:
        data = memoryview(self.read(delivery, index))
        for start in range(0, data.nbytes, _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]


def _sends(step: ReplayStep, name: str | None) -> bool:
    return name is not None and any(
        isinstance(each, PostMessage) and each.message.id == name for each in step.actions
    )
