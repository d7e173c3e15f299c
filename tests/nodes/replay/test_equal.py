"""Replay a recorded run: whole, from a checkpoint, up to an entry, cut off, damaged."""

import itertools
import re
import shutil

import msgspec
import pytest

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.wire.schema import Blob
from fedmq.nodes.replay.fold import Replay, last_checkpoint
from fedmq.nodes.run.digests import model_digest
from tests.nodes.replay import material
from tests.nodes.replay.material import (
    BUFFERED,
    GOLDEN,
    NAMES,
    all_equal,
    edit,
    nth,
    number,
    refused,
    replay,
    rewrite,
)
from tests.own_code import OWN_CODE

FIRST = re.compile(
    r"^replayed ([\d,]+) messages?: all ([\d,]+) actions match the record$", re.MULTILINE
)


def ended(folder, checkpoint=None, until=None):
    run = Replay(Trace(folder), checkpoint, allowed=OWN_CODE)
    steps = list(run.steps(until))
    return run, steps


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_golden_trace_is_equal(name):
    expected = material.expected(name)
    output = replay(GOLDEN / name).output
    messages, actions = FIRST.search(output).groups()
    assert (int(messages), int(actions)) == (expected["messages"], expected["actions"])
    assert f"version {expected['version']}, model {expected['model']}" in output
    assert "than in the record" not in output


def test_a_ledgers_own_folder_will_do():
    assert FIRST.search(replay(BUFFERED / "ledger").output)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_leads_to_the_same_model(name):
    whole, _ = ended(GOLDEN / name)
    found = material.messages(GOLDEN / name, to="checkpoint", kind="version")
    assert len(found) > 1
    for seq, message in found:
        run, _ = ended(GOLDEN / name, seq)
        assert run.core.version == whole.core.version
        assert model_digest(run.core.tensors()) == model_digest(whole.core.tensors())
        assert run.messages < whole.messages
        assert 0 < run.record.compared < whole.record.compared
        assert not run.record.unmatched
        assert message.body["version"] <= run.core.version


@pytest.mark.parametrize("name", NAMES)
def test_from_checkpoint_takes_the_newest(name):
    newest = last_checkpoint(Trace(GOLDEN / name))
    assert newest == number(GOLDEN / name, -1, kind="version", to="checkpoint")
    output = replay(GOLDEN / name, "--from-checkpoint").output
    position = material.message(GOLDEN / name, newest).body["position"]
    rest = [seq for seq in material.inbox(GOLDEN / name) if seq > position]
    assert int(FIRST.search(output)[1]) == len(rest)
    assert material.expected(name)["model"] in output


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_runs_record_is_a_checkpoint_of_version_0(name):
    seq, record = nth(GOLDEN / name, 0, kind="run", sender="aggregator")
    assert last_checkpoint(Trace(GOLDEN / name), seq + 1) == seq
    run, _ = ended(GOLDEN / name, seq)
    outcome = material.expected(name)
    assert model_digest(run.core.tensors()) == outcome["model"]
    assert run.messages == outcome["messages"]
    assert run.record.compared == outcome["actions"] - 1  # all but the record itself
    assert record.body["arithmetic"] == 2
    assert record.body["device"].startswith("cpu ")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_until_any_entry_stops_there(name):
    """An inbox message is the last one handled; an own message is the last one sent."""
    whole = [e.event.seq for e in ended(GOLDEN / name)[1] if isinstance(e.event, Delivery)]
    for entry in list(Trace(GOLDEN / name).entries())[::5]:
        run, steps = ended(GOLDEN / name, until=entry.seq)
        message = entry.read() if isinstance(entry, Accepted) else None
        text = [a.message.id for a in steps[-1].actions if isinstance(a, PostMessage)]
        if message is not None and message.sender == "aggregator":
            assert message.id in text
            assert message.id not in [
                a.message.id
                for step in steps[:-1]
                for a in step.actions
                if isinstance(a, PostMessage)
            ]
        else:
            inbox = [e.event.seq for e in steps if isinstance(e.event, Delivery)]
            assert inbox == [seq for seq in whole if seq <= entry.seq]
        if message is not None and message.kind == "version":
            assert run.core.version == message.body["version"]


