"""``fedmq trace diff``: where two runs part, in order and in content."""

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
from fedmq.nodes.trace.outcomes import before_damage


@dataclass(frozen=True)
class NumberedMessage:
    """A message of a run: its entry, and a key that is the same for the same one of another.

    That is who said it and its id. The broker makes its ids from numbers in the ledger, so
    of its messages it is what they are about, and how many of these there were before.
    """

    seq: int
    key: int
    message: Message

    def __str__(self) -> str:
        message = self.message
        about = "" if message.sender == BROKER else f" {word(message.id)}"
        told = [str(message.body[name]) for name in ("node", "token") if name in message.body]
        more = f" ({plain(', '.join(told))})" if message.sender == BROKER and told else ""
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
                told = (message.body.get(name) for name in ("node", "token"))
                parts = [BROKER, message.kind, message.to, message.re or "", *map(repr, told)]
            key = xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(parts))
            if message.sender == BROKER:
                before[key] += 1
                key = xxhash.xxh3_64_intdigest(msgspec.msgpack.encode((key, before[key])))
            yield NumberedMessage(entry.seq, key, message)


@dataclass
class Comparison:
    """How two runs compare, message by message, besides what honest runs differ in.

    models: up to which version the models of both are the same to the bit, and the first
        version in which they are not, or None.
    parting: the first message of each, counted from 0, that is not the same one; and where
        the message of A stands in B, or None.
    content: the first message that both have with other content, its number in B, and in
        what they differ. If that is the configuration, the first after it too.
    """

    counts: tuple[int, int] = (0, 0)
    common: int = 0
    models: tuple[int, int | None] = (0, None)
    parting: tuple[int, NumberedMessage | None, NumberedMessage | None, int | None] | None = None
    content: list[tuple[NumberedMessage, int, list[Difference]]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Tell whether there is nothing to say."""
        return self.parting is None and not self.content

    def lines(self) -> Iterator[str]:
        """Yield what there is to say."""
        if self.equal:
            yield f"{plural(self.common, 'message')}, all equal"
            return
        yield (
            f"{plural(self.counts[0], 'message')} in A, {count(self.counts[1])} in B, "
            f"{count(self.common)} in both"
        )
        yield ""
        if self.parting is None:
            yield "order: the same"
        else:
            yield from self._parting(*self.parting)
        yield ""
        yield from self._models(*self.models)
        yield ""
        if not self.content:
            yield "content: every message that both have is the same"
        for (found, theirs, said), which in zip(self.content, ("first", "next"), strict=False):
            yield f"content: the {which} difference is in entry {found.seq} of A, {theirs} of B"
            yield f"  {found}"
            yield from (f"  {each}" for each in said)

    def _models(self, same: int, other: int | None) -> Iterator[str]:
        if other is not None:
            upto = f"the same up to version {same}, " if same else ""
            yield f"model: {upto}another in version {other}"
        elif same:
            yield f"model: the same in every version that both have, up to {same}"
        else:
            yield "model: there is no version that both have"

    def _parting(
        self,
        index: int,
        ours: NumberedMessage | None,
        theirs: NumberedMessage | None,
        there: int | None,
    ) -> Iterator[str]:
        yield f"order: they part after {plural(index, 'message')}; then comes"
        for name, each in (("A", ours), ("B", theirs)):
            yield f"  {name}  " + ("nothing more" if each is None else f"entry {each.seq}: {each}")
        if ours is not None:
            yield "  A's is not in B" if there is None else f"  A's stands in B as entry {there}"


def compare(a: Trace, b: Trace) -> Comparison:
    """Compare two runs, each read once as a whole and once more beside the other."""
    places: dict[int, int] = {}
    models: dict[int, str] = {}
    for each in messages(b):
        places[each.key] = each.seq
        models.update(_model_of(each.message))
    found = Comparison()
    totals = [0, 0]
    pairs = itertools.zip_longest(messages(a), messages(b))
    for index, (ours, theirs) in enumerate(pairs):
        totals[0] += ours is not None
        totals[1] += theirs is not None
        there = places.get(ours.key) if ours is not None else None
        if found.parting is None and (ours and ours.key) != (theirs and theirs.key):
            found.parting = (index, ours, theirs, there)
        for version, model in _model_of(ours.message) if ours is not None else ():
            same, other = found.models
            if other is None and version in models:
                equal = model == models[version]
                found.models = (version, None) if equal else (same, version)
        if ours is not None and there is not None:
            found.common += 1
            if not found.content or (len(found.content) == 1 and _is_config(found)):
                # Runs that agree in order are read side by side, and nothing is looked up.
                same = theirs is not None and theirs.key == ours.key
                message = theirs.message if same and theirs is not None else _message(b, there)
                said = differences(_side(a, ours.message), _side(b, message))
                found.content += [(ours, there, said)] if said else []
    found.counts = (totals[0], totals[1])
    return found


def _is_config(found: Comparison) -> bool:
    return found.content[0][0].message.kind == "run"


def _model_of(message: Message) -> Iterator[tuple[int, str]]:
    """Yield the version that a message commits, if it does, and the digest of its model."""
    match message:
        case Message(kind="version", body={"version": int(version), "model_digest": str(model)}):
            yield version, model


def _message(trace: Trace, seq: int) -> Message:
    entry = trace.entry(seq)
    if not isinstance(entry, Accepted):
        raise TypeError(f"entry {seq} was a message when it was first read")
    return entry.read()


def _side(trace: Trace, message: Message) -> Operand:
    return Operand(message, functools.partial(trace.blob, message))
