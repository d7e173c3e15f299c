"""A recorded run is replayed: as a whole, from a checkpoint, up to an entry, cut off, damaged."""

import itertools
import json
import re
import shutil

import pytest

from fedmq.broker.entries import Accepted
from fedmq.broker.errors import LedgerError
from fedmq.broker.trace import Trace
from fedmq.nodes.digests import model_digest
from fedmq.nodes.inbox import Inbound, Post
from fedmq.nodes.replay.fold import Replay, last_checkpoint
from tests.golden.make_traces import EXPECTED
from tests.nodes.replay import material
from tests.nodes.replay.material import BUFFERED, GOLDEN, NAMES, refused, replay, rewrite
from tests.own_code import OWN_CODE

FIRST = re.compile(r"^([\d,]+) messages, ([\d,]+) actions, all equal$", re.MULTILINE)


def ended(folder, checkpoint=None, until=None):
    run = Replay(Trace(folder), checkpoint, allowed=OWN_CODE)
    steps = list(run.steps(until))
    return run, steps


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_trace_is_equal(name):
    expected = json.loads(EXPECTED.read_text())[f"0.1.0/{name}"]
    output = replay(GOLDEN / name).output
    messages, actions = FIRST.search(output).groups()
    assert (int(messages), int(actions)) == (expected["messages"], expected["actions"])
    assert f"version {expected['version']}, model {expected['model']}" in output
    assert "more than the record" not in output


def test_a_ledgers_own_folder_will_do():
    assert FIRST.search(replay(BUFFERED / "ledger").output)


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
        assert not run.record.unfound
        assert message.body["version"] <= run.core.version


@pytest.mark.parametrize("name", NAMES)
def test_from_checkpoint_takes_the_newest(name):
    model = json.loads(EXPECTED.read_text())[f"0.1.0/{name}"]["model"]
    output = replay(GOLDEN / name, "--from-checkpoint").output
    assert int(FIRST.search(output)[1]) < 20
    assert model in output


@pytest.mark.parametrize("name", NAMES)
def test_until_any_entry_stops_there(name):
    """At an inbox message it is the last one taken; at an own one, it is the last one said."""
    whole = [e.event.seq for e in ended(GOLDEN / name)[1] if isinstance(e.event, Inbound)]
    for entry in list(Trace(GOLDEN / name).entries())[::5]:
        run, steps = ended(GOLDEN / name, until=entry.seq)
        message = entry.read() if isinstance(entry, Accepted) else None
        said = [a.message.id for a in steps[-1].actions if isinstance(a, Post)]
        if message is not None and message.sender == "aggregator":
            assert message.id in said
            assert message.id not in [
                a.message.id for step in steps[:-1] for a in step.actions if isinstance(a, Post)
            ]
        else:
            inbox = [e.event.seq for e in steps if isinstance(e.event, Inbound)]
            assert inbox == [seq for seq in whole if seq <= entry.seq]
        if message is not None and message.kind == "version":
            assert run.core.version == message.body["version"]


def test_until_a_version_the_next_one_is_not_yet_made():
    versions = material.messages(BUFFERED, kind="version")
    for (seq, message), (_, after) in itertools.pairwise(versions):
        run, steps = ended(BUFFERED, until=seq)
        assert model_digest(run.core.tensors()) == message.body["model_digest"]
        assert run.core.parts()["position"] == message.body["position"]
        said = {a.message.id for step in steps for a in step.actions if isinstance(a, Post)}
        assert after.id not in said


def test_a_replay_that_stopped_goes_on_from_there():
    """Neither kind of stop loses a message or takes one twice."""
    whole, steps = ended(BUFFERED)
    for until in (0, 13, 29, 68, 172):
        run = Replay(Trace(BUFFERED), allowed=OWN_CODE)
        before = list(run.steps(until))
        after = list(run.steps())
        assert len(before) + len(after) == len(steps)
        assert run.messages == whole.messages
        assert run.record.compared == whole.record.compared


def test_until_the_opening_nothing_is_taken():
    assert "0 messages, 0 actions, all equal" in replay(BUFFERED, "--until", 0).output


def test_until_the_last_entry_is_the_whole():
    assert "71 messages, 78 actions, all equal" in replay(BUFFERED, "--until", 173).output


@pytest.mark.parametrize("until", [174, 10**9])
def test_until_past_the_end_is_refused(until):
    assert str(until) in refused(BUFFERED, "--until", until)


