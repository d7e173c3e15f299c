"""A damaged trace: damage is located, and everything before it stays readable."""

import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    BlobName,
    Consumed,
    Ended,
    Opened,
    Refusal,
    blob_name,
    decode_chunk,
)
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC, scan
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.network import Faults
from fedmq.broker.wire.addresses import CHECKPOINT
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob, Message
from fedmq.nodes.simulation.virtual_run import RUN, Chances, Simulation
from tests.broker.ledger.small_ledger import name_of, put
from tests.sim.history import Plan, setup_of

pytestmark = pytest.mark.slow

PREFIX = 20
"""Bytes of a record before its head; followed by zeros, they are not a record."""

Ops = st.lists(
    st.tuples(
        st.sampled_from(["flip"] * 6 + ["cut", "trim", "zero", "grow", "empty", "remove"]),
        st.integers(0, 1 << 16),
        st.integers(0, 1 << 24),
        st.integers(0, 7),
    ),
    min_size=1,
    max_size=3,
)


@dataclass(repr=False)
class Original:
    """An undamaged ledger.

    files: by name. bounds: by name, where records begin, and where the last one ends.
    blobs: by message's number. copies: by message and blob, for each time that it was stored,
    the places of its pieces: (file, offset).
    """

    files: dict
    bounds: dict
    entries: list
    mine: list
    blobs: dict
    copies: dict

    def __repr__(self):
        return f"Original({len(self.entries)} entries)"


def look_at(folder, run):
    """Read an undamaged ledger without the trace."""
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.log"))}
    bounds = {name: [len(MAGIC)] for name in files}
    stored = defaultdict(list)
    for name, found in bounds.items():
        for record in scan(folder / name):
            found.append(record.end)
            if name.startswith(PAYLOAD):
                piece = decode_chunk(record, folder / name)
                data = files[name][record.data_offset : record.end]
                attempts = stored[BlobName(piece.run, piece.owner, piece.digest)]
                if piece.start == 0 or not data:
                    attempts.append(([], []))
                attempts[-1][0].append((name, record.offset))
                attempts[-1][1].append(data)
    entries, mine, blobs, copies = list(read_entries(folder)), [], {}, {}
    runs = {}
    for entry in entries:
        if isinstance(entry, Accepted):
            message = entry.read()
            runs[entry.seq] = message.run
            blobs[entry.seq] = []
            for index, blob in enumerate(message.blobs):
                attempts = stored[blob_name(message, blob)] if blob.size else [([], [])]
                wholes = {b"".join(parts) for _, parts in attempts}
                (data,) = [each for each in wholes if Blob.of(each) == blob]
                blobs[entry.seq].append(data)
                copies[entry.seq, index] = [
                    places for places, parts in attempts if b"".join(parts) == data
                ]
        else:
            runs[entry.seq] = runs[entry.of[0]] if isinstance(entry, Consumed) else entry.run
        if runs[entry.seq] == run:
            mine.append(entry)
    return Original(files, bounds, entries, mine, blobs, copies)


def simulate(folder):
    """A run with crashes and a bad network, whose model takes many chunks."""
    chances = Chances(Faults(loss=0.05, duplicate=0.05, reorder=0.05), crash=0.1, doom=0.1, cut=0.1)
    broker = BrokerSettings(3.0, 0.5, 1000)
    plan = Plan(
        3,
        "Tally",
        1.0,
        chances,
        broker,
        inline_bytes=100,
        chunk_bytes=64,
        messages_bytes=ledger_module._MESSAGES_SEGMENT_BYTES,
        payload_bytes=ledger_module._PAYLOAD_SEGMENT_BYTES,
    )
    simulation = Simulation(setup_of(3, 1.0), 2, folder, 11, chances, broker)
    with plan.sizes():
        assert simulation.run(40.0, 400.0)
    simulation.close()
    return RUN


