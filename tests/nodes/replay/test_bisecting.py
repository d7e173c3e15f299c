"""``--save`` and ``--compare``: find the first difference from other code or another run."""

import json
import shutil

import pytest

from fedmq.algorithms.schedules import staleness
from fedmq.broker.inspection.trace import Trace
from fedmq.nodes.replay.state_digests import FILE
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
    scaled,
)

pytestmark = pytest.mark.slow

STREAM = GOLDEN / "fedprox-stream"
ROUNDS = GOLDEN / "fedavg-rounds"


@pytest.fixture
def bug(monkeypatch):
    """Let one staleness function be wrong for results that are late."""

    def plant(name, wrong=0.123):
        right = staleness.STALENESS[name]

        def made(*parameters):
            inner = right(*parameters)
            return lambda tau: inner(tau) if tau == 0 else wrong

        monkeypatch.setattr(staleness, "STALENESS", {**staleness.STALENESS, name: made})
        staleness.staleness.cache_clear()

    yield plant
    monkeypatch.undo()
    staleness.staleness.cache_clear()


def first_late(folder):
    """Return the number of the first result that is late, and is used: from the trace alone."""
    records = material.messages(folder, kind="version")
    for seq, result in material.messages(folder, kind="result"):
        made = sum(1 for _, each in records if each.body["position"] < seq)
        late = made - result.body["model_version"]
        if late > 0 and seq not in refusals(folder):
            return seq
    raise AssertionError("nothing is late in this run")


def refusals(folder):
    return {getattr(entry, "of", None) for entry in Trace(folder).entries()}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_code_has_the_same_state(name, tmp_path):
    first = replay(GOLDEN / name, "--save", tmp_path / "a" / "steps").output
    assert (tmp_path / "a" / "steps" / FILE).exists()
    second = replay(GOLDEN / name, "--compare", tmp_path / "a" / "steps").output
    assert first.split("\n")[:2] == second.split("\n")[:2]
    assert "match the record\n" in second


def test_each_message_has_its_line(tmp_path):
    replay(BUFFERED, "--save", tmp_path)
    header, *lines = map(json.loads, (tmp_path / FILE).read_text().split("\n")[:-1])
    assert header["run"] == "simulated"
    assert [line["seq"] for line in lines] == [-1, *material.inbox(BUFFERED)]
    assert lines[-1]["parts"]["version"] == 12


@pytest.mark.parametrize(
    ("folder", "function"),
    [(BUFFERED, "inverse_sqrt"), (GOLDEN / "fedsgd-late", "polynomial"), (ROUNDS, "polynomial")],
    ids=["buffered", "late", "rounds"],
)
def test_a_bug_in_the_staleness_is_located_at_the_first_late_result(
    folder, function, tmp_path, bug
):
    where = first_late(folder)
    replay(folder, "--save", tmp_path)
    bug(function)
    output = replay(folder, "--compare", tmp_path, code=1).output
    assert output.startswith(f"state diverges at message {where}: result ")
    assert "gathered: " in output or "state: " in output
    assert "weights: " in output
    assert "hosts" not in output
    assert "tasks: " not in output


def test_a_bug_is_seen_before_the_record_shows_it(tmp_path, bug):
    """Without the saved steps, it shows at the next version."""
    late = first_late(BUFFERED)
    bug("inverse_sqrt")
    output = replay(BUFFERED, code=1).output
    version = next(
        seq
        for seq, each in material.messages(BUFFERED, kind="version")
        if each.body["position"] >= late
    )
    assert f"message {version} differs" in output


def test_compare_stops_at_until(tmp_path, bug):
    replay(BUFFERED, "--save", tmp_path)
    where = first_late(BUFFERED)
    bug("inverse_sqrt")
    assert (
        "match the record\n" in replay(BUFFERED, "--compare", tmp_path, "--until", where - 1).output
    )
    output = replay(BUFFERED, "--compare", tmp_path, "--until", where, code=1).output
    assert f"state diverges at message {where}" in output