def test_from_checkpoint_until_goes_from_the_newest_before():
    assert last_checkpoint(Trace(BUFFERED), 80) == 41
    assert last_checkpoint(Trace(BUFFERED), 81) == 80
    for until in (42, 80, 81, 140):
        run, _ = ended(BUFFERED, last_checkpoint(Trace(BUFFERED), until), until)
        whole, _ = ended(BUFFERED, until=until)
        assert run.core.version == whole.core.version
        assert model_digest(run.core.tensors()) == model_digest(whole.core.tensors())
        assert "all equal" in replay(BUFFERED, "--from-checkpoint", "--until", until).output


def test_from_checkpoint_before_the_first_is_refused():
    assert "before entry 20" in refused(BUFFERED, "--from-checkpoint", "--until", 20)


def test_a_message_that_is_no_checkpoint_is_refused():
    with pytest.raises(LedgerError, match="message 13 is none"):
        ended(BUFFERED, 13)
    with pytest.raises(LedgerError, match="entry 0 is"):
        ended(BUFFERED, 0)


# ---- cut off, and damaged


def test_a_run_that_was_cut_off_is_equal_up_to_its_end(tmp_path):
    """Result 17 makes the aggregator say 26 to 30 and more; the record ends at 17."""
    output = replay(rewrite(BUFFERED, tmp_path, until=17)).output
    assert FIRST.search(output)
    said = len(ended(BUFFERED, until=17)[1])
    assert said
    more = int(re.search(r"(\d+) actions more than the record holds", output)[1])
    posts = sum(
        isinstance(action, Post) for step in ended(BUFFERED, until=17)[1] for action in step.actions
    )
    recorded = [m for s, m in material.messages(BUFFERED, sender="aggregator") if s <= 17]
    assert more == posts - len(recorded)


@pytest.mark.parametrize("name", NAMES)
def test_cut_off_anywhere_before_the_core_has_finished(name, tmp_path):
    """Wherever a broker dies, what it has written replays."""
    trace = Trace(GOLDEN / name)
    finished = material.messages(GOLDEN / name, kind="finished")[0][0]
    last = len(list(trace.entries())) - 1
    for until in (0, 2, 5, 33, finished - 4, finished, last - 1):
        output = replay(rewrite(GOLDEN / name, tmp_path / str(until), until=until)).output
        assert FIRST.search(output)


def torn(tmp_path, at, source=BUFFERED):
    """Damage the record of an entry; return the folder and the offset of the record."""
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    (path,) = folder.glob("ledger/messages-*.log")
    data = bytearray(path.read_bytes())
    needle = material.encode_message(material.message(source, at))
    place = data.index(needle) + len(needle) // 2
    data[place] ^= 0x40
    path.write_bytes(data)
    return folder, path.name, place


def test_a_damaged_trace_is_told_with_segment_and_offset(tmp_path):
    folder, segment, place = torn(tmp_path, 100)
    result = replay(folder, code=2)
    *_, sentence = result.stderr.strip().split("\n")
    assert segment in sentence
    offset = int(re.search(r"byte (\d+)", sentence)[1])
    assert 0 <= place - offset < 500


def test_of_a_damaged_trace_what_lies_before_can_be_replayed_up_to(tmp_path):
    folder, segment, _ = torn(tmp_path, 100)
    run, steps = ended(folder, until=99)
    assert run.core.version == 7
    assert len(steps) == len(ended(BUFFERED, until=99)[1])
    assert segment in replay(folder, "--until", 120, code=2).output
    assert "damaged" not in replay(folder, "--until", 99).output


def test_a_damaged_result_is_told_with_segment_and_offset(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(BUFFERED, folder)
    (path,) = folder.glob("ledger/payload-*.log")
    data = bytearray(path.read_bytes())
    blob = bytes(Trace(BUFFERED).blob(material.message(BUFFERED, 38), 0))
    data[data.index(blob) + 5] ^= 1
    path.write_bytes(data)
    *_, sentence = replay(folder, code=2).output.strip().split("\n")
    assert sentence.startswith("fedmq: ")
    assert path.name in sentence
    assert "byte" in sentence


def test_a_torn_tail_is_no_damage(tmp_path):
    folder = rewrite(BUFFERED, tmp_path, until=60)
    (path,) = folder.glob("ledger/messages-*.log")
    with path.open("ab") as file:
        file.write(b"\x00\x07torn")
    assert FIRST.search(replay(folder).output)
