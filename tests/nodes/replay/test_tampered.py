"""A record that is not what the core says is found at the entry that differs, with both sides."""

import re

import pytest
from msgspec.structs import replace

from fedmq.broker.entries import Accepted, Ended, Refusal
from fedmq.broker.headers import encode_message
from fedmq.broker.trace import Trace
from tests.nodes.replay import material
from tests.nodes.replay.material import (
    BUFFERED,
    GOLDEN,
    NAMES,
    edit,
    message,
    replay,
    rewrite,
    says,
    scaled,
    silence,
)


def found(tmp_path, changes, *words, source=BUFFERED, **more):
    """Return what a replay says of a changed trace; nothing of it may be called equal."""
    output = replay(rewrite(source, tmp_path, changes, **more), *words, code=1).output
    assert "all equal" not in output
    return output


NOTHING_MORE = r"message 12 differs\n  recorded: task .*\n  replayed: nothing more"


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_digest_in_the_last_version(name, tmp_path):
    seq, recorded = material.messages(GOLDEN / name, kind="version")[-1]
    output = found(tmp_path, {seq: edit(body={"model_digest": "0" * 32})}, source=GOLDEN / name)
    assert f"message {seq} differs; it was said upon message" in output
    assert f"recorded: version {recorded.id}" in output
    assert f"replayed: version {recorded.id}" in output
    assert "body.model_digest: '" + "0" * 32 in output
    assert recorded.body["model_digest"] in output


def test_only_what_differs_is_told(tmp_path):
    output = found(tmp_path, {29: edit(body={"model_digest": "0" * 32})})
    assert len(re.findall(r"in the record, .* in the replay", output)) == 1


@pytest.mark.parametrize(
    ("seq", "fields", "told"),
    [
        (7, {"body": {"client": 5}}, "body.client: 5 in the record, 1 in the replay"),
        (7, {"body": {"model_version": 3}}, "body.model_version: 3 in the record, 0 in"),
        (7, {"body": {"reply": "model"}}, "'model' in the record, 'update' in the replay"),
        (7, {"to": "client/2"}, "to: 'client/2' in the record, 'client/1' in the replay"),
        (7, {"kind": "evaluate"}, "'evaluate' in the record, 'task' in the replay"),
        (7, {"id": "aggregator/99"}, "'aggregator/99' in the record, 'aggregator/3' in"),
        (7, {"re": "x"}, "re: 'x' in the record"),
        (25, {"body": {"results": 4}}, "body.results: 4 in the record, 3 in the replay"),
        (29, {"body": {"used": 7}}, "body.used: 7 in the record"),
        (29, {"body": {"weights": 2.1213203435596428}}, "2.1213203435596424 in the replay"),
        (29, {"to": "checkpoint"}, "to: 'checkpoint' in the record, 'record' in the replay"),
        (42, {"body": {"numbers": {"n": 1}}}, "body.numbers.n: 1 in the record"),
        (166, {"body": {"after_s": 61.0}}, "body.after_s: 61.0 in the record, 60.0 in"),
        (171, {"body": {"reason": "bored"}}, "'bored' in the record"),
    ],
    ids=str,
)
def test_a_changed_field_of_a_message(seq, fields, told, tmp_path):
    output = found(tmp_path, {seq: edit(**fields)})
    assert f"message {seq} differs" in output
    assert told in output


def test_a_changed_field_after_a_checkpoint(tmp_path):
    """A replay from a checkpoint finds what comes after it, and only that."""
    folder = rewrite(BUFFERED, tmp_path, {164: edit(body={"used": 7}), 29: edit(body={"used": 1})})
    assert "message 29 differs" in replay(folder, code=1).output
    assert "message 164 differs" in replay(folder, "--from-checkpoint", code=1).output


def test_what_lies_behind_until_is_not_looked_at(tmp_path):
    folder = rewrite(BUFFERED, tmp_path, {80: edit(body={"used": 7})})
    assert "all equal" in replay(folder, "--until", 79).output
    assert "message 80 differs" in replay(folder, "--until", 93, code=1).output


def test_a_changed_configuration_of_the_run(tmp_path):
    config = message(BUFFERED, 4).body["config"].replace("seed = 0", "seed = 1")
    output = found(tmp_path, {4: edit(body={"config": config})})
    assert "message 4 differs; it was said upon its start" in output
    assert "body.config.run.seed: 1 in the record, 0 in the replay" in output


