"""Golden traces, and copies of them that are not what was recorded."""

import shutil

import torch
from click.testing import CliRunner
from msgspec.structs import replace

from fedmq.broker.entries import Accepted, BlobName, Consumed
from fedmq.broker.headers import encode_message
from fedmq.broker.ledger import Ledger
from fedmq.broker.trace import Trace
from fedmq.broker.wire import Blob
from fedmq.nodes.cli import main
from fedmq.nodes.payload import unpack
from tests.golden.make_traces import TRACES
from tests.own_code import ALLOW

GOLDEN = TRACES / "0.1.0"
NAMES = ("fedavg-buffered", "fedavg-rounds", "fedprox-stream", "fedsgd-late")
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


def messages(folder, **wanted):
    """Return (number, message) of all messages with these fields."""
    return [
        (entry.seq, message)
        for entry in Trace(folder).entries()
        if isinstance(entry, Accepted)
        for message in [entry.read()]
        if all(getattr(message, name) == value for name, value in wanted.items())
    ]


def message(folder, seq):
    return Trace(folder).entry(seq).read()


def rewrite(source, target, changes=None, until=None, more=(), blobs=()):
    """Write another trace, as a broker would.

    Args:
        source: folder of a trace.
        target: folder of the new one.
        changes: by number, what becomes of an entry: a function of it, or another entry.
        until: number of the last entry to take.
        more: what follows: functions of (number, time) that return an entry.
        blobs: what is to be there as well: (owner, bytes).
    """
    trace = Trace(source)
    (target / "ledger").mkdir(parents=True)
    for path in trace.folder.glob("payload-*.log"):
        shutil.copy(path, target / "ledger")
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


def update(folder, seq):
    """Return what a result brought, as one vector."""
    trace = Trace(folder)
    found = trace.entry(seq).read()
    payload = unpack(found, lambda index: trace.blob(found, index))
    return torch.cat([each.float().reshape(-1) for each in payload.weights.values()])
