import shutil

from fedmq.broker.ledger.entries import PAYLOAD, segment_path
from fedmq.broker.ledger.records import MAGIC
from tests.nodes.trace import story


def rows(text):
    """Return the lines of the tables, by their first word."""
    return {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")
    }


def test_each_tensor_is_decoded_and_measured(fedmq, written):
    folder, at = written
    output = fedmq("show", folder, at["result"]).stdout
    table = rows(output)
    assert table["w"] == ["2x3", "float32", "24", "7.4162", "0", "5", "0"]
    assert table["b"] == ["4", "float32", "16", "nan", "-3", "1", "2"]
    assert table["all"][-1] == "2"
    assert "weights: raw@1, 40 bytes" in output


def test_a_codec_that_narrows_shows_the_bytes_on_the_wire(fedmq, written):
    folder, at = written
    output = fedmq("show", folder, at["half"]).stdout
    assert "cast@1(float16), 12 bytes" in output
    assert rows(output)["w"][:3] == ["2x3", "float32", "12"]


def test_the_header_and_the_outcome(fedmq, written):
    folder, at = written
    output = fedmq("show", folder, at["result"]).stdout
    assert f"entry {at['result']}: result, 4.500 s after the start" in output
    assert f"a/2 (entry {at['task']}, 1.000 s before)" in output
    assert f"consumed by aggregator, 2.000 s later (entry {at['consumed']})" in output
    assert "used in version 1, staleness 0" in output
    assert "numbers.n      10" in output
    task = fedmq("show", folder, at["task"]).stdout
    assert "client/0@worker-0" in task
    assert f"by entry {at['result']}, result from worker-0, 1.000 s later" in task
    assert f"consumed with entry {at['result']}, 1.000 s later" in task


def test_a_rejection_is_reported_with_its_reason(fedmq, written):
    folder, at = written
    output = fedmq("show", folder, at["stale"]).stdout
    assert f"rejected by aggregator, 1.000 s later (entry {at['refusal']}): too stale" in output
    assert rows(output)["c"][:2] == ["1", "bool"]


def test_what_was_not_finished_is_pending(fedmq, written):
    folder, at = written
    for name in ("pending", "timer", "left"):
        assert "pending when the run ended" in fedmq("show", folder, at[name]).stdout
    assert "not delivered" in fedmq("show", folder, at["evil"]).stdout


def test_a_checkpoint_shows_its_fold(fedmq, written):
    folder, at = written
    output = fedmq("show", folder, at["version"]).stdout
    assert rows(output)["w"][0] == "2x3"
    assert rows(output)["position"] == [str(at["half"])]
    assert rows(output)["hosts[0-1]"] == ["'worker-0'"]


def test_entries_that_are_no_messages_show_their_fields(fedmq, written):
    folder, at = written
    assert "total_clients  4" in fedmq("show", folder, at["opened"]).stdout
    assert rows(fedmq("show", folder, at["consumed"]).stdout)["of"] == ["9-11"]
    assert "'no such address'" in fedmq("show", folder, at["post"]).stdout
    assert "'enough'" in fedmq("show", folder, at["ended"]).stdout


def test_payload_that_was_not_kept_is_reported_in_its_place(fedmq, written, tmp_path):
    folder, at = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    segment_path(tmp_path / "ledger", PAYLOAD, 0).unlink()
    segment_path(tmp_path / "ledger", PAYLOAD, 1).write_bytes(MAGIC)
    output = fedmq("show", tmp_path, at["version"]).stdout
    assert output.count("its payload segment was deleted") == 2
    assert "model_digest" in output
    output = fedmq("stats", tmp_path).stdout
    assert "payload: 0 chunks, 0 bytes" in output
    assert "of accepted messages: deleted by the retention policy, or lost" in output


def test_damaged_payload_is_reported_in_its_place_with_segment_and_offset(fedmq, tmp_path):
    at = story.write(tmp_path)
    path = segment_path(tmp_path, PAYLOAD, 0)
    data = bytearray(path.read_bytes())
    where = data.index(story.BROKEN.numpy().tobytes())
    data[where] ^= 1
    path.write_bytes(data)
    output = fedmq("show", tmp_path, at["result"]).stdout
    assert "cannot be decoded: damaged record: its checksum does not match" in output
    assert f"(at {path.name}, byte " in output
    assert "numbers.n" in output
    assert rows(fedmq("show", tmp_path, at["half"]).stdout)["w"][0] == "2x3"
