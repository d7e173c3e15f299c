"""Golden traces, and modified copies of them."""

import json
import shutil
from itertools import pairwise

import torch
from click.testing import CliRunner
from msgspec.structs import replace

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import (
    MESSAGES,
    Accepted,
    BlobName,
    Consumed,
    Ended,
    Refusal,
    segment_path,
)
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob
from fedmq.codecs.raw import Raw
from fedmq.nodes.cli.main import main
from fedmq.nodes.messages.payloads import unpack
from fedmq.nodes.replay.fold import INBOX, Replay
from tests.golden.make_traces import EXPECTED, TRACES
from tests.golden.points import Points
from tests.own_code import ALLOW, OWN_CODE

RELEASE = "0.2.0"
GOLDEN = TRACES / RELEASE
NAMES = ("fedavg-buffered", "fedavg-rounds", "fedprox-stream", "fedsgd-late", "fedavg-quantized")
BUFFERED = GOLDEN / "fedavg-buffered"


def replay(*words, code=0, **how):
    """Run ``fedmq replay``; return its result: output (both streams), exit_code."""
    result = CliRunner().invoke(main, ["replay", *ALLOW, *map(str, words)], **how)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*words):
    """Return the one sentence with which ``fedmq replay`` refuses to start."""
    result = replay(*words, code=2)
    sentence = result.output.strip()
    assert sentence.startswith("fedmq: "), sentence
    assert "\n" not in sentence
    return sentence


# ---- what a trace holds, found by what it is


def messages(folder, body=None, **wanted):
    """Return (number, message) of all messages with these fields, in the body and beside it."""
    return [
        (entry.seq, message)
        for entry in Trace(folder).entries()
        if isinstance(entry, Accepted)
        for message in [entry.read()]
        if all(getattr(message, name) == value for name, value in wanted.items())
        and all(message.body.get(name) == value for name, value in (body or {}).items())
    ]


def nth(folder, index, **wanted):
    """Return (number, message) of one of the messages with these fields; -1 is the last."""
    return messages(folder, **wanted)[index]


def number(folder, index, **wanted):
    """Return the number of one of the messages with these fields; -1 is the last."""
    return nth(folder, index, **wanted)[0]


def message(folder, seq):
    return Trace(folder).entry(seq).read()


def inbox(folder):
    """Return the numbers of all messages that the aggregator has taken, in order."""
    last = nth(folder, -1, kind="finished")[1].body["position"]
    found = [seq for address in INBOX for seq, _ in messages(folder, to=address)]
    return sorted(seq for seq in found if seq <= last)


def closing(folder, version):
    """Return the number of the message upon which a version was made."""
    return nth(folder, 0, kind="version", body={"version": version})[1].body["position"]


def last_entry(folder):
    """Return the entry that ends the run."""
    entry = list(Trace(folder).entries())[-1]
    assert isinstance(entry, Ended)
    return entry


def refusal(folder):
    """Return the first entry in which the aggregator refuses a result."""
    return Trace(folder).entry(refusals(folder)[0])


def refusals(folder):
    """Return the numbers of the entries in which the aggregator refuses a result."""
    return [
        entry.seq
        for entry in Trace(folder).entries()
        if isinstance(entry, Refusal) and entry.node == "aggregator" and entry.of is not None
    ]


def answered_at_once(folder):
    """Return (number, message) of the first result whose next entry is a task sent upon it."""
    tasks = {seq for seq, _ in messages(folder, kind="task")}
    return next(each for each in messages(folder, kind="result") if each[0] + 1 in tasks)


def quiet(folder):
    """Return an entry that tells the aggregator nothing, when all it had to say was recorded."""
    after = number(folder, 0, kind="version")
    run = Replay(Trace(folder), allowed=OWN_CODE)
    for before, entry in pairwise(Trace(folder).entries()):
        for _ in run.steps(before.seq):
            pass
        told = isinstance(entry, Accepted) and (
            entry.read().to in INBOX or entry.read().sender == "aggregator"
        )
        refused = isinstance(entry, Refusal) and entry.node == "aggregator"
        if entry.seq > after and not (told or refused or run.record.unmatched):
            return entry
    raise AssertionError(f"in {folder}, each entry concerns the aggregator")