@pytest.mark.slow
def test_until_a_version_the_next_one_is_not_yet_made():
    versions = material.messages(BUFFERED, kind="version")
    for (seq, message), (_, after) in itertools.pairwise(versions):
        run, steps = ended(BUFFERED, until=seq)
        assert model_digest(run.core.tensors()) == message.body["model_digest"]
        assert run.core.state_snapshot()["position"] == message.body["position"]
        text = {a.message.id for step in steps for a in step.actions if isinstance(a, PostMessage)}
        assert after.id not in text


@pytest.mark.slow
def test_a_replay_that_stopped_goes_on_from_there():
    """Neither kind of stop loses a message or takes one twice."""
    whole, steps = ended(BUFFERED)
    last = material.last_entry(BUFFERED).seq
    result, version = number(BUFFERED, 1, kind="result"), number(BUFFERED, 1, kind="version")
    for until in (0, result, version, material.quiet(BUFFERED).seq, last - 1):
        run = Replay(Trace(BUFFERED), allowed=OWN_CODE)
        before = list(run.steps(until))
        after = list(run.steps())
        assert len(before) + len(after) == len(steps)
        assert run.messages == whole.messages
        assert run.record.compared == whole.record.compared


def test_until_the_opening_nothing_is_taken():
    output = replay(BUFFERED, "--until", 0).output
    assert output.startswith("replayed 0 messages: all 0 actions match the record\n")


def test_until_the_last_entry_is_the_whole():
    last = material.last_entry(BUFFERED).seq
    assert all_equal("fedavg-buffered") in replay(BUFFERED, "--until", last).output


@pytest.mark.parametrize("beyond", [1, 10**9])
def test_until_past_the_end_is_refused(beyond):
    until = material.last_entry(BUFFERED).seq + beyond
    assert str(until) in refused(BUFFERED, "--until", until)


@pytest.mark.slow
def test_from_checkpoint_until_goes_from_the_newest_before():
    one, other = [seq for seq, _ in material.messages(BUFFERED, kind="version", to="checkpoint")][
        1:3
    ]
    assert last_checkpoint(Trace(BUFFERED), other) == one
    assert last_checkpoint(Trace(BUFFERED), other + 1) == other
    for until in (one + 1, other, other + 1, number(BUFFERED, -4, kind="result")):
        run, _ = ended(BUFFERED, last_checkpoint(Trace(BUFFERED), until), until)
        whole, _ = ended(BUFFERED, until=until)
        assert run.core.version == whole.core.version
        assert model_digest(run.core.tensors()) == model_digest(whole.core.tensors())
        output = replay(BUFFERED, "--from-checkpoint", "--until", until).output
        assert " match the record\n" in output


def test_from_checkpoint_before_the_first_is_refused():
    first = number(BUFFERED, 0, to="checkpoint")
    sentence = refused(BUFFERED, "--from-checkpoint", "--until", first)
    assert f"there is no checkpoint before entry {first}" in sentence


def test_a_message_that_is_no_checkpoint_is_refused():
    result = number(BUFFERED, 0, kind="result")
    with pytest.raises(LedgerError, match=f"message {result}: expected a checkpoint, got result"):
        ended(BUFFERED, result)
    with pytest.raises(LedgerError, match="entry 0: expected a message"):
        ended(BUFFERED, 0)


def test_a_run_of_a_later_release_is_compared_within_the_tolerance(tmp_path):
    """Its arithmetic may be another one; version 0 is in its record as well."""
    changes, blobs = {}, []
    for seq, record in material.messages(BUFFERED, to="checkpoint"):
        fold = msgspec.msgpack.decode(Trace(BUFFERED).blob(record, len(record.blobs) - 1))
        data = msgspec.msgpack.encode({**fold, "arithmetic": 3})
        body = {"arithmetic": 3} if record.kind == "run" else {}
        changes[seq] = edit(body=body, blobs=(*record.blobs[:-1], Blob.of(data)))
        blobs.append(("aggregator", data))
    folder = rewrite(BUFFERED, tmp_path, changes, blobs=blobs)
    output = replay(folder).output
    assert " within the tolerance\nthe run was recorded by a later release" in output
    assert f"version 12, model {material.expected('fedavg-buffered')['model']}" in output