def test_a_run_that_was_opened_with_another_seed(tmp_path):
    """All that is learned follows from the configuration: another one is another run."""
    config = Trace(BUFFERED).opened.config.replace("seed = 0", "seed = 1")
    output = found(tmp_path, {0: lambda entry: replace(entry, config=config)})
    assert "message 4 differs" in output


@pytest.mark.parametrize("seq", [10, 25, 42])
def test_a_changed_blob_of_the_aggregator(seq, tmp_path):
    """Of a task, a checkpoint and an evaluation."""
    recorded = message(BUFFERED, seq)
    blob, data = scaled(BUFFERED, seq, 1.5)
    changed = edit(blobs=(blob, *recorded.blobs[1:]))
    output = found(tmp_path, {seq: changed}, blobs=[("aggregator", data)])
    assert f"message {seq} differs" in output
    assert re.search(r"weights 0\.weight: \d+ of \d+ elements differ, by at most", output)


def test_a_changed_blob_that_is_not_there_any_more(tmp_path):
    blob, _ = scaled(BUFFERED, 10, 1.5)
    changed = edit(blobs=(blob, *message(BUFFERED, 10).blobs[1:]))
    output = found(tmp_path, {10: changed})
    assert "message 10 differs" in output
    assert "cannot be decoded in the record" in output


def test_a_dropped_message(tmp_path):
    """It is found at the next one, which stands where it should."""
    output = found(tmp_path, {28: silence})
    assert "message 29 differs" in output
    assert "recorded: version aggregator/13" in output
    assert "replayed: task aggregator/12" in output


def test_a_dropped_last_message(tmp_path):
    output = found(tmp_path, {171: silence})
    assert "finished aggregator/67" in output
    assert "entry 173 ends the run, and something was not recorded" in output


def test_an_extra_message_in_between(tmp_path):
    """Entry 68 told of nothing to the aggregator; now the aggregator speaks there."""
    other = replace(message(BUFFERED, 67), id="aggregator/29")
    extra = Accepted(seq=68, at=1014.63, message=encode_message(other))
    output = found(tmp_path, {68: extra})
    assert "message 68" in output
    assert "task aggregator/29 to client/1" in output
    assert "replayed: nothing more" in output


def test_an_extra_message_at_the_end(tmp_path):
    other = encode_message(replace(message(BUFFERED, 67), id="aggregator/68"))
    output = found(tmp_path, {}, more=[lambda seq, at: Accepted(seq=seq, at=at, message=other)])
    assert "message 174" in output


def test_two_swapped_messages(tmp_path):
    first, second = message(BUFFERED, 27), message(BUFFERED, 28)
    output = found(tmp_path, {27: says(second), 28: says(first)})
    assert "message 27 differs" in output
    assert "recorded: task aggregator/12 to client/4" in output
    assert "replayed: task aggregator/11 to client/5" in output


def test_a_changed_reason_of_a_refusal(tmp_path):
    output = found(tmp_path, {45: lambda entry: replace(entry, reason="too late")})
    assert "entry 45 differs: what became of message 40" in output
    assert "recorded: refused: too late" in output
    assert "replayed: refused: too stale: 3 versions behind" in output


def test_a_changed_code_of_a_refusal(tmp_path):
    """An old trace has none; one that is there must be the core's."""
    output = found(tmp_path, {45: lambda entry: replace(entry, code="late")})
    assert "recorded: refused: too stale: 3 versions behind (late)" in output
    assert "replayed: refused: too stale: 3 versions behind (stale)" in output


@pytest.mark.parametrize("used", [33, 99])
def test_a_changed_count_of_used_results_at_the_end_of_an_old_trace(used, tmp_path):
    """34 are in a version; version 0.1.0 counted one more that the run ended before."""
    source = GOLDEN / "fedavg-rounds"
    ((seq, recorded),) = material.messages(source, kind="finished")
    assert recorded.body["used"] == 35
    output = found(tmp_path, {seq: edit(body={"used": used})}, source=source)
    assert f"body.used: {used} in the record, 34 in the replay" in output


