"""`fedmq ledger check` and `repair`: the findings, and a broker that continues."""

import contextlib
import os
import random

import pytest

from fedmq.broker.errors import LedgerDamage, LedgerError
from fedmq.broker.inspection.check import FindingKind, check
from fedmq.broker.inspection.repair import RepairAction, plan, repair
from fedmq.broker.ledger.entries import (
    MESSAGES,
    PAYLOAD,
    Accepted,
    Opened,
    Refusal,
    segment_numbers,
    segment_path,
)
from fedmq.broker.ledger.manifest import MANIFEST_FILE
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import MAGIC, scan
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.recovery import open_broker
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Blob, Message
from tests.broker.clocks import stopped_clock
from tests.broker.inspection.damaged_ledger import (
    ALL,
    DONE,
    SIZE,
    blob,
    flip,
    goes_on,
    record_of,
    write,
)
from tests.broker.ledger.small_ledger import name_of, put
from tests.permissions import readable_by_others


@pytest.fixture(autouse=True)
def only_the_owner_can_read(tmp_path):
    """Check after each test that the ledger is its owner's alone, whatever the umask is."""
    before = os.umask(0)
    yield
    os.umask(before)
    assert readable_by_others(tmp_path) == []


def test_a_sound_ledger_is_sound_and_is_left_alone(tmp_path):
    entries = write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report = check(tmp_path)
    assert report.sound
    assert (report.entries, report.blobs, report.unfinished) == (len(entries), ALL, ALL - DONE)
    assert plan(report) == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_of_the_run_is_accepted_too(tmp_path):
    write(tmp_path / "ledger")
    assert check(tmp_path).folder == tmp_path / "ledger"
    with pytest.raises(LedgerError, match="holds none"):
        check(tmp_path / "nowhere")


# ---- payload


@pytest.mark.parametrize("part", ["length", "check", "checksum", "head", "data"])
def test_damage_in_an_unneeded_blob_does_not_stop_a_broker(tmp_path, part):
    entries = write(tmp_path)
    path, record = record_of(tmp_path, 1)
    places = {"length": 0, "check": 9, "checksum": 14, "head": 30, "data": SIZE}
    flip(path, record.offset + places[part])
    report = check(tmp_path)
    (finding,) = report.findings
    assert (finding.segment, finding.offset) == (path.name, record.offset)
    assert finding.size == record.end - record.offset
    (lost,) = report.lost
    assert lost.name == name_of(blob(1))
    assert not lost.needed
    assert goes_on(tmp_path) == len(entries)
    steps = repair(tmp_path, 0.0)
    assert [each.action for each in steps] == [RepairAction.TAKE_OUT, RepairAction.GIVE_UP]
    assert check(tmp_path).sound
    assert check(tmp_path).given_up == 1
    (kept,) = tmp_path.glob("*.cut-*")
    assert kept.stat().st_size == finding.size
    assert goes_on(tmp_path) == len(entries) + 1


def test_damage_in_a_blob_that_is_needed_is_refused_with_the_command(tmp_path):
    entries = write(tmp_path)
    path, record = record_of(tmp_path, DONE + 1)
    flip(path, record.offset + 2)
    with pytest.raises(LedgerDamage, match=f"`fedmq ledger check {tmp_path}`") as caught:
        open_broker(tmp_path, BrokerSettings(), stopped_clock())
    assert (caught.value.segment, caught.value.offset) == (path.name, record.offset)
    (lost,) = check(tmp_path).lost
    assert lost.needed
    repair(tmp_path, 0.0)
    ledger, _ = open_broker(tmp_path, BrokerSettings(), stopped_clock())
    # The next entry informs its sender.
    assert ledger.next_seq > len(entries)
    ledger.close()
    said = list(read_entries(tmp_path))[len(entries) :]
    (refusal,) = [each for each in said if isinstance(each, Refusal)]
    assert refusal.of == lost.named_by[0]
    assert "no longer in the ledger" in refusal.reason


def test_bits_behind_a_damaged_length_are_found_again(tmp_path):
    write(tmp_path, 1 << 20)
    path, record = record_of(tmp_path, 2)
    flip(path, record.offset)
    ledger = Ledger(tmp_path)
    for number in range(ALL):
        whole = ledger.size_of(name_of(blob(number))) == SIZE
        assert whole == (number != 2)
        if whole:
            assert bytes(ledger.payload.read(name_of(blob(number)), 0, SIZE)) == blob(number)
    ledger.close()


def test_a_damaged_header_loses_nothing(tmp_path):
    entries = write(tmp_path)
    for family, number in ((MESSAGES, 0), (PAYLOAD, 0)):
        flip(segment_path(tmp_path, family, number), 3)
    report = check(tmp_path)
    assert {each.kind for each in report.findings} == {FindingKind.FORMAT}
    assert not report.lost
    with pytest.raises(LedgerDamage, match="not a ledger segment"):
        open_broker(tmp_path, BrokerSettings(), stopped_clock())
    repair(tmp_path, 0.0)
    assert check(tmp_path).sound
    assert list(read_entries(tmp_path)) == entries


# ---- entries


