"""The aggregator's core, run again over its recorded inbox, and held against its record.

No network and no clock: a message's time is the one that was written down. Everything the
core says must stand in the ledger, in the same order and to the same digests; the first
that does not is where the code, or the machine, has parted from the run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch

from fedmq.algorithms.schedules.recorded_rounds import RecordedRounds
from fedmq.algorithms.schedules.rounds import Rounds
from fedmq.broker.entries import Accepted, AnyEntry
from fedmq.broker.errors import LedgerError
from fedmq.broker.state import AGGREGATOR, CHECKPOINT, node_address
from fedmq.broker.trace import Trace
from fedmq.nodes.aggregator import RULES, Aggregator, Start
from fedmq.nodes.config import Config, parse
from fedmq.nodes.inbox import AggregatorAction, Finish, Inbound, Post
from fedmq.nodes.replay.record import Record
from fedmq.nodes.setup import Setup, set_up

INBOX = (AGGREGATOR, node_address(AGGREGATOR))


@dataclass(frozen=True)
class Step:
    """One event that the core has taken, and what it said to that."""

    event: Start | Inbound
    actions: list[AggregatorAction]


class Replay:
    """An aggregator of a recorded run, from its start or from a checkpoint.

    Args:
        trace: of the run.
        checkpoint: number of the checkpoint to start from; None starts from the beginning.
        setup: by default, what the record says.

    Attributes:
        setup: what is learned, how, and when.
        core: the aggregator; `steps` moves it.
        record: what was found in the trace of what the core has said.
        messages: how many the core has taken.
        at: time of the last of them.

    Raises:
        ConfigError: the run's configuration cannot be used here.
    """

    def __init__(
        self, trace: Trace, checkpoint: int | None = None, *, setup: Setup | None = None
    ) -> None:
        self.trace = trace
        self.setup = setup or recorded_setup(trace)
        self.core = Aggregator(self.setup, trace.run, AGGREGATOR)
        self.record = Record(trace)
        self.messages = 0
        self.at = trace.opened.at
        self._checkpoint = checkpoint
        self._rest: Iterator[AnyEntry] = trace.entries()
        self._begun = self._over = False

    def steps(self, until: int | None = None) -> Iterator[Step]:
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

    def _begin(self) -> Step:
        if self._checkpoint is None:
            return self._take(Start())
        accepted = accepted_entry(self.trace, self._checkpoint)
        message = accepted.read()
        if message.to != CHECKPOINT:
            raise LedgerError(f"expected a checkpoint, message {self._checkpoint} is none")
        self.record.first = int(message.id.rpartition("/")[2]) + 1
        step = self._take(Start(inbound(self.trace, accepted)))
        self.record.after = self.core.parts()["position"]
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
        if not isinstance(entry, Accepted) or self._over:
            return False
        if entry.seq <= self.record.after and entry.seq not in self.core.parts()["waiting"]:
            return False
        return entry.read().to in INBOX

    def _take(self, event: Start | Inbound) -> Step:
        actions = self.core.handle(event)
        if isinstance(event, Inbound):
            self.messages += 1
            self.at = event.at
        self.record.expect(actions, event.seq if isinstance(event, Inbound) else -1)
        self._over = any(isinstance(each, Finish) for each in actions)
        return Step(event, actions)


def recorded_setup(trace: Trace, config: Config | None = None) -> Setup:
    """Return the objects of a recorded run, as its aggregator made them.

    Raises:
        ConfigError: its configuration cannot be used here.
    """
    setup = set_up(config or parse(trace.opened.config))
    torch.set_num_threads(setup.config.worker.threads)
    if isinstance(setup.schedule, Rounds) and recorded_rules(trace) < RULES:
        schedule = RecordedRounds(**dataclasses.asdict(setup.schedule))
        setup = dataclasses.replace(setup, schedule=schedule)
    return setup


def recorded_rules(trace: Trace) -> int:
    """Return by which of the aggregator's `RULES` a run was folded."""
    for entry in trace.entries():
        if isinstance(entry, Accepted):
            message = entry.read()
            if message.kind == "run" and message.sender == AGGREGATOR:
                rules = message.body.get("rules", 1)
                return rules if isinstance(rules, int) else 1
    return RULES


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


def _says(step: Step, name: str | None) -> bool:
    return name is not None and any(
        isinstance(each, Post) and each.message.id == name for each in step.actions
    )