def expected(name):
    """Return what a replay of a golden trace must come to."""
    return json.loads(EXPECTED.read_text())[f"{RELEASE}/{name}"]


def all_equal(name):
    """Return the first line of a replay of a golden trace."""
    messages, actions = (expected(name)[key] for key in ("messages", "actions"))
    return f"replayed {messages} messages: all {actions} actions match the record"


# ---- traces that are other


def rewrite(source, target, changes=None, until=None, more=(), blobs=()):
    """Write another trace, as a broker would.

    Args:
        source: folder of a trace.
        target: folder of the new one.
        changes: the change to an entry, by its number: a function of it, or another entry.
        until: number of the last entry to take.
        more: what follows: functions of (number, time) that return an entry.
        blobs: other blobs to write: (owner, bytes).
    """
    trace = Trace(source)
    (target / "ledger").mkdir(parents=True)
    for path in trace.folder.glob("payload-*.log"):
        shutil.copy(path, target / "ledger")
    # Just begun: a folder of payload alone would be a damaged one.
    segment_path(target / "ledger", MESSAGES, 0).touch()
    ledger = Ledger(target / "ledger")
    at = 0.0
    for entry in trace.entries():
        if until is not None and entry.seq > until:
            break
        change = (changes or {}).get(entry.seq)
        ledger.append(change(entry) if callable(change) else change or entry)
        at = entry.at
    for make in more:
        ledger.append(make(ledger.next_seq, at))
    for owner, data in blobs:
        ledger.put(BlobName(trace.run, owner, Blob.of(data).digest), len(data), 0, data)
    ledger.close()
    (target / "ledger" / "lock").unlink()
    return target


def edit(**fields):
    """Return a change of a message's fields; of a body, only what is given becomes other."""

    def change(entry):
        old = entry.read()
        new = {**fields, "body": {**old.body, **fields.get("body", {})}}
        return replace(entry, message=encode_message(replace(old, **new)))

    return change


def without(*keys):
    """Return a change that takes keys out of a message's body."""

    def change(entry):
        old = entry.read()
        body = {key: value for key, value in old.body.items() if key not in keys}
        return replace(entry, message=encode_message(replace(old, body=body)))

    return change


def says(other):
    """Return a change of an entry to one that holds another message."""
    return lambda entry: replace(entry, message=encode_message(other))


def silence(entry):
    """Be an entry that tells of nothing, in the place of another."""
    return Consumed(seq=entry.seq, at=entry.at, node="worker-0", of=())


def scaled(folder, seq, factor, index=0):
    """Return another blob for a raw result, every weight times ``factor``; (Blob, bytes)."""
    data = bytes(Trace(folder).blob(message(folder, seq), index))
    values = torch.frombuffer(bytearray(data), dtype=torch.float32) * factor
    other = values.numpy().tobytes()
    return Blob.of(other), other


def counters_of(folder, seq, value):
    """Return the blobs of a result whose whole numbers are ``value``; (all blobs, new bytes)."""
    found = message(folder, seq)
    first = 0
    for group in found.body["groups"]:
        if group["name"] == "exact":
            break
        first += group["buffers"]
    tensors = dict(unpack(found, lambda index: Trace(folder).blob(found, index)).exact)
    whole = [name for name, each in tensors.items() if not each.is_floating_point()]
    assert whole
    tensors.update({name: torch.full_like(tensors[name], value) for name in whole})
    data = [bytes(each) for each in Raw().encode(tensors, 0).buffers]
    assert len(data) == group["buffers"]
    blobs = list(found.blobs)
    blobs[first : first + len(data)] = [Blob.of(each) for each in data]
    return tuple(blobs), data


def vector(tensors):
    """Return what is learned of the golden traces' model as one vector, parameters first."""
    return torch.cat([tensors[name].float().reshape(-1) for name in learned()])


def learned():
    module = Points().model()
    names = [name for name, _ in module.named_parameters()]
    return names + [name for name, each in module.named_buffers() if each.is_floating_point()]


def update(folder, seq):
    """Return what a message brought, as one vector."""
    trace = Trace(folder)
    found = trace.entry(seq).read()
    payload = unpack(found, lambda index: trace.blob(found, index))
    return vector({**payload.weights, **payload.exact})