def test_a_refusal_that_the_core_does_not_say(tmp_path):
    refusal = Refusal(
        seq=68, at=1014.63, run="simulated", node="aggregator", id="x", reason="no", of=56
    )
    output = found(tmp_path, {68: refusal})
    assert "entry 68 differs: what became of message 56" in output
    assert "recorded: refused: no" in output
    assert "replayed: not refused" in output


def test_refusals_of_other_nodes_are_not_the_aggregators(tmp_path):
    refusal = Refusal(
        seq=68, at=1014.63, run="simulated", node="worker-0", id="x", reason="no", of=56
    )
    assert "all equal" in replay(rewrite(BUFFERED, tmp_path, {68: refusal})).output


def not_accepted(name):
    """Return the entry 29 that a broker writes of a post that it does not accept."""
    return Refusal(seq=29, at=1005.47, run="simulated", node="broker", id=name, reason="no")


def test_a_message_that_the_broker_did_not_accept_was_said(tmp_path):
    folder = rewrite(BUFFERED, tmp_path, {29: not_accepted("aggregator/13")})
    assert "71 messages, 78 actions, all equal" in replay(folder).output


def test_another_message_that_the_broker_did_not_accept_is_a_difference(tmp_path):
    output = found(tmp_path, {29: not_accepted("aggregator/77")})
    assert "message 30 differs" in output
    assert "replayed: version aggregator/13" in output


def test_another_end(tmp_path):
    output = found(tmp_path, {173: lambda entry: replace(entry, reason="tired")})
    assert "entry 173 differs: the end of the run\n  recorded: tired" in output
    assert "replayed: 12 versions committed" in output


def test_an_end_that_is_not_there_is_no_difference(tmp_path):
    """A broker may die between the last message and the end."""
    assert "all equal" in replay(rewrite(BUFFERED, tmp_path, until=172)).output


# ---- the inbox: what was taken is not what the aggregator took then


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_result_is_found_at_the_next_version(name, tmp_path):
    """The model is other; the version record is the first message that tells."""
    folder = GOLDEN / name
    seq, result = material.messages(folder, kind="result")[0]
    if name == "fedavg-buffered":
        blob, data = other_bytes(folder, seq)
    else:
        blob, data = scaled(folder, seq, 1.5)
    changed = edit(blobs=(blob, *result.blobs[1:]))
    output = found(tmp_path, {seq: changed}, source=folder, blobs=[(result.sender, data)])
    version = next(s for s, m in material.messages(folder, kind="version") if s > seq)
    assert f"message {version} differs" in output
    assert "body.model_digest" in output


def other_bytes(folder, seq):
    """Return another blob for a result in float16."""
    data = bytearray(Trace(folder).blob(message(folder, seq), 0))
    data[0] ^= 1
    return material.Blob.of(bytes(data)), bytes(data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"body": {"numbers": {"n": 0, "reply": "update"}}},
            "message 12 differs|message 25 differs",
        ),
        (
            {"sender": "worker-7"},
            NOTHING_MORE,
        ),
        (
            {"re": "aggregator/77"},
            NOTHING_MORE,
        ),
        ({"kind": "failed"}, "message 25 differs|message 24 differs"),
    ],
    ids=str,
)
def test_a_changed_answer_is_found(change, told, tmp_path):
    output = found(tmp_path, {11: edit(**change)})
    assert re.search(told, output)


def test_a_dropped_result_is_found(tmp_path):
    assert re.search(r"message 12 |message 12,", found(tmp_path, {11: silence}))


def test_two_swapped_results_are_found(tmp_path):
    """The last of version 1 against the first of version 2."""
    first, second = message(BUFFERED, 14), message(BUFFERED, 15)
    output = found(tmp_path, {14: says(second), 15: says(first)})
    assert re.search("message 2[45] differs; it was said upon message 1[3-5]", output)


def test_a_changed_time_is_found_where_a_checkpoint_depends_on_it(tmp_path):
    """Version 2 came too soon after version 1 for a checkpoint; now it comes late."""
    output = found(tmp_path, {17: lambda entry: replace(entry, at=entry.at + 5)})
    assert "message 29 differs" in output
    assert "to: 'record' in the record, 'checkpoint' in the replay" in output


def test_the_end_of_the_trace_holds_an_end():
    assert isinstance(list(Trace(BUFFERED).entries())[-1], Ended)