def write(folder):
    """Rare content of a ledger: two runs, equal blobs, blobs discarded or stored twice."""
    ledger = Ledger(folder)
    data = [bytes([65 + number]) * (150 * number + 1) for number in range(7)]

    def append(kind, **fields):
        ledger.append(kind(seq=ledger.next_seq, at=float(ledger.next_seq), **fields))
        ledger.commit()

    def post(owner, *blobs, run="r"):
        message = Message(
            kind="note",
            id=f"{owner}/{ledger.next_seq}",
            run=run,
            sender=owner,
            to="record",
            blobs=tuple(Blob.of(each) for each in blobs),
        )
        append(Accepted, message=encode_message(message))

    append(Opened, run="r", config="[run]", total_clients=2)
    put(ledger, data[6], "n", 100)
    post("n", data[6])
    put(ledger, data[5], "n", 200)
    ledger.discard(name_of(data[5], "n"), len(data[5]))
    append(Opened, run="q", config="[run]", total_clients=2)
    put(ledger, data[5], "n", 300)
    put(ledger, data[3], "m", 300)
    post("n", data[5], data[6], b"")
    post("m", data[3])
    post("n", run="q")
    put(ledger, data[6], "n", 100)  # forgotten, and sent again
    put(ledger, data[3], "n", 100)  # the same bytes, of another owner
    append(Consumed, node="m", of=(1, 3))
    append(Consumed, node="m", of=(5,))
    post("n", data[3], data[6])
    for number in (1, 2, 4):
        put(ledger, data[number], "m", 90)
        post("m", data[number])
    append(Refusal, run="q", node="broker", id="n/9", reason="no such address")
    append(Refusal, run="r", node="broker", id="n/1", reason="parked", of=1, dead_lettered=True)
    append(Ended, run="q", reason="done", nodes={"n": {"sessions": 1}})
    append(Ended, run="r", reason="done", nodes={"n": {"sessions": 1}})
    ledger.close()
    return "r"


@pytest.fixture(scope="module", params=[simulate, write], ids=["simulated", "written"])
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    large = request.param is simulate
    with (
        mock.patch.object(ledger_module, "_MESSAGES_SEGMENT_BYTES", 2000 if large else 400),
        mock.patch.object(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 2500 if large else 1200),
    ):
        run = request.param(folder)
    return look_at(folder, run)


def test_the_originals_hold_what_can_be_damaged(original):
    kinds = {type(entry) for entry in original.entries}
    assert kinds == {Opened, Accepted, Consumed, Refusal, Ended}
    for family in (MESSAGES, PAYLOAD):
        assert sum(name.startswith(family) for name in original.files) >= 3
    assert max(len(each[0]) for each in original.copies.values() if each) >= 3
    if original.entries[0].run == RUN:
        addresses = {e.read().to for e in original.entries if isinstance(e, Accepted)}
        assert CHECKPOINT in addresses
        assert any(each.startswith("client/") for each in addresses)


def damage(original, ops):
    """Return the files after some accidents."""
    files = dict(original.files)
    for kind, file, at, bit in ops:
        name = sorted(files)[file % len(files)]
        data = bytearray(files[name])
        at %= len(data) + 1
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << bit
        elif kind == "cut":
            del data[at:]
        elif kind == "trim":
            del data[record_at(original, name, at) :]
        elif kind == "zero":
            data[at:] = bytes(len(data) - at)
        elif kind == "grow":
            data += bytes(at)
        elif kind == "empty":
            del data[:]
        files[name] = bytes(data)
        if kind == "remove" and len(files) > 1:
            del files[name]
    return files


def record_at(original, name, at):
    """Return the start of the record that holds a byte."""
    return max((bound for bound in [0, *original.bounds[name]] if bound <= at), default=0)


def first_change(before, after):
    """Return the offset of the first changed byte, or None."""
    if before == after:
        return None
    return next(
        (at for at, (x, y) in enumerate(zip(before, after, strict=False)) if x != y),
        min(len(before), len(after)),
    )


def messages_end(original, files):
    """Return the number of entries before the damage, its position, whether it is detectable."""
    names = sorted(name for name in original.files if name.startswith(MESSAGES))
    spared, before = 0, None
    for name in names:
        later = any(each > name and each.startswith(MESSAGES) for each in files)
        if name not in files:
            return spared, before or (name, 0), later
        after = files[name]
        at = first_change(original.files[name], after)
        spared += sum(bound <= (len(after) if at is None else at)
                      for bound in original.bounds[name][1:])  # fmt: skip
        size = len(original.files[name])
        tail = after[size:]
        if at is None or (later and at == size and not any(tail[PREFIX:])):
            before = (name, size)
            continue  # a torn tail behind a segment that is not the last costs nothing
        clean = at == len(after) and at in original.bounds[name]
        return spared, (name, record_at(original, name, at)), later or not clean
    return spared, None, False


