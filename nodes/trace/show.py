"""``fedmq trace show``: one entry with its fields, its outcome and its tensors."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, Consumed, Ended, Refusal
from fedmq.broker.wire.addresses import RECORD
from fedmq.broker.wire.schema import Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.errors import NodeError
from fedmq.nodes.history.facts import natural
from fedmq.nodes.history.outcomes import ResultOutcome
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.process.terminal import (
    count,
    fields,
    figure,
    pairs,
    plain,
    plural,
    seconds,
    spans,
    table,
)
from fedmq.nodes.trace.bodies import shown_body
from fedmq.nodes.trace.differ import Operand, fold_of
from fedmq.nodes.trace.groups import Group, Read, groups_of
from fedmq.nodes.trace.listing import at_host, rejection_verb
from fedmq.nodes.trace.overview import before_damage

_HEAD = ("tensor", "shape", "dtype", "bytes", "norm", "min", "max", "NaN")


def show(trace: Trace, seq: int) -> Iterator[str]:
    """Yield the lines on the entry with this number.

    Raises:
        LedgerError: there is no such entry, or it cannot be read.
        NodeError: it belongs to another run.
    """
    entry = trace.entry(seq)
    at = entry.at - trace.opened.at
    when = dt.datetime.fromtimestamp(entry.at, dt.UTC)
    kind = type(entry).__name__.lower()
    message = entry.read() if isinstance(entry, Accepted) else None
    run = message.run if message is not None else getattr(entry, "run", trace.run)
    if run != trace.run:
        raise NodeError(
            f"entry {seq}: expected one of run {trace.run!r}, got one of {run!r}: see --run-id"
        )
    yield (
        f"entry {seq}: {plain(message.kind) if message else kind}, "
        f"{seconds(at)} s after the start ({when:%Y-%m-%d %H:%M:%S.%f} UTC)"
    )
    if isinstance(entry, Accepted) and message is not None:
        yield from _message(trace, entry, message)
    else:
        known = msgspec.structs.asdict(entry)
        shown = {name: each for name, each in known.items() if name not in ("seq", "at")}
        if isinstance(entry, Consumed):
            yield from pairs([("node", plain(entry.node)), ("of", spans(entry.of))])
            return
        yield from pairs(fields(shown))


@dataclass
class _Related:
    """Facts on one message from other entries; texts are one line each."""

    host: str | None = None
    request: Accepted | None = None
    """The message that it answers."""
    answers: list[str] = field(default_factory=list)
    outcome: list[str] = field(default_factory=list)


def _message(trace: Trace, entry: Accepted, message: Message) -> Iterator[str]:
    related = _related_to(trace, entry, message)
    blobs = sum(blob.size for blob in message.blobs)
    rows = [
        ("id", plain(message.id)),
        ("run", plain(message.run)),
        ("from", plain(message.sender)),
        ("to", at_host(message.to, related.host)),
    ]
    if message.re is not None:
        rows.append(("answers", _answered(entry, message.re, related.request)))
    if entry.consumes:
        rows.append(("consumes", plain(spans(entry.consumes), 2000)))
    size = f"{count(len(entry.message))} in the header"
    if message.blobs:
        size += f", {count(blobs)} in {plural(len(message.blobs), 'blob')}"
    rows.append(("bytes", size))
    rows += [("answered" if not n else "", each) for n, each in enumerate(related.answers)]
    rows += [("outcome" if not n else "", each) for n, each in enumerate(related.outcome)]
    yield from pairs(rows)
    body = {name: each for name, each in shown_body(message).items() if name != "groups"}
    if body:
        yield ""
        yield "body"
        yield from pairs(fields(body))
    yield from _payload(message, functools.partial(trace.blob, message))


def _payload(message: Message, read: Read) -> Iterator[str]:
    """Yield the lines on a message's blobs: groups of tensors, then other blobs."""
    try:
        groups, rest = groups_of(message)
    except CodecError as error:
        yield ""
        yield f"groups: {plain(error)}"
        groups, rest = [], 0
    for group in groups:
        yield ""
        yield from _group(group, read)
    for index in range(rest, len(message.blobs)):
        blob = message.blobs[index]
        yield ""
        yield f"blob {index}: {plural(blob.size, 'byte')}, {blob.digest.hex()}"
        found = fold_of(Operand(message, read), index)
        yield from [f"  {found}"] if isinstance(found, str) else pairs(fields(found))


