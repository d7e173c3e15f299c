"""``fedmq trace diff``: the first difference of two runs, in order and in content."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import xxhash

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.wire.addresses import BROKER
from fedmq.broker.wire.schema import Message
from fedmq.nodes.process.terminal import count, plain, plural, word
from fedmq.nodes.trace.differ import Operand, differences
from fedmq.nodes.trace.differences import Difference
from fedmq.nodes.trace.overview import before_damage


@dataclass(frozen=True)
class NumberedMessage:
    """A message of a run, with a key that is equal for the same message of another run.

    seq: number of its entry.
    key: hash of its sender and id. The broker's ids contain entry numbers, so for its messages,
        hash of the content and of how many equal ones came before.
    """

    seq: int
    key: int
    message: Message

    def __str__(self) -> str:
        message = self.message
        about = "" if message.sender == BROKER else f" {word(message.id)}"
        subject = [str(message.body[name]) for name in ("node", "token") if name in message.body]
        more = f" ({plain(', '.join(subject))})" if message.sender == BROKER and subject else ""
        what = f"{word(message.kind)}{about}{more}"
        return f"{what}, {word(message.sender)} -> {word(message.to)}"


def messages(trace: Trace) -> Iterator[NumberedMessage]:
    """Yield the messages of a run, up to its end or its damage."""
    before: Counter[int] = Counter()
    for entry in before_damage(trace):
        if isinstance(entry, Accepted):
            message = entry.read()
            parts = [message.sender, message.id]
            if message.sender == BROKER:
                subject = (message.body.get(name) for name in ("node", "token"))
                parts = [BROKER, message.kind, message.to, message.re or "", *map(repr, subject)]
            key = xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(parts))
            if message.sender == BROKER:
                before[key] += 1
                key = xxhash.xxh3_64_intdigest(msgspec.msgpack.encode((key, before[key])))
            yield NumberedMessage(entry.seq, key, message)


@dataclass
class Comparison:
    """Differences of two runs A and B, except in fields that always differ (`HONEST`).

    counts: messages of A and of B.
    common: messages that both have.
    models: the last version up to which both models are equal to the bit; the first version
        in which they differ, or None.
    order: where the order first differs: the position, counted from 0; the message of A and of B
        there, None at an end; and the entry of A's message in B, or None.
    content: the first common message with different content, its entry in B, and the
        differences. If it is the configuration, then also the first one after it.
    """

    counts: tuple[int, int] = (0, 0)
    common: int = 0
    models: tuple[int, int | None] = (0, None)
    order: tuple[int, NumberedMessage | None, NumberedMessage | None, int | None] | None = None
    content: list[tuple[NumberedMessage, int, list[Difference]]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Return whether no difference was found."""
        return self.order is None and not self.content

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        if self.equal:
            yield f"{plural(self.common, 'message')}, all equal"
            return
        yield (
            f"{plural(self.counts[0], 'message')} in A, {count(self.counts[1])} in B, "
            f"{count(self.common)} in both"
        )
        yield ""
        if self.order is None:
            yield "order: equal"
        else:
            yield from self._order(*self.order)
        yield ""
        yield from self._models(*self.models)
        yield ""
        if not self.content:
            yield "content: all common messages are equal"
        for (found, theirs, differing), which in zip(self.content, ("first", "next"), strict=False):
            yield f"content: the {which} difference is in entry {found.seq} of A, {theirs} of B"
            yield f"  {found}"
            yield from (f"  {each}" for each in differing)

    def _models(self, same: int, other: int | None) -> Iterator[str]:
        if other is not None:
            equal = f"equal up to version {same}, " if same else ""
            yield f"model: {equal}different in version {other}"
        elif same:
            yield f"model: equal in all common versions, up to {same}"
        else:
            yield "model: no common version"

    def _order(
        self,
        index: int,
        ours: NumberedMessage | None,
        theirs: NumberedMessage | None,
        there: int | None,
    ) -> Iterator[str]:
        yield f"order: equal for {plural(index, 'message')}, then"
        for name, each in (("A", ours), ("B", theirs)):
            yield f"  {name}  " + ("ends" if each is None else f"entry {each.seq}: {each}")
        if ours is not None:
            where = "is not in B" if there is None else f"is entry {there} in B"
            yield f"  A's message {where}"


def compare(a: Trace, b: Trace) -> Comparison:
    """Compare two runs; read B once to index it, then both side by side."""
    entries: dict[int, int] = {}
    models: dict[int, str] = {}
    for each in messages(b):
        entries[each.key] = each.seq
        models.update(_model_of(each.message))
    found = Comparison()
    totals = [0, 0]
    pairs = itertools.zip_longest(messages(a), messages(b))
    for index, (ours, theirs) in enumerate(pairs):
        totals[0] += ours is not None
        totals[1] += theirs is not None
        there = entries.get(ours.key) if ours is not None else None
        if found.order is None and (ours and ours.key) != (theirs and theirs.key):
            found.order = (index, ours, theirs, there)
        for version, model in _model_of(ours.message) if ours is not None else ():
            same, other = found.models
            if other is None and version in models:
                equal = model == models[version]
                found.models = (version, None) if equal else (same, version)
        if ours is not None and there is not None:
            found.common += 1
            if not found.content or (len(found.content) == 1 and _is_config(found)):
                # In equal order, B's message has already been read.
                same = theirs is not None and theirs.key == ours.key
                message = theirs.message if same and theirs is not None else _message(b, there)
                differing = differences(_operand(a, ours.message), _operand(b, message))
                found.content += [(ours, there, differing)] if differing else []
    found.counts = (totals[0], totals[1])
    return found


def _is_config(found: Comparison) -> bool:
    return found.content[0][0].message.kind == "run"


def _model_of(message: Message) -> Iterator[tuple[int, str]]:
    """Yield the version that a message commits, if any, and the digest of its model."""
    match message:
        case Message(kind="version", body={"version": int(version), "model_digest": str(model)}):
            yield version, model


def _message(trace: Trace, seq: int) -> Message:
    entry = trace.entry(seq)
    if not isinstance(entry, Accepted):
        raise TypeError(f"expected a message in entry {seq}, which was one when it was indexed")
    return entry.read()


def _operand(trace: Trace, message: Message) -> Operand:
    return Operand(message, functools.partial(trace.blob, message))