@pytest.mark.parametrize("segments", [900, 1 << 20])
def test_entries_are_truncated_at_the_first_damage_and_the_rest_is_kept(tmp_path, segments):
    entries = write(tmp_path, segments)
    before = sum(path.stat().st_size for path in tmp_path.glob("messages-*"))
    path = segment_path(tmp_path, MESSAGES, 0)
    record = list(scan(path))[3]
    flip(path, record.end - 1)
    report = check(tmp_path)
    assert report.entries == 3
    assert report.breaking.entries == (3, 3)
    assert [each.seq for each in report.behind] == list(range(4, len(entries)))
    with pytest.raises(LedgerDamage, match="`fedmq ledger check"):
        open_broker(tmp_path, BrokerSettings(), stopped_clock())
    repair(tmp_path, 0.0)
    assert list(read_entries(tmp_path)) == entries[:3]
    after = sum(each.stat().st_size for each in tmp_path.glob("messages-*"))
    assert after >= before - len(MAGIC)
    assert check(tmp_path).sound
    assert goes_on(tmp_path) == 3


@pytest.mark.parametrize("zeros", [1, 7, 16, 21, 400, 70_000])
def test_a_tail_of_zeros_is_cut_by_the_broker_itself(tmp_path, zeros):
    entries = write(tmp_path, 1 << 20)
    for family in (MESSAGES, PAYLOAD):
        path = segment_path(tmp_path, family, 0)
        path.write_bytes(path.read_bytes() + bytes(zeros))
    report = check(tmp_path)
    assert report.sound
    assert len(report.tails) == 2
    assert goes_on(tmp_path) == len(entries)


@pytest.mark.slow
def test_zeros_from_anywhere_to_the_end_are_a_torn_tail(tmp_path):
    """A power failure leaves them, even where entries were acknowledged without a sync.

    It does not tear a sector: zeros within the last one that begin in the last entry are damage.
    """
    write(tmp_path, 1 << 20)
    path = segment_path(tmp_path, MESSAGES, 0)
    whole = path.read_bytes()
    ends = [len(MAGIC), *(record.end for record in scan(path))]
    for start in range(0, len(whole), 7):
        path.write_bytes(whole[:start] + bytes(len(whole) - start))
        # Zeros over zeros change nothing.
        expected = sum(not any(whole[start:end]) for end in ends[1:])
        if expected < len(ends) - 1 and start > max(ends[-2] + 20, (len(whole) - 1) // 512 * 512):
            with pytest.raises(LedgerDamage, match="checksum of the last record"):
                Ledger(tmp_path)
            continue
        ledger = Ledger(tmp_path)
        assert ledger.next_seq == expected, start
        ledger.close()


def test_zeros_in_the_middle_are_refused(tmp_path):
    write(tmp_path, 1 << 20)
    path = segment_path(tmp_path, MESSAGES, 0)
    records = list(scan(path))
    data = bytearray(path.read_bytes())
    data[records[4].offset : records[6].end] = bytes(records[6].end - records[4].offset)
    path.write_bytes(data)
    with pytest.raises(LedgerDamage, match="`fedmq ledger check"):
        open_broker(tmp_path, BrokerSettings(), stopped_clock())
    report = check(tmp_path)
    assert report.breaking.entries == (4, 6)


def test_a_flipped_bit_in_the_last_entry_is_an_error(tmp_path):
    """It may have been acknowledged: a killed broker leaves no record of full length."""
    write(tmp_path, 1 << 20)
    path = segment_path(tmp_path, MESSAGES, 0)
    last = list(scan(path))[-1]
    flip(path, last.end - 3)
    size = path.stat().st_size
    with pytest.raises(LedgerDamage, match="checksum of the last record"):
        open_broker(tmp_path, BrokerSettings(), stopped_clock())
    assert path.stat().st_size == size
    (finding,) = check(tmp_path).findings
    assert finding.kind is FindingKind.LAST
    repair(tmp_path, 0.0)
    assert (tmp_path / f"{path.name}.cut-{last.offset}").stat().st_size == size - last.offset
    goes_on(tmp_path)


def test_swapped_segments_are_reported(tmp_path):
    write(tmp_path)
    numbers = segment_numbers(tmp_path, MESSAGES)
    a, b = (segment_path(tmp_path, MESSAGES, number) for number in numbers[:2])
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)
    report = check(tmp_path)
    assert report.breaking.kind is FindingKind.NUMBER
    assert f"the segment may be {b.name} under another name" in report.breaking.reason
    repair(tmp_path, 0.0)
    assert check(tmp_path).sound
    goes_on(tmp_path)


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
def test_missing_message_segments(tmp_path, listed):
    write(tmp_path)
    for path in tmp_path.glob("messages-*.log"):
        path.unlink()
    if not listed:
        (tmp_path / MANIFEST_FILE).unlink()
    assert not check(tmp_path).sound
    with pytest.raises(LedgerDamage, match="`fedmq ledger check"):
        open_broker(tmp_path, BrokerSettings(), stopped_clock())
    repair(tmp_path, 0.0)
    assert check(tmp_path).sound
    assert goes_on(tmp_path) == 0
    assert len(list(tmp_path.glob("payload-*.set-aside"))) > 1