def _group(group: Group, read: Read) -> Iterator[str]:
    digests = ", ".join(blob.digest.hex() for blob in group.blobs)
    yield f"{plain(group.name)}: {plain(group.codec)}, {count(group.nbytes)} bytes ({digests})"
    if group.table is not None:
        size, digest = count(group.table.size), group.table.digest.hex()
        yield f"  names and shapes: {size} bytes ({digest})"
    try:
        tensors = group.decode(read)
    except (CodecError, LedgerError) as error:
        yield f"  cannot be decoded: {plain(error)}"
        return
    sizes = group.sizes(read)
    rows = [_tensor(name, each, sizes.get(name)) for name, each in tensors.items()]
    if len(tensors) > 1:
        rows.append(_total(tensors, group.nbytes))
    yield from (f"  {line}" for line in table(_HEAD, rows, left=3))


def _tensor(name: str, tensor: Tensor, nbytes: int | None) -> tuple[str, ...]:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    dtype = str(tensor.dtype).removeprefix("torch.")
    size = "-" if nbytes is None else count(nbytes)
    nans = int(tensor.isnan().sum())
    numbers = tensor[~tensor.isnan()] if nans else tensor
    if not numbers.numel():
        return plain(name), shape, dtype, size, "-", "-", "-", count(nans)
    low, high = (figure(float(each)) for each in (numbers.min(), numbers.max()))
    return plain(name), shape, dtype, size, figure(_norm(tensor)), low, high, count(nans)


def _total(tensors: Mapping[str, Tensor], nbytes: int) -> tuple[str, ...]:
    elements = sum(each.numel() for each in tensors.values())
    nans = sum(int(each.isnan().sum()) for each in tensors.values())
    norm = sum(_norm(each) ** 2 for each in tensors.values()) ** 0.5
    return "all", count(elements), "", count(nbytes), figure(norm), "", "", count(nans)


def _norm(tensor: Tensor) -> float:
    """Return the L2 norm of a tensor of any real dtype."""
    if not tensor.is_floating_point():
        tensor = tensor.double()
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


# ---- outcome


def _related_to(trace: Trace, entry: Accepted, message: Message) -> _Related:
    """Read the whole trace for facts on one message."""
    related, history, seq = _Related(), RunHistory(), entry.seq
    settled = message.to == RECORD
    for other in before_damage(trace):
        since = f"{seconds(other.at - entry.at)} s later"
        facts = history.feed(other)
        match other:
            case Accepted() if (each := facts.message) is not None:
                if other.seq == seq:
                    related.host = facts.host
                elif message.re is not None and each.id == message.re and other.seq < seq:
                    related.request = other
                elif each.re == message.id and other.seq > seq:
                    answer = f"by entry {other.seq}, {plain(each.kind)} from {plain(each.sender)}"
                    related.answers.append(f"{answer}, {since}")
                if seq in other.consumes:
                    settled = True
                    related.outcome.append(f"consumed with entry {other.seq}, {since}")
            case Consumed(of=of) if seq in of:
                settled = True
                by = plain(other.node)
                related.outcome.append(f"consumed by {by}, {since} (entry {other.seq})")
            case Refusal(of=of) if of == seq:
                by = plain(other.node)
                by = f"{rejection_verb(other)} by {by}, {since} (entry {other.seq})"
                related.outcome.append(f"{by}: {plain(other.reason, 2000)}")
            case Ended() if not settled:
                settled = True
                related.outcome.append(f"pending when the run ended (entry {other.seq})")
    outcomes = history.outcomes
    stale, base = outcomes.staleness_of(seq), natural(message.body.get("model_version"))
    if stale is not None and base is not None:
        related.outcome.append(f"used in version {base + stale + 1}, staleness {stale}")
    elif message.kind == "result" and outcomes.outcome_of(seq) is not ResultOutcome.REJECTED:
        related.outcome.append("not used in any version")
    if message.to == RECORD:
        related.outcome.append("stored as a record, not delivered")
    elif not settled:
        related.outcome.append("pending")
    return related


def _answered(entry: Accepted, name: str, request: Accepted | None) -> str:
    if request is None:
        return f"{plain(name)}, which is not in the trace"
    since = seconds(entry.at - request.at)
    return f"{plain(name)} (entry {request.seq}, {since} s before)"
