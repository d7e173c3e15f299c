"""A ledger read as a trace: one run in it, its entries and its blobs."""

import itertools

import pytest

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    Consumed,
    Ended,
    Opened,
    Refusal,
    segment_path,
)
from fedmq.broker.ledger.records import MAGIC, scan
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob, Message
from tests.broker.ledger.small_ledger import name_of, put

SIZE = 300
"""Size of a blob: two of them fill a small segment."""


def open_run(ledger, run):
    ledger.append(Opened(seq=ledger.next_seq, at=0.0, run=run, config="[run]", total_clients=3))
    ledger.commit()


def post(ledger, *blobs, run="r", piece=100):
    """Accept a message with these blobs; return it."""
    for data in blobs:
        if data:
            put(ledger, data, piece=piece)
    seq = ledger.next_seq
    message = Message(
        kind="note",
        id=f"n/{seq}",
        run=run,
        sender="n",
        to="record",
        blobs=tuple(Blob.of(data) for data in blobs),
    )
    ledger.append(Accepted(seq=seq, at=float(seq), message=encode_message(message)))
    ledger.use(seq, [name_of(data) for data in blobs if data], kept=False)
    ledger.commit()
    return message


def numbered(number):
    return bytes([65 + number]) * SIZE


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger")
    open_run(opened, "r")
    yield opened
    opened.close()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def records(ledger, number=0):
    path = segment_path(ledger.folder, PAYLOAD, number)
    return path, list(scan(path))


# ---- which ledger, which run


def test_a_run_is_found_by_its_folder_or_by_its_ledgers(ledger, tmp_path):
    for folder in (tmp_path, tmp_path / "ledger"):
        trace = Trace(folder)
        assert (trace.folder, trace.run) == (tmp_path / "ledger", "r")
        assert (trace.opened.total_clients, trace.damage, trace.torn) == (3, None, None)


def test_a_folder_without_a_ledger_is_reported(tmp_path):
    (tmp_path / "round").symlink_to("round")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LedgerError, match="expected a run's folder with a ledger in it"):
            Trace(folder)
    with pytest.raises(LedgerError, match="round: Too many levels of symbolic links"):
        Trace(tmp_path / "round")


def test_a_ledger_in_which_nothing_was_opened_is_reported(tmp_path):
    Ledger(tmp_path).close()
    with pytest.raises(LedgerError, match="there is no run in") as caught:
        Trace(tmp_path)
    assert caught.value.segment == ""
    path = segment_path(tmp_path, MESSAGES, 0)
    path.write_bytes(MAGIC[:5])
    with pytest.raises(LedgerError, match="there is no run in") as caught:
        Trace(tmp_path)
    assert (caught.value.segment, caught.value.offset) == (path.name, 0)


def test_one_of_several_runs_must_be_chosen(ledger):
    open_run(ledger, "q")
    with pytest.raises(LedgerError, match="several runs, choose one with --run-id: r, q"):
        Trace(ledger.folder)
    with pytest.raises(LedgerError, match=r"expected a run of this ledger \(r, q\), got 'p'"):
        Trace(ledger.folder, "p")
    assert Trace(ledger.folder, "q").run == "q"


def test_a_run_that_may_come_after_damage_is_not_reported_missing(ledger):
    post(ledger)
    open_run(ledger, "q")
    path = segment_path(ledger.folder, MESSAGES, 0)
    second = list(scan(path))[1]
    flip(path, second.end - 1)
    with pytest.raises(LedgerError, match="damaged record") as caught:
        Trace(ledger.folder, "q")
    assert (caught.value.segment, caught.value.offset) == (path.name, second.offset)
    assert next(Trace(ledger.folder).entries()).seq == 0