# ---- cut off, and damaged


def test_a_run_that_was_cut_off_is_equal_up_to_its_end(tmp_path):
    """The last result of version 2 makes the aggregator say much; the record ends before that."""
    last = material.closing(BUFFERED, 2)
    output = replay(rewrite(BUFFERED, tmp_path, until=last)).output
    assert FIRST.search(output)
    more = int(re.search(r"(\d+) more actions? than in the record", output)[1])
    steps = ended(BUFFERED, until=last)[1]
    posts = sum(isinstance(action, PostMessage) for step in steps for action in step.actions)
    recorded = [m for s, m in material.messages(BUFFERED, sender="aggregator") if s <= last]
    assert more == posts - len(recorded)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_cut_off_anywhere_before_the_core_has_finished(name, tmp_path):
    """Wherever a broker dies, what it has written replays."""
    trace = Trace(GOLDEN / name)
    finished = number(GOLDEN / name, 0, kind="finished")
    last = len(list(trace.entries())) - 1
    for until in (0, 2, 5, 33, finished - 4, finished, last - 1):
        output = replay(rewrite(GOLDEN / name, tmp_path / str(until), until=until)).output
        assert FIRST.search(output)


def a_late_result():
    """Return the number of a result between versions 7 and 8."""
    after = number(BUFFERED, 0, kind="version", body={"version": 7})
    return next(seq for seq, _ in material.messages(BUFFERED, kind="result") if seq > after)


def torn(tmp_path, source=BUFFERED):
    """Damage the record of `a_late_result`; return the folder and the offset of the record."""
    at = a_late_result()
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    (path,) = folder.glob("ledger/messages-*.log")
    data = bytearray(path.read_bytes())
    needle = material.encode_message(material.message(source, at))
    place = data.index(needle) + len(needle) // 2
    data[place] ^= 0x40
    path.write_bytes(data)
    return folder, path.name, place


def test_a_damaged_trace_is_reported_with_segment_and_offset(tmp_path):
    folder, segment, place = torn(tmp_path)
    result = replay(folder, code=2)
    *_, sentence = result.stderr.strip().split("\n")
    assert segment in sentence
    offset = int(re.search(r"byte (\d+)", sentence)[1])
    assert 0 <= place - offset < 500


def test_of_a_damaged_trace_what_lies_before_can_be_replayed_up_to(tmp_path):
    folder, segment, _ = torn(tmp_path)
    damaged = a_late_result()
    run, steps = ended(folder, until=damaged - 1)
    assert run.core.version >= 7
    assert len(steps) == len(ended(BUFFERED, until=damaged - 1)[1])
    assert segment in replay(folder, "--until", damaged + 1, code=2).output
    assert "damaged" not in replay(folder, "--until", damaged - 1).output


def test_a_damaged_result_is_reported_with_segment_and_offset(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(BUFFERED, folder)
    (path,) = folder.glob("ledger/payload-*.log")
    data = bytearray(path.read_bytes())
    blob = bytes(Trace(BUFFERED).blob(nth(BUFFERED, 0, kind="result")[1], 0))
    data[data.index(blob) + 5] ^= 1
    path.write_bytes(data)
    *_, sentence = replay(folder, code=2).output.strip().split("\n")
    assert sentence.startswith("fedmq: ")
    assert path.name in sentence
    assert "byte" in sentence


def test_an_incomplete_record_is_no_damage(tmp_path):
    folder = rewrite(BUFFERED, tmp_path, until=number(BUFFERED, 14, kind="result"))
    (path,) = folder.glob("ledger/messages-*.log")
    with path.open("ab") as file:
        file.write(b"\x00\x07torn")
    assert FIRST.search(replay(folder).output)