@pytest.mark.parametrize("left", [0, 8, len(MAGIC), len(MAGIC) + 30])
def test_empty_message_segments_count_as_missing(tmp_path, left):
    """Otherwise a broker would silently begin a new ledger beside the old payload."""
    write(tmp_path, 1 << 20)
    path = segment_path(tmp_path, MESSAGES, 0)
    path.write_bytes(path.read_bytes()[:left])
    (finding,) = check(tmp_path).findings
    assert "the payload cannot be assigned to messages" in finding.reason
    with pytest.raises(LedgerDamage, match="`fedmq ledger check"):
        open_broker(tmp_path, BrokerSettings(), stopped_clock())
    assert path.stat().st_size == left
    repair(tmp_path, 0.0)
    assert check(tmp_path).sound
    assert goes_on(tmp_path) == 0
    assert len(list(tmp_path.glob("payload-*.set-aside"))) == 1


def test_a_read_error_must_be_fixed_before_a_repair(tmp_path, monkeypatch):
    write(tmp_path)
    name = segment_path(tmp_path, PAYLOAD, 1).name
    opened = type(tmp_path).open

    def refuse(path, *args, **more):
        if path.name == name:
            raise OSError(5, "Input/output error")
        return opened(path, *args, **more)

    monkeypatch.setattr("pathlib.Path.open", refuse)
    report = check(tmp_path)
    assert {each.kind for each in report.findings} == {FindingKind.READING}
    with pytest.raises(LedgerError, match="fix the device"):
        plan(report)


def test_a_repair_waits_for_no_broker(tmp_path):
    write(tmp_path)
    ledger = Ledger(tmp_path)
    with pytest.raises(LedgerError, match="another broker"):
        repair(tmp_path, 0.0)
    ledger.close()


def test_a_repair_falls_back_to_the_checkpoint_before(tmp_path):
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        ledger.append(Opened(seq=0, at=0.5, run="r", config="[run]", total_clients=3))
        for number in range(3):
            put(ledger, blob(number))
            fields = {"kind": "version", "run": "r", "sender": "n", "to": "checkpoint"}
            message = Message(id=f"n/{number}", blobs=(Blob.of(blob(number)),), **fields)
            consumes = (ledger.next_seq - 1,) if number else ()
            entry = Accepted(
                seq=ledger.next_seq, at=1.1, message=encode_message(message), consumes=consumes
            )
            ledger.append(entry)
    for number in (2, 1):
        path, record = record_of(tmp_path, number)
        flip(path, record.offset)
    assert check(tmp_path).breaking.kind is FindingKind.CHECKPOINT
    repair(tmp_path, 0.0)
    assert check(tmp_path).sound
    ledger, _ = open_broker(tmp_path, BrokerSettings(), stopped_clock())
    assert ledger.next_seq == 2
    ledger.close()


# ---- anything


def damaged(files, rng):
    name = rng.choice([name for name in sorted(files) if name.endswith(".log")])
    data = bytearray(files[name])
    at = rng.randrange(len(data))
    match rng.choice(["flip"] * 5 + ["cut", "zero", "hole", "grow", "garbage", "remove", "swap"]):
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "cut":
            del data[at:]
        case "zero":
            data[at:] = bytes(len(data) - at)
        case "hole":
            end = min(len(data), at + rng.choice([1, 20, 200]))
            data[at:end] = bytes(end - at)
        case "grow":
            data += bytes(rng.choice([1, 19, 20, 21, 5000]))
        case "garbage":
            data += rng.randbytes(rng.choice([1, 20, 300]))
        case "remove":
            del files[name]
            return
        case "swap":
            family = name.partition("-")[0]
            other = rng.choice([each for each in files if each.startswith(family)])
            files[name], files[other] = files[other], files[name]
            return
    files[name] = bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_a_broker_continues_after_the_repair_of_any_damage(tmp_path, seed):
    rng = random.Random(seed)  # noqa: S311 - accidents, not secrets
    entries = write(tmp_path / "a")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for _ in range(rng.choice([1, 1, 2])):
        damaged(files, rng)
    if rng.random() < 0.3:
        files.pop(MANIFEST_FILE)
    for folder in (tmp_path / "b", tmp_path / "c"):
        folder.mkdir(mode=0o700)
        for name, data in files.items():
            (folder / name).touch(mode=0o600)
            (folder / name).write_bytes(data)
    report = check(tmp_path / "b")
    refused = ""
    try:
        goes_on(tmp_path / "c")
    except LedgerDamage as error:
        refused = str(error)
    if refused:
        assert not report.sound
        assert "`fedmq ledger check" in refused
    else:
        assert report.breaking is None
    assert bool(repair(tmp_path / "b", 0.0)) == (not report.sound)
    assert check(tmp_path / "b").sound
    found = goes_on(tmp_path / "b")
    assert found >= report.entries
    assert list(read_entries(tmp_path / "b"))[: report.entries] == entries[: report.entries]
    assert check(tmp_path / "b").sound
