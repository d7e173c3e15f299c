"""Traces of 0.1.0, whose sums depended on the CPU, replay within a tolerance; no less is found."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from msgspec.structs import replace

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.wire.schema import Blob
from tests.cpus import X86, capabilities
from tests.golden.make_traces import EXPECTED, TRACES
from tests.nodes.replay import material
from tests.nodes.replay.material import edit, nth, number, replay, rewrite, scaled, silence

pytestmark = pytest.mark.slow

OLD = TRACES / "0.1.0"
NAMES = sorted(path.name for path in OLD.iterdir())
BUFFERED = OLD / "fedavg-buffered"
ROUNDS = OLD / "fedavg-rounds"
WITHIN = "match the record within the tolerance"


def outcome(name):
    return material.json.loads(EXPECTED.read_text())[f"0.1.0/{name}"]


def found(tmp_path, changes, source=BUFFERED, **more):
    """Return what a replay says of a changed trace."""
    output = replay(rewrite(source, tmp_path, changes, **more), code=1).output
    assert WITHIN not in output
    return output


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_replays_and_reports_how(name):
    expected = outcome(name)
    output = replay(OLD / name).output
    first = f"replayed {expected['messages']} messages: all {expected['actions']} actions {WITHIN}"
    assert output.startswith(f"{first}\n")
    sentence = " ".join(output.split())
    assert "recorded by fedmq 0.1.0, whose sums differ in the last bits" in sentence
    assert "within 0.001" in sentence
    assert "restarted from each recorded checkpoint" in sentence
    assert float(re.search(r"largest distance was (\S+) of the", sentence)[1]) < 0.01
    assert f"version 12, model {expected['model']}" in output


@pytest.mark.end_to_end
@pytest.mark.parametrize("capability", X86)
def test_the_model_is_the_recorded_one_on_every_kind_of_cpu(capability):
    if capability not in capabilities():
        pytest.skip(f"this CPU has no {capability}")
    code = (
        "from fedmq.nodes.cli.main import main\n"
        f"for name in {NAMES!r}:\n"
        f"    folder = {str(OLD)!r} + '/' + name\n"
        "    main(['replay', '--allow', 'tests', folder], standalone_mode=False)\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    models = re.findall(r"version 12, model (\w+)", done.stdout)
    assert models == [outcome(name)["model"] for name in NAMES]
    assert done.stdout.count(WITHIN) == len(NAMES)


# ---- what is too far


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", [0, 8], ids=["of version 0", "of a later version"])
def test_other_weights_of_a_task_are_found(name, index, tmp_path):
    seq, task = nth(OLD / name, index, kind="task")
    blob, data = scaled(OLD / name, seq, 1.5)
    change = {seq: edit(blobs=(blob, *task.blobs[1:]))}
    output = found(tmp_path, change, source=OLD / name, blobs=[("aggregator", data)])
    assert f"message {seq} differs" in output
    assert re.search(r"weights \S+: \d+ of \d+ elements differ, by at most", output)
    assert "only in" not in output


def changed_value(folder, seq, index, change):
    """Return (Blob, bytes) of a raw message of which one value is other."""
    data = bytearray(Trace(folder).blob(material.message(folder, seq), 0))
    values = torch.frombuffer(data, dtype=torch.float32)
    values[index] = change(values[index].item())
    return Blob.of(bytes(data)), bytes(data)


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 0.1, lambda x: -x, lambda _: math.nan, lambda _: math.inf],
    ids=["larger", "negative", "nan", "inf"],
)
def test_one_other_value_is_found(change, tmp_path):
    seq, task = nth(ROUNDS, 4, kind="task")
    blob, data = changed_value(ROUNDS, seq, 3, change)
    changes = {seq: edit(blobs=(blob, *task.blobs[1:]))}
    output = found(tmp_path, changes, source=ROUNDS, blobs=[("aggregator", data)])
    assert f"message {seq} differs" in output
    assert re.search(r"weights \S+: \d+ of \d+ elements differ", output)


def test_what_lies_within_the_tolerance_is_not_found(tmp_path):
    seq, task = nth(ROUNDS, 4, kind="task")
    blob, data = changed_value(ROUNDS, seq, 3, lambda x: x * (1 + 1e-6))
    assert blob != task.blobs[0]
    changes = {seq: edit(blobs=(blob, *task.blobs[1:]))}
    folder = rewrite(ROUNDS, tmp_path, changes, blobs=[("aggregator", data)])
    assert WITHIN in replay(folder).output


@pytest.mark.parametrize("wanted", [{"kind": "task"}, {"kind": "version", "to": "checkpoint"}])
def test_tensors_whose_bytes_are_not_there_are_found(wanted, tmp_path):
    seq, recorded = nth(ROUNDS, 4, **wanted)
    blob, _ = scaled(ROUNDS, seq, 1.5)
    output = found(tmp_path, {seq: edit(blobs=(blob, *recorded.blobs[1:]))}, source=ROUNDS)
    assert f"message {seq} differs" in output
    assert "cannot be decoded in the record" in output


@pytest.mark.parametrize(
    "change",
    [
        edit(blobs=()),
        edit(body={"groups": []}),
        edit(body={"groups": 3}),
        material.without("groups"),
    ],
    ids=["no bytes", "no groups", "a number", "nothing"],
)
def test_a_checkpoint_without_its_state_is_found(change, tmp_path):
    seq = number(ROUNDS, 2, kind="version", to="checkpoint")
    assert f"message {seq} differs" in found(tmp_path, {seq: change}, source=ROUNDS)


@pytest.mark.parametrize(
    "body",
    [{"results": 4}, {"used": 4000}, {"version": 2.0}, {"weights": 3.1}, {"position": 9}],
    ids=str,
)
def test_another_field_of_a_version_is_found(body, tmp_path):
    seq = number(BUFFERED, 1, kind="version")
    output = found(tmp_path, {seq: edit(body=body)})
    assert f"message {seq} differs" in output
    ((key, value),) = body.items()
    assert f"body.{key}: {value!r} in the record" in output


@pytest.mark.parametrize("key", ["version", "model_digest"])
def test_a_field_that_was_taken_out_is_found(key, tmp_path):
    seq = number(BUFFERED, 1, kind="version")
    output = found(tmp_path, {seq: material.without(key)})
    assert f"body.{key}: absent in the record" in output


def test_a_changed_result_is_found(tmp_path):
    """At the first version that it is a part of, or what is sent of that."""
    seq, result = nth(ROUNDS, 0, kind="result")
    blob, data = scaled(ROUNDS, seq, 1.5)
    changes = {seq: edit(blobs=(blob, *result.blobs[1:]))}
    output = found(tmp_path, changes, source=ROUNDS, blobs=[(result.sender, data)])
    version = number(ROUNDS, 0, kind="version")
    assert version <= int(re.match(r"message (\d+) differs", output)[1]) <= version + 4
    assert re.search(r"weights \S+: \d+ of \d+ elements differ", output)


def test_a_changed_reason_of_a_rejection_is_found(tmp_path):
    refusal = material.refusal(BUFFERED)
    output = found(tmp_path, {refusal.seq: lambda entry: replace(entry, reason="too late")})
    assert f"entry {refusal.seq} differs" in output
    assert f"replayed: rejected: {refusal.reason}" in output


@pytest.mark.parametrize("wanted", [{"kind": "task"}, {"kind": "version"}, {"kind": "result"}])
def test_a_dropped_message_is_found(wanted, tmp_path):
    seq = number(BUFFERED, 3, **wanted)
    output = found(tmp_path, {seq: silence})
    assert int(re.match(r"message (\d+) differs", output)[1]) > seq


# ---- the options


def test_until_stops_there():
    seq, version = nth(BUFFERED, 6, kind="version")
    output = replay(BUFFERED, "--until", seq).output
    assert WITHIN in output
    assert f"version {version.body['version']}, model " in output


def test_from_the_newest_checkpoint():
    output = replay(BUFFERED, "--from-checkpoint").output
    assert WITHIN in output
    assert f"version 12, model {outcome('fedavg-buffered')['model']}" in output
    first = number(BUFFERED, 0, to="checkpoint")
    assert WITHIN in replay(BUFFERED, "--from-checkpoint", "--until", first + 10).output


@pytest.mark.parametrize("node", ["worker-1", "evaluator"])
def test_a_nodes_tasks_are_done_again(node):
    answers = [
        m for _, m in material.messages(ROUNDS, sender=node) if m.kind in ("result", "score")
    ]
    output = replay(ROUNDS, "--worker", node).output
    assert answers
    count = len(answers)
    done = f"evaluated {count} models again" if node == "evaluator" else f"retrained {count} tasks"
    assert f"{done}: all results match the record" in output


def test_another_rule():
    output = replay(BUFFERED, "--set", "schedule.size=2").output
    evaluated = material.messages(BUFFERED, kind="evaluate")
    assert len(output.strip().split("\n")) == 2 + len(evaluated) + 1


def test_the_state_is_saved_and_compared(tmp_path):
    replay(BUFFERED, "--save", tmp_path)
    assert WITHIN in replay(BUFFERED, "--compare", tmp_path).output
    assert WITHIN in replay(BUFFERED, "--compare", BUFFERED).output
    assert "the runs differ in this message" in replay(BUFFERED, "--compare", ROUNDS, code=1).output


@pytest.mark.parametrize("used", [33, 99])
def test_a_changed_count_of_used_results_at_the_end_is_found(used, tmp_path):
    """34 are in a version; 0.1.0 counted one more that the run ended before."""
    ((seq, recorded),) = material.messages(ROUNDS, kind="finished")
    assert recorded.body["used"] == 35
    output = found(tmp_path, {seq: edit(body={"used": used})}, source=ROUNDS)
    assert f"body.used: {used} in the record, 34 in the replay" in output


def test_a_code_that_an_old_refusal_does_not_have_must_be_the_cores(tmp_path):
    refusal = material.refusal(BUFFERED)
    output = found(tmp_path, {refusal.seq: lambda entry: replace(entry, code="late")})
    assert f"recorded: rejected: {refusal.reason} (late)" in output
    assert f"replayed: rejected: {refusal.reason} (stale)" in output