def payload_marks(original, files):
    """Return the records of payload that are damaged: (file, offset)."""
    marks = set()
    names = sorted(name for name in original.files if name.startswith(PAYLOAD))
    for name in names:
        before, after = original.files[name], files.get(name)
        if after is None:
            continue
        for at, (x, y) in enumerate(zip(before, after, strict=False)):
            if x != y:
                marks.add((name, record_at(original, name, at)))
        if len(after) != len(before):
            marks.add((name, record_at(original, name, min(len(after), len(before)))))
    return marks


def taken(iterator):
    """Return what an iterator yields, and the error that ends it, if one does."""
    found = []
    try:
        for each in iterator:
            found.append(each)  # noqa: PERF402 - what came before the error counts
    except LedgerError as error:
        return found, error
    return found, None


def told(act, *args):
    """Return what a call returns, and the error that it raises instead, if it does."""
    try:
        return act(*args), None
    except LedgerError as error:
        return None, error


def check_entries(original, folder, files, run):
    """Check the entries before the damage and its position; return the trace, if it opens."""
    spared, place, seen = messages_end(original, files)
    trace, error = told(Trace, folder, run)
    if error is not None:
        assert spared <= next(entry.seq for entry in original.mine if isinstance(entry, Opened))
        assert not seen or (error.segment, error.offset) == place
        return None
    found, error = taken(trace.entries())
    assert found == [entry for entry in original.mine if entry.seq < spared]
    assert str(error) == str(trace.damage)
    if not seen:
        assert error is None
        assert trace.torn is None
    elif error is not None:
        assert (error.segment, error.offset) == place
    else:
        assert trace.torn == (*place, len(files[place[0]]) - place[1])
    for seq in (*range(len(original.entries)), -1):
        entry, error = told(trace.entry, seq)
        if 0 <= seq < spared:
            assert entry == original.entries[seq]
        else:
            assert isinstance(error, LedgerError)
    return trace


def check_blobs(original, trace, files):
    """Check that each blob has its own bytes, or an error for damage that affects it."""
    names = sorted(name for name in original.files if name.startswith(PAYLOAD))
    marks = payload_marks(original, files)
    first = {
        name: min((at for each, at in marks if each == name), default=1 << 60) for name in names
    }
    there = [name for name in names if name in files]
    # A file that ends where a record does is whole, for what it says itself.
    visible = {(name, at) for name, at in marks if not len(MAGIC) <= at == len(files[name])}
    possible = marks
    if marks - visible or names[-1] not in files:
        ends = {(name, at) for name in there for at in original.bounds[name]}
        possible = marks | ends | ({(names[0], 0)} if not there else set())
    for (seq, index), copies in original.copies.items():
        data, error = told(trace.blob, original.entries[seq].read(), index)
        if error is None:
            assert bytes(data) == original.blobs[seq][index]
            continue
        assert not any(
            all(name in files and at < first[name] for name, at in places) for places in copies
        )
        if error.segment:
            assert (error.segment, error.offset) in possible
        else:
            assert str(error).endswith("is not in the ledger: its payload segment was deleted")
            assert there != names[: len(there)]
            gone = any(name not in files for places in copies for name, _ in places)
            assert gone or marks - visible
    _, error = taken(trace.check_payload())
    if visible:
        assert (error.segment, error.offset) == min(visible)
    else:
        assert error is None


def check(original, ops):
    run = original.mine[0].run
    files = damage(original, ops)
    with tempfile.TemporaryDirectory(prefix="fedmq-damage-") as place:
        folder = Path(place)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        trace = check_entries(original, folder, files, run)
        if trace is not None:
            check_blobs(original, trace, files)


@settings(max_examples=250)
@given(ops=Ops)
def test_a_damaged_trace_yields_its_records_or_where_it_is_damaged(original, ops):
    check(original, ops)


def test_a_trace_without_damage_is_read_as_it_was_written(original):
    check(original, [])
