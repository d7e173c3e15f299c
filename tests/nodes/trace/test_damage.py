"""Every flipped byte and every cut is found; entries before it remain readable."""

import json
import random

import pytest

from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, segment_path
from fedmq.broker.ledger.records import scan
from tests.nodes.trace import story


@pytest.fixture
def copy(tmp_path):
    """Return the folder of a story that may be damaged, and its segment of messages."""
    story.write(tmp_path)
    return tmp_path, segment_path(tmp_path, MESSAGES, 0)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def test_every_command_shows_what_lies_before_the_damage(fedmq, copy, tmp_path):
    folder, path = copy
    records = list(scan(path))
    flip(path, records[15].offset + 40)
    where = f"(at {path.name}, byte {records[15].offset})"
    result = fedmq("ls", folder, "--all", code=1)
    assert len(result.stdout.splitlines()) == 15
    assert where in result.stderr
    result = fedmq("stats", folder, code=1)
    assert "15 entries" in result.stdout
    assert "accepted 12 = " in result.stdout
    assert "payload: " in result.stdout
    assert where in result.stderr
    result = fedmq("export", folder, "--json", "-", code=1)
    assert [json.loads(line)["seq"] for line in result.stdout.splitlines()] == list(range(15))
    assert where in result.stderr
    result = fedmq("export", folder, "--perfetto", "-", code=1)
    assert json.loads(result.stdout)["traceEvents"]
    assert where in result.stderr
    assert "entry 9: result" in fedmq("show", folder, 9).stdout
    assert where in fedmq("show", folder, 15, code=1).stderr
    assert where in fedmq("show", folder, 20, code=1).stderr
    assert where in fedmq("diff", folder, folder, code=1).stderr


def test_damage_at_the_very_beginning_is_damage_and_no_wrong_usage(fedmq, copy):
    folder, path = copy
    flip(path, next(scan(path)).offset + 30)
    assert f"(at {path.name}, byte 16)" in fedmq("ls", folder, code=1).stderr


def test_an_incomplete_record_is_reported_and_is_no_failure(fedmq, copy):
    folder, path = copy
    records = list(scan(path))
    path.write_bytes(path.read_bytes()[:-3])
    last = records[-1]
    size = path.stat().st_size - last.offset
    for words in (["ls", folder, "--all"], ["stats", folder], ["export", folder, "--json", "-"]):
        text = fedmq(*words).stderr
        assert f"incomplete last record: {size} bytes" in text
        assert f"(at {path.name}, byte {last.offset})" in text
    assert "not ended" in fedmq("stats", folder).stdout


def test_damaged_payload_is_located_by_stats(fedmq, copy):
    folder, _ = copy
    path = segment_path(folder, PAYLOAD, 0)
    records = list(scan(path))
    flip(path, records[2].data_offset)
    result = fedmq("stats", folder, code=1)
    assert f"damaged record: its checksum does not match (at {path.name}, byte" in result.stdout
    assert "payload: 2 chunks" in result.stdout
    assert "accepted 19" in result.stdout


def test_payload_that_was_cut_is_missed_by_the_messages_that_name_it(fedmq, copy):
    folder, _ = copy
    path = segment_path(folder, PAYLOAD, 0)
    path.write_bytes(path.read_bytes()[:-3])
    result = fedmq("stats", folder, code=1)
    assert "1 blob of accepted messages: lost" in result.stdout
    assert "incomplete last record" in result.stdout
    assert "all intact" not in result.stdout


def test_payload_that_no_message_names_yet_may_be_cut(fedmq, copy):
    folder, _ = copy
    path = segment_path(folder, PAYLOAD, 0)
    with path.open("ab") as file:
        file.write(b"\x01\x02\x03")
    assert "incomplete last record: 3 bytes" in fedmq("stats", folder).stdout


def test_any_flipped_byte_is_found(fedmq, copy):
    folder, messages = copy
    payload = segment_path(folder, PAYLOAD, 0)
    rng = random.Random(1)  # noqa: S311 - a test's own dice
    for path in (messages, payload):
        whole = path.read_bytes()
        for offset in (0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))):
            flip(path, offset)
            result = fedmq_any(folder)
            text = result.output + result.stderr
            assert f"at {path.name}, byte " in text, f"byte {offset} of {path.name}"
            found = int(text.split(f"at {path.name}, byte ")[1].split(")")[0])
            assert found <= offset
            path.write_bytes(whole)


def fedmq_any(folder):
    """Run stats, whatever its exit code."""
    from click.testing import CliRunner

    from fedmq.nodes.cli.main import main

    return CliRunner().invoke(main, ["trace", "stats", str(folder)])
