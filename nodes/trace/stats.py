"""``fedmq trace stats``: messages and bytes, the delivery audit, outcomes and staleness."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fedmq.broker.core.lifecycles import (
    ImpossibleTransition,
    MessageEvent,
    MessageLives,
    MessageState,
)
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, AnyEntry, Consumed, Refusal
from fedmq.broker.wire.addresses import RECORD
from fedmq.broker.wire.schema import Blob, Message
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.messages.tensor_tables import group_blobs
from fedmq.nodes.process.terminal import WIDTH, count, fitted, plain, plural, seconds, table
from fedmq.nodes.trace.overview import before_damage

_BAR = 50
_BESIDE_BAR = 24
"""Columns beside a bar."""
_BARS = 24
"""Bars, at most; beyond, neighbouring values share a bar."""
_SHOWN = 10


@dataclass
class Tally:
    """A number of messages and their bytes in headers and blobs."""

    messages: int = 0
    header: int = 0
    blobs: int = 0

    def add(self, header: int, blobs: int) -> None:
        """Count one message."""
        self.messages += 1
        self.header += header
        self.blobs += blobs


@dataclass
class Traffic:
    """Messages and bytes by kind, node and codec; a repeated blob is stored once."""

    kinds: dict[str, Tally] = field(default_factory=dict)
    sent: dict[str, Tally] = field(default_factory=dict)
    received: dict[str, Tally] = field(default_factory=dict)
    codecs: dict[tuple[str, str], Tally] = field(default_factory=dict)
    repeats: Tally = field(default_factory=Tally)
    named: set[tuple[str, bytes]] = field(default_factory=set)
    """Blobs by owner and digest."""

    def feed(self, message: Message, header: int, host: str | None) -> None:
        """Count a message; ``header`` is in bytes, ``host`` is the node that hosts its address."""
        size = sum(blob.size for blob in message.blobs)
        self.kinds.setdefault(message.kind, Tally()).add(header, size)
        self.sent.setdefault(message.sender, Tally()).add(header, size)
        if host is not None:
            self.received.setdefault(host, Tally()).add(header, size)
        for blob in message.blobs:
            name = (message.sender, blob.digest)
            if name in self.named:
                self.repeats.add(0, blob.size)
            elif blob.size:
                self.named.add(name)
        for codec, blobs in _by_codec(message):
            tally = self.codecs.setdefault((codec, message.kind), Tally())
            tally.add(0, sum(blob.size for blob in blobs))


_REJECTED = (
    MessageState.REJECTED,
    MessageState.SETTLED,
    MessageState.DEAD_LETTERED,
    MessageState.REDELIVERED,
)


class DeliveryAudit:
    """Checks the identity of docs/guarantees.md: accepted = consumed + pending + rejected.

    Records do not count: they are stored, not delivered. A message that was rejected and also
    consumed counts as rejected.

    Attributes:
        faults: sentences on violations.
        accepted, records: number of messages that were accepted for delivery, and of records.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.accepted = self.records = 0
        self._lives = MessageLives()
        self._pending: dict[int, str] = {}
        """Kinds of the pending messages, by number."""

    def feed(self, entry: AnyEntry, message: Message | None) -> None:
        """Count an entry; ``message``: the one that it accepts, if it does."""
        match entry:
            case Accepted(seq=seq) if message is not None:
                if message.to == RECORD:
                    self.records += 1
                    self._lives.move(seq, MessageEvent.RECORD)
                else:
                    self.accepted += 1
                    self._lives.move(seq, MessageEvent.ACCEPT)
                    self._pending[seq] = sys.intern(message.kind)
                self._end(seq, MessageEvent.CONSUME, entry.consumes, "consumes")
            case Consumed(seq=seq, of=of):
                self._end(seq, MessageEvent.CONSUME, of, "consumes")
            case Refusal(seq=seq, of=int(of), dead_lettered=dead):
                event = MessageEvent.DEAD_LETTER if dead else MessageEvent.REJECT
                self._end(seq, event, (of,), "rejects")

    def sums(self) -> tuple[int, int, int, int]:
        """Return the numbers of messages accepted, consumed, pending and rejected."""
        found = self._lives.count()
        rejected = sum(found[state] for state in _REJECTED)
        return self.accepted, found[MessageState.CONSUMED], len(self._pending), rejected

    def pending(self) -> dict[str, int]:
        """Return the number of pending messages of each kind."""
        return dict(Counter(self._pending.values()).most_common())

    def _end(self, seq: int, event: MessageEvent, of: Iterable[int], verb: str) -> None:
        """Apply what entry ``seq`` does to messages; what cannot happen to one is a fault."""
        for each in of:
            try:
                self._lives.move(each, event)
            except ImpossibleTransition:
                unknown = self._lives.state_of(each) in (MessageState.NONE, MessageState.RECORDED)
                why = ", which is not an accepted message" if unknown else " a second time"
                self.faults.append(f"entry {seq} {verb} {each}{why}")
            self._pending.pop(each, None)