def test_each_run_has_its_own_entries(ledger):
    post(ledger)
    ledger.append(Consumed(seq=2, at=0.0, node="a", of=(1,)))
    open_run(ledger, "q")
    post(ledger, run="q")
    post(ledger)
    ledger.append(Consumed(seq=6, at=0.0, node="b", of=(4,)))
    ledger.append(Consumed(seq=7, at=0.0, node="a", of=(5,)))
    ledger.append(Refusal(seq=8, at=0.0, run="q", node="broker", id="n/9", reason="no"))
    ledger.append(Refusal(seq=9, at=0.0, run="r", node="broker", id="n/9", reason="no"))
    ledger.append(Ended(seq=10, at=0.0, run="q", reason="done"))
    ledger.append(Consumed(seq=11, at=0.0, node="a", of=(1,)))
    ledger.append(Ended(seq=12, at=0.0, run="r", reason="done"))
    ledger.commit()
    seqs = {run: [e.seq for e in Trace(ledger.folder, run).entries()] for run in ("r", "q")}
    assert seqs == {"r": [0, 1, 2, 5, 7, 9, 11, 12], "q": [3, 4, 6, 8, 10]}


# ---- blobs


def test_blobs_are_read_whole_from_whatever_segments_they_are_in(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 2 * SIZE)
    messages = [post(ledger, numbered(n), b"", numbered(n // 2)) for n in range(6)]
    trace = Trace(ledger.folder)
    for number, message in enumerate(messages):
        blobs = [bytes(trace.blob(message, index)) for index in range(3)]
        assert blobs == [numbered(number), b"", numbered(number // 2)]
    sizes = list(trace.check_payload())
    assert set(sizes) == {100}
    for index in (-1, 3):
        with pytest.raises(LedgerError, match=f"expected a blob of n/1 below 3, got {index}"):
            trace.blob(messages[0], index)


def test_a_payload_that_retention_deleted_is_not_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 2 * SIZE)
    ledger = Ledger(tmp_path, retain_bytes=8 * SIZE)
    open_run(ledger, "r")
    messages = [post(ledger, numbered(n)) for n in range(8)]
    ledger.close()
    trace = Trace(tmp_path)
    with pytest.raises(LedgerError, match=r"its payload segment was deleted$") as caught:
        trace.blob(messages[0], 0)
    assert caught.value.segment == ""
    assert bytes(trace.blob(messages[-1], 0)) == numbered(7)
    # Where there is damage as well, nobody can tell which of the two it was.
    path = segment_path(tmp_path, PAYLOAD, max(trace_segments(tmp_path)))
    path.write_bytes(path.read_bytes() + b"\0" * 30)
    with pytest.raises(LedgerError, match="deleted by retention, or lost in a damaged") as caught:
        Trace(tmp_path).blob(messages[0], 0)
    assert caught.value.segment == path.name


def trace_segments(folder):
    return [int(path.name[len(PAYLOAD) + 1 : -4]) for path in folder.glob(f"{PAYLOAD}-*.log")]


def test_a_segment_that_retention_deletes_while_it_is_read_is_not_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 2 * SIZE)
    ledger = Ledger(tmp_path, retain_bytes=8 * SIZE)
    open_run(ledger, "r")
    first = post(ledger, numbered(0))
    trace = Trace(tmp_path)
    assert bytes(trace.blob(first, 0)) == numbered(0)
    for number in range(1, 12):
        post(ledger, numbered(number))
    with pytest.raises(LedgerError, match=r"its payload segment was deleted$"):
        trace.blob(first, 0)
    ledger.close()


def test_a_damaged_chunk_takes_only_its_own_blob(ledger):
    messages = [post(ledger, numbered(n)) for n in range(3)]
    path, found = records(ledger)
    flip(path, found[4].data_offset)
    trace = Trace(ledger.folder)
    assert bytes(trace.blob(messages[0], 0)) == numbered(0)
    assert bytes(trace.blob(messages[2], 0)) == numbered(2)
    with pytest.raises(LedgerError, match="checksum") as caught:
        trace.blob(messages[1], 0)
    assert (caught.value.segment, caught.value.offset) == (path.name, found[4].offset)
    with pytest.raises(LedgerError, match="checksum") as caught:
        list(trace.check_payload())
    assert caught.value.offset == found[4].offset


def test_a_chunk_under_another_name_is_found_to_be_damaged(ledger):
    """The checksum of a head is not verified until its chunk is read."""
    messages = [post(ledger, numbered(n)) for n in range(3)]
    path, found = records(ledger)
    at = path.read_bytes().index(name_of(numbered(1)).digest, found[3].offset)
    for record, part in itertools.product(found[3:6], range(16)):
        whole = path.read_bytes()
        flip(path, at - found[3].offset + record.offset + part)
        trace = Trace(ledger.folder)
        assert bytes(trace.blob(messages[0], 0)) == numbered(0)
        assert bytes(trace.blob(messages[2], 0)) == numbered(2)
        with pytest.raises(LedgerError) as caught:
            trace.blob(messages[1], 0)
        assert (caught.value.segment, caught.value.offset) == (path.name, record.offset)
        path.write_bytes(whole)


def test_chunks_after_an_unreadable_head_are_found(ledger):
    messages = [post(ledger, numbered(n)) for n in range(3)]
    path, found = records(ledger)
    head = found[3].data_offset - len(found[3].head)
    for at in range(3):  # no map of Piece's fields any more
        flip(path, head + at)
    trace = Trace(ledger.folder)
    assert bytes(trace.blob(messages[2], 0)) == numbered(2)
    with pytest.raises(LedgerError) as caught:
        trace.blob(messages[1], 0)
    assert (caught.value.segment, caught.value.offset) == (path.name, found[3].offset)


def test_a_segment_cut_between_the_chunks_of_a_blob_is_reported_there(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 2 * SIZE)
    messages = [post(ledger, numbered(n)) for n in range(4)]
    path, found = records(ledger)
    path.write_bytes(path.read_bytes()[: found[4].end])
    with pytest.raises(LedgerError, match="its next chunk is missing") as caught:
        Trace(ledger.folder).blob(messages[1], 0)
    assert (caught.value.segment, caught.value.offset) == (path.name, found[4].end)
    assert bytes(Trace(ledger.folder).blob(messages[3], 0)) == numbered(3)


def test_a_second_copy_serves_where_the_first_is_damaged(ledger):
    message = post(ledger, numbered(0))
    post(ledger, numbered(1))
    post(ledger, numbered(0))
    path, found = records(ledger)
    flip(path, found[1].end - 1)
    flip(path, found[6].end - 1)
    assert bytes(Trace(ledger.folder).blob(message, 0)) == numbered(0)
    flip(path, found[7].end - 1)
    with pytest.raises(LedgerError, match="checksum"):
        Trace(ledger.folder).blob(message, 0)


def test_a_discarded_copy_is_not_read(ledger):
    data = numbered(0)
    wrong = bytes(reversed(range(100)))
    ledger.put(name_of(data), SIZE, 0, wrong)
    ledger.put(name_of(data), SIZE, 100, wrong)
    ledger.put(name_of(data), SIZE, 200, wrong)
    ledger.commit()
    path, _ = records(ledger)
    named = Message(kind="note", id="n/7", run="r", sender="n", to="record", blobs=(Blob.of(data),))
    with pytest.raises(LedgerError, match="do not match its digest") as caught:
        Trace(ledger.folder).blob(named, 0)
    assert (caught.value.segment, caught.value.offset) == (path.name, len(MAGIC))
    ledger.discard(name_of(data), SIZE)
    message = post(ledger, data)
    assert bytes(Trace(ledger.folder).blob(message, 0)) == data


@pytest.mark.parametrize("cut", [1, 99, 120, 0], ids=["data", "head", "lengths", "boundary"])
def test_payload_that_ends_before_a_blob_that_was_accepted_is_damage(ledger, cut):
    messages = [post(ledger, numbered(n)) for n in range(2)]
    path, found = records(ledger)
    last = found[-1]
    size = last.end - cut if cut else last.offset
    path.write_bytes(path.read_bytes()[:size])
    trace = Trace(ledger.folder)
    assert trace.torn is None
    assert bytes(trace.blob(messages[0], 0)) == numbered(0)
    with pytest.raises(LedgerError) as caught:
        trace.blob(messages[1], 0)
    assert (caught.value.segment, caught.value.offset) == (path.name, last.offset)
    path.unlink()
    with pytest.raises(LedgerError, match="the payload ends before it") as caught:
        Trace(ledger.folder).blob(messages[0], 0)
    assert (caught.value.segment, caught.value.offset) == (path.name, 0)


# ---- tails, and reading on


def test_a_torn_tail_is_reported_and_all_before_it_read(ledger):
    post(ledger)
    path = segment_path(ledger.folder, MESSAGES, 0)
    last = list(scan(path))[-1]
    whole = path.read_bytes()
    for size in (last.offset + 1, last.end - 1):
        path.write_bytes(whole[:size])
        trace = Trace(ledger.folder)
        assert (trace.damage, trace.torn) == (None, (path.name, last.offset, size - last.offset))
        assert [entry.seq for entry in trace.entries()] == [0]
        with pytest.raises(LedgerError, match="entry 1 is not in the ledger"):
            trace.entry(1)


@pytest.mark.parametrize("size", [0, 5, 15])
def test_a_last_segment_without_its_first_bytes_is_a_torn_tail(ledger, size):
    path = segment_path(ledger.folder, MESSAGES, 1)
    path.write_bytes(MAGIC[:size])
    trace = Trace(ledger.folder)
    assert (trace.damage, trace.torn) == (None, (path.name, 0, size))
    assert len(list(trace.entries())) == 1


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_entries_that_are_missing_are_located_where_they_should_be(ledger, monkeypatch, lost):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 1)
    for _ in range(3):
        post(ledger)
    paths = [segment_path(ledger.folder, MESSAGES, number) for number in range(4)]
    before = paths[lost - 1] if lost else None
    place = (before.name, before.stat().st_size) if before else (paths[0].name, 0)
    paths[lost].unlink()
    expected = f"expected entry {lost}, got {lost + 1}"
    if not lost:
        with pytest.raises(LedgerError, match=expected) as caught:
            Trace(ledger.folder)
        assert (caught.value.segment, caught.value.offset) == place
        return
    trace = Trace(ledger.folder)
    assert expected in str(trace.damage)
    assert (trace.damage.segment, trace.damage.offset) == place
    assert [trace.entry(seq).seq for seq in range(lost)] == list(range(lost))
    with pytest.raises(LedgerError, match=expected):
        trace.entry(lost + 1)


def test_a_segment_that_overlaps_the_one_before_is_damage(ledger, monkeypatch):
    for _ in range(3):
        post(ledger)
    path = segment_path(ledger.folder, MESSAGES, 2)
    path.write_bytes(segment_path(ledger.folder, MESSAGES, 0).read_bytes())
    trace = Trace(ledger.folder)
    assert "expected entry 4, got 2" in str(trace.damage)
    assert (trace.damage.segment, trace.damage.offset) == (path.name, 0)


def test_a_trace_reads_on_while_a_broker_writes(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "_MESSAGES_SEGMENT_BYTES", 400)
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 2 * SIZE)
    trace = Trace(ledger.folder)
    for number in range(20):
        message = post(ledger, numbered(number))
        assert bytes(trace.blob(message, 0)) == numbered(number)
        assert len(list(trace.entries())) == number + 2
        assert trace.entry(number + 1).read() == message
    open_run(ledger, "q")
    post(ledger, run="q")
    assert len(list(trace.entries())) == 21
    with pytest.raises(LedgerError, match="entry 23 is not in the ledger"):
        trace.entry(23)
    assert (trace.damage, trace.torn) == (None, None)


def test_an_incomplete_last_record_may_be_completed_later(ledger):
    path = segment_path(ledger.folder, MESSAGES, 0)
    post(ledger)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    trace = Trace(ledger.folder)
    assert trace.torn is not None
    path.write_bytes(whole)
    assert trace.entry(1).seq == 1
    assert trace.torn is None