def test_steps_of_another_run_are_refused(tmp_path):
    """Even if that one has the same id."""
    replay(BUFFERED, "--save", tmp_path)
    assert "--compare" in refused(STREAM, "--compare", tmp_path)


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / FILE).write_text("mine")
    assert f"{tmp_path / FILE} exists already" in refused(BUFFERED, "--save", tmp_path)
    assert (tmp_path / FILE).read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "--save" in refused(BUFFERED, "--save", tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "content",
    ["", "\n", "hello\n", "{}\n", '{"run": 3, "opened": 0}\n', "\x00\xff", '["simulated", 1.0]\n'],
    ids=repr,
)
def test_a_file_that_holds_no_steps_is_refused(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    assert "--compare: expected a file of --save, got " in refused(BUFFERED, "--compare", tmp_path)


@pytest.mark.parametrize("line", ["nonsense", '{"seq": 2}', '{"seq": "x", "parts": {}}', "{}"])
def test_a_damaged_line_is_refused(line, tmp_path):
    replay(BUFFERED, "--save", tmp_path)
    lines = (tmp_path / FILE).read_text().split("\n")
    lines[10] = line
    (tmp_path / FILE).write_text("\n".join(lines))
    assert "--compare: expected a file of --save, got " in refused(BUFFERED, "--compare", tmp_path)


def test_a_line_that_is_missing_is_a_difference(tmp_path):
    replay(BUFFERED, "--save", tmp_path)
    lines = (tmp_path / FILE).read_text().split("\n")
    del lines[10]
    (tmp_path / FILE).write_text("\n".join(lines))
    output = replay(BUFFERED, "--compare", tmp_path, code=1).output
    assert f"state diverges at message {material.inbox(BUFFERED)[8]}" in output


def test_nothing_there_to_hold_it_against_is_refused(tmp_path):
    sentence = refused(BUFFERED, "--compare", tmp_path / "no")
    assert f"expected the folder of a run or of --save, got {tmp_path / 'no'}" in sentence


def test_a_file_in_place_of_the_folder_for_digests_is_rejected(tmp_path):
    (tmp_path / "file").touch()
    sentence = refused(BUFFERED, "--save", tmp_path / "file")
    assert f"--save: expected a folder, got the file {tmp_path / 'file'}" in sentence


# ---- against another run


def test_an_identical_run_has_the_same_state(tmp_path):
    shutil.copytree(BUFFERED, tmp_path / "copy")
    output = replay(BUFFERED, "--compare", tmp_path / "copy").output
    assert all_equal("fedavg-buffered") in output


def test_a_changed_result_in_the_other_run_is_named(tmp_path):
    seq, result = nth(STREAM, 3, kind="result")
    blob, data = scaled(STREAM, seq, 1.5)
    changed = edit(blobs=(blob, *result.blobs[1:]))
    other = rewrite(STREAM, tmp_path, {seq: changed}, blobs=[(result.sender, data)])
    output = replay(STREAM, "--compare", other, code=1).output
    assert output.startswith("the runs differ in this message; their states before it are equal\n")
    assert f"this run: {seq} result {result.id}" in output
    assert f"the other run: {seq} result {result.id}" in output
    assert "elements differ, by at most" in output
    assert f"from {result.sender}" in output


def test_a_changed_field_in_the_other_run_is_named(tmp_path):
    seq, score = nth(STREAM, 0, kind="score")
    metrics = {**score.body["metrics"], "loss": 7.0}
    other = rewrite(STREAM, tmp_path, {seq: edit(body={"metrics": metrics})})
    output = replay(STREAM, "--compare", other, code=1).output
    assert "body.metrics.loss" in output
    assert "7.0 in the other" in output


def test_another_message_in_the_other_runs_place_is_named(tmp_path):
    (one, first), (two, second) = material.messages(BUFFERED, kind="result")[:2]
    swapped = {one: material.says(second), two: material.says(first)}
    output = replay(BUFFERED, "--compare", rewrite(BUFFERED, tmp_path, swapped), code=1).output
    assert f"this run: {one} result {first.id}" in output
    assert f"the other run: {one} result {second.id}" in output


def test_what_honest_runs_differ_in_is_no_difference(tmp_path):
    """Sessions, keys and how long a task took."""
    joined = number(STREAM, 0, kind="joined", to="aggregator")
    seq = number(STREAM, 0, kind="result")
    changes = {
        joined: edit(body={"session": "other", "key": "other"}),
        seq: edit(body={"elapsed_s": 3.0}),
    }
    output = replay(STREAM, "--compare", rewrite(STREAM, tmp_path, changes)).output
    assert "match the record\n" in output


def test_a_longer_run_continues(tmp_path):
    """The first message that the shorter one lacks is named."""
    inbox = material.inbox(BUFFERED)
    last, after = inbox[len(inbox) // 2 :][:2]
    short = rewrite(BUFFERED, tmp_path, until=last)
    output = replay(BUFFERED, "--compare", short, code=1).output
    assert f"only this run continues at message {after}" in output
    output = replay(short, "--compare", BUFFERED, code=1).output
    assert f"only the other run continues at message {after}" in output


def test_a_tampered_other_run_is_reported(tmp_path):
    version = number(BUFFERED, 1, kind="version")
    other = rewrite(BUFFERED, tmp_path, {version: edit(body={"used": 0})})
    output = replay(BUFFERED, "--compare", other, code=1).output
    assert "the other run does not replay with this code" in output
    output = replay(other, "--compare", BUFFERED, code=1).output
    assert "this run does not replay with this code" in output


def test_a_run_with_another_schedule_differs(tmp_path):
    output = replay(BUFFERED, "--compare", ROUNDS, code=1).output
    assert output.startswith("the runs differ in this message")