class Stats:
    """All counts of one run, up to its end or to damage."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.history = RunHistory()
        self.traffic, self.account = Traffic(), DeliveryAudit()
        for entry in before_damage(trace):
            facts = self.history.feed(entry)
            self.account.feed(entry, facts.message)
            if isinstance(entry, Accepted) and facts.message is not None:
                self.traffic.feed(facts.message, len(entry.message), facts.host)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        yield from self._run()
        yield ""
        yield from self._traffic()
        yield ""
        yield from itertools.chain.from_iterable(map(_fitted, self._account()))
        yield ""
        yield from itertools.chain.from_iterable(map(_fitted, self._outcomes()))
        yield ""
        yield from self._staleness()

    def _run(self) -> Iterator[str]:
        history, begun = self.history, self.trace.opened.at
        end = "not ended" if history.ended is None else f"ended: {plain(history.ended)}"
        lasted = seconds((begun if history.now is None else history.now) - begun)
        yield f"run {plain(self.trace.run)}, {end}"
        yield (
            f"{count(history.entries)} entries in {lasted} s, {plural(history.version, 'version')}"
        )

    def _traffic(self) -> Iterator[str]:
        head = ("messages", "header bytes", "blob bytes")
        traffic = self.traffic
        total = Tally()
        for each in traffic.kinds.values():
            total.messages += each.messages
            total.header += each.header
            total.blobs += each.blobs
        kinds = [(plain(name), *_cells(each)) for name, each in traffic.kinds.items()]
        yield from table(("kind", *head), [*kinds, ("all", *_cells(total))])
        yield ""
        roles = {name: node.role for name, node in self.history.nodes.items()}
        nodes = [
            (
                plain(node),
                roles.get(node) or "-",
                way,
                *_cells(tallies[node]),
            )
            for node in sorted({*traffic.sent, *traffic.received})
            for way, tallies in (("sent", traffic.sent), ("received", traffic.received))
            if node in tallies
        ]
        yield from table(("node", "role", "direction", *head), nodes, left=3)
        yield ""
        codecs = [
            (plain(codec), plain(kind), count(each.messages), count(each.blobs))
            for (codec, kind), each in traffic.codecs.items()
        ]
        yield from table(("codec", "kind", "groups", "blob bytes"), codecs, left=2)
        yield ""
        blobs, saved = plural(traffic.repeats.messages, "blob"), count(traffic.repeats.blobs)
        yield f"deduplicated: {blobs}, {saved} bytes saved"

    def _account(self) -> Iterator[str]:
        account = self.account
        accepted, consumed, pending, refused = account.sums()
        holds = accepted == consumed + pending + refused and not account.faults
        yield (
            f"accepted {count(accepted)} = consumed {count(consumed)} + pending {count(pending)}"
            f" + rejected {count(refused)}: {'holds' if holds else 'DOES NOT HOLD'}"
        )
        yield from (f"  {fault}" for fault in account.faults[:_SHOWN])
        if len(account.faults) > _SHOWN:
            yield f"  and {count(len(account.faults) - _SHOWN)} more"
        if pending:
            left = ", ".join(f"{plain(name)} {count(n)}" for name, n in account.pending().items())
            yield f"pending: {left}"
        yield f"also: {plural(account.records, 'record')} (stored, not delivered)"
        if unaccepted := self.history.outcomes.unaccepted:
            yield f"also: {plural(unaccepted, 'message')} rejected before acceptance"

    def _outcomes(self) -> Iterator[str]:
        found = self.history.outcomes
        yield (
            f"results {count(found.results)} = used {count(found.used)} + stale "
            f"{count(found.stale)} + rejected {count(found.refused)} + unused {count(found.unused)}"
        )
        for what, codes in (("reasons", found.rejected), ("failed tasks", found.failed)):
            if codes.total():
                known = ", ".join(
                    f"{plain(code) or 'unknown'} {count(n)}" for code, n in codes.most_common() if n
                )
                yield f"{what}: {known}"
        cohorts = found.cohorts
        if cohorts.versions:
            yield (
                f"rounds: {count(cohorts.whole)} of {count(cohorts.versions)} complete, "
                f"{count(cohorts.missing)} of {plural(cohorts.wanted, 'result')} missing"
            )
        without = found.without_result
        if without:
            yield f"{plural(len(without), 'client')} without a used result:"
        for client, record in itertools.islice(without.items(), _SHOWN):
            last = plain(record.reason) or "no answer"
            yield f"  client {client}: {plural(record.tasks, 'task')}, last: {last}"
        if len(without) > _SHOWN:
            yield f"  and {count(len(without) - _SHOWN)} more"

    def _staleness(self) -> Iterator[str]:
        used = self.history.outcomes.staleness
        many = used.total()
        if not many:
            yield "no result was used"
            return
        mean = sum(value * number for value, number in used.items()) / many
        yield (
            f"staleness of {plural(many, 'used result')}, in versions: "
            f"mean {mean:.2f}, max {max(used)}"
        )
        yield from histogram(used)


def histogram(values: Counter[int]) -> Iterator[str]:
    """Yield a bar for each value, or for each few neighbouring values."""
    low, high = min(values), max(values)
    step = -(-(high - low + 1) // _BARS)
    bars = Counter[int]()
    for value, number in values.items():
        bars[(value - low) // step] += number
    most, total = max(bars.values()), values.total()
    names = [
        str(low + n * step) if step == 1 else f"{low + n * step}-{low + (n + 1) * step - 1}"
        for n in range((high - low) // step + 1)
    ]
    width = max(map(len, names))
    longest = min(_BAR, WIDTH - width - _BESIDE_BAR)
    for index, name in enumerate(names):
        number = bars[index]
        # Even the smallest number gets one character.
        bar = "#" * max(round(longest * number / most), bool(number))
        share = f"{100 * number / total:.1f} %"
        yield f"  {name:>{width}}  {count(number):>9}  {share:>7}  {bar}".rstrip()


def _fitted(line: str) -> list[str]:
    """Return a line as lines that fit a terminal; those after the first are indented."""
    inset = line[: len(line) - len(line.lstrip())]
    return [inset + each for each in fitted(line.lstrip(), width=WIDTH - len(inset))]


def _cells(tally: Tally) -> tuple[str, str, str]:
    return count(tally.messages), count(tally.header), count(tally.blobs)


def _by_codec(message: Message) -> Iterator[tuple[str, tuple[Blob, ...]]]:
    """Yield codec and blobs of each group of a message, then the other blobs."""
    first = 0
    for _, codec, blobs in group_blobs(message):
        yield codec, blobs
        first += len(blobs)
    if first < len(message.blobs):
        yield "(no tensors)", message.blobs[first:]
