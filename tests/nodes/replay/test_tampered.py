"""A changed record is found at the entry that differs, with both values."""

import itertools
import math
import re

import pytest
from msgspec.structs import replace

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, Refusal
from fedmq.broker.wire.encoding import encode_message
from tests.nodes.replay import material
from tests.nodes.replay.material import (
    BUFFERED,
    GOLDEN,
    NAMES,
    all_equal,
    edit,
    message,
    nth,
    number,
    replay,
    rewrite,
    says,
    scaled,
    silence,
)

pytestmark = pytest.mark.slow

TASK = {"kind": "task"}
VERSION = {"kind": "version"}
FINISHED = {"kind": "finished"}
TIMER = {"kind": "timer"}
EVALUATION = {"kind": "evaluate"}
NOTHING = object()


def found(tmp_path, changes, *words, source=BUFFERED, **more):
    """Return what a replay says of a changed trace; nothing of it may be called equal."""
    output = replay(rewrite(source, tmp_path, changes, **more), *words, code=1).output
    assert "match the record" not in output
    return output


def where(output):
    """Return the number of the entry that differs."""
    return int(re.match(r"(?:message|entry) (\d+) differs", output)[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_digest_in_the_last_version(name, tmp_path):
    seq, recorded = nth(GOLDEN / name, -1, kind="version")
    output = found(tmp_path, {seq: edit(body={"model_digest": "0" * 32})}, source=GOLDEN / name)
    assert f"message {seq} differs; it was sent in response to message" in output
    assert f"recorded: version {recorded.id}" in output
    assert f"replayed: version {recorded.id}" in output
    assert "body.model_digest: '" + "0" * 32 in output
    assert recorded.body["model_digest"] in output


def test_only_what_differs_is_reported(tmp_path):
    seq = number(BUFFERED, 1, kind="version")
    output = found(tmp_path, {seq: edit(body={"model_digest": "0" * 32})})
    assert len(re.findall(r"in the record, .* in the replay", output)) == 1


@pytest.mark.parametrize(
    ("which", "index", "field", "other"),
    [
        (TASK, 1, "body.client", lambda client: (client + 1) % 6),
        (TASK, 1, "body.model_version", lambda version: version + 3),
        (TASK, 1, "body.reply", lambda _: "model"),
        (TASK, 1, "to", lambda to: to + "0"),
        (TASK, 1, "kind", lambda _: "evaluate"),
        (TASK, 1, "id", lambda _: "aggregator/99"),
        (TASK, 1, "re", lambda _: "x"),
        (VERSION, 0, "body.results", lambda results: results + 1),
        (VERSION, 1, "body.used", lambda used: used + 1),
        (VERSION, 1, "body.weights", lambda weights: math.nextafter(weights, 9.0)),
        (VERSION, 1, "to", lambda to: {"record": "checkpoint", "checkpoint": "record"}[to]),
        (EVALUATION, 1, "body.numbers.n", lambda _: 1),
        (TIMER, -1, "body.after_s", lambda after_s: after_s + 1),
        (FINISHED, 0, "body.reason", lambda _: "bored"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_changed_field_of_a_message(which, index, field, other, tmp_path):
    seq, recorded = nth(BUFFERED, index, **which)
    place, *inner = field.split(".")
    old = getattr(recorded, place)
    for key in inner:
        old = old.get(key, NOTHING)
    new = value = other(old)
    for key in reversed(inner):
        value = {key: value}
    output = found(tmp_path, {seq: edit(**{place: value})})
    assert f"message {seq} differs" in output
    was = "absent" if old is NOTHING else repr(old)
    assert f"{field}: {new!r} in the record, {was} in the replay" in output


def test_a_changed_field_after_a_checkpoint(tmp_path):
    """A replay from a checkpoint finds what comes after it, and only that."""
    early, late = number(BUFFERED, 0, kind="version"), number(BUFFERED, 0, kind="finished")
    changes = {late: edit(body={"used": 7}), early: edit(body={"used": 1})}
    folder = rewrite(BUFFERED, tmp_path, changes)
    assert f"message {early} differs" in replay(folder, code=1).output
    assert f"message {late} differs" in replay(folder, "--from-checkpoint", code=1).output


def test_what_lies_behind_until_is_not_looked_at(tmp_path):
    seq = number(BUFFERED, 4, kind="version")
    folder = rewrite(BUFFERED, tmp_path, {seq: edit(body={"used": 7})})
    assert "match the record\n" in replay(folder, "--until", seq - 1).output
    after = number(BUFFERED, 5, kind="version")
    assert f"message {seq} differs" in replay(folder, "--until", after, code=1).output


def test_a_changed_configuration_of_the_run(tmp_path):
    seq, run = nth(BUFFERED, 0, kind="run")
    config = run.body["config"].replace("seed = 0", "seed = 1")
    output = found(tmp_path, {seq: edit(body={"config": config})})
    assert f"message {seq} differs; it was sent at the start" in output
    assert "body.config.run.seed: 1 in the record, 0 in the replay" in output


def test_a_run_that_was_opened_with_another_seed(tmp_path):
    """All that is learned follows from the configuration: another one is another run."""
    config = Trace(BUFFERED).opened.config.replace("seed = 0", "seed = 1")
    output = found(tmp_path, {0: lambda entry: replace(entry, config=config)})
    assert f"message {number(BUFFERED, 0, kind='run')} differs" in output


@pytest.mark.parametrize(
    ("which", "index"),
    [(TASK, 4), ({"kind": "version", "to": "checkpoint"}, 0), (EVALUATION, 1)],
    ids=["task", "checkpoint", "evaluation"],
)
def test_a_changed_blob_of_the_aggregator(which, index, tmp_path):
    seq, recorded = nth(BUFFERED, index, **which)
    blob, data = scaled(BUFFERED, seq, 1.5)
    changed = edit(blobs=(blob, *recorded.blobs[1:]))
    output = found(tmp_path, {seq: changed}, blobs=[("aggregator", data)])
    assert f"message {seq} differs" in output
    assert re.search(r"weights 0\.weight: \d+ of \d+ elements differ, by at most", output)


def test_a_changed_blob_that_is_not_there_any_more(tmp_path):
    seq, task = nth(BUFFERED, 4, kind="task")
    blob, _ = scaled(BUFFERED, seq, 1.5)
    output = found(tmp_path, {seq: edit(blobs=(blob, *task.blobs[1:]))})
    assert f"message {seq} differs" in output
    assert "cannot be decoded in the record" in output


def test_a_dropped_message(tmp_path):
    """It is found at the next one, which stands where it should."""
    own = material.messages(BUFFERED, sender="aggregator")
    (seq, dropped), (after, follower) = next(
        (one, other)
        for one, other in itertools.pairwise(own)
        if (one[1].kind, other[1].kind) == ("task", "version")
    )
    output = found(tmp_path, {seq: silence})
    assert f"message {after} differs" in output
    assert f"recorded: version {follower.id}" in output
    assert f"replayed: task {dropped.id}" in output


def test_a_dropped_last_message(tmp_path):
    seq, finished = nth(BUFFERED, 0, kind="finished")
    output = found(tmp_path, {seq: silence})
    assert f"finished {finished.id}" in output
    end = material.last_entry(BUFFERED).seq
    assert f"entry {end} ends the run, but an action is not in the record" in output


def test_an_extra_message_in_between(tmp_path):
    """An entry without an effect is replaced by a message from the aggregator."""
    entry = material.quiet(BUFFERED)
    task = [m for seq, m in material.messages(BUFFERED, **TASK) if seq < entry.seq][-1]
    sent = [m for s, m in material.messages(BUFFERED, sender="aggregator") if s < entry.seq]
    name = f"aggregator/{len(sent)}"
    other = encode_message(replace(task, id=name))
    output = found(tmp_path, {entry.seq: Accepted(seq=entry.seq, at=entry.at, message=other)})
    assert f"message {entry.seq}" in output
    assert f"task {name} to {task.to}" in output
    assert "replayed: nothing more" in output


def test_an_extra_message_at_the_end(tmp_path):
    _, task = nth(BUFFERED, -1, kind="task")
    text = len(material.messages(BUFFERED, sender="aggregator"))
    other = encode_message(replace(task, id=f"aggregator/{text}"))
    output = found(tmp_path, {}, more=[lambda seq, at: Accepted(seq=seq, at=at, message=other)])
    assert where(output) == material.last_entry(BUFFERED).seq + 1


def test_two_swapped_messages(tmp_path):
    (one, first), (two, second) = material.messages(BUFFERED, kind="task")[:2]
    output = found(tmp_path, {one: says(second), two: says(first)})
    assert f"message {one} differs" in output
    assert f"recorded: task {second.id} to {second.to}" in output
    assert f"replayed: task {first.id} to {first.to}" in output


def test_a_changed_reason_of_a_refusal(tmp_path):
    refusal = material.refusal(BUFFERED)
    changed = {refusal.seq: lambda entry: replace(entry, reason="too late")}
    output = found(tmp_path, changed)
    assert f"entry {refusal.seq} differs: the rejection of message {refusal.of}" in output
    assert "recorded: rejected: too late" in output
    assert f"replayed: rejected: {refusal.reason}" in output


def test_a_rejection_worded_otherwise_by_another_release_is_no_difference(tmp_path):
    run, _ = nth(BUFFERED, 0, kind="run")
    refusal = material.refusal(BUFFERED)
    changed = {
        run: edit(body={"release": "0.3.0"}),
        refusal.seq: lambda entry: replace(entry, reason="behind"),
    }
    assert "match the record" in replay(rewrite(BUFFERED, tmp_path, changed)).output


def refused_by(node, entry):
    """Return an entry in which a node refuses the first result, in the place of another."""
    of, result = nth(BUFFERED, 0, kind="result")
    return Refusal(
        seq=entry.seq, at=entry.at, run="simulated", node=node, id=result.id, reason="no", of=of
    )


def test_a_changed_code_of_a_refusal(tmp_path):
    refusal = material.refusal(BUFFERED)
    assert refusal.code == "stale"
    output = found(tmp_path, {refusal.seq: lambda entry: replace(entry, code="late")})
    assert f"recorded: rejected: {refusal.reason} (late)" in output
    assert f"replayed: rejected: {refusal.reason} (stale)" in output


def test_a_refusal_that_the_core_does_not_say(tmp_path):
    entry = material.quiet(BUFFERED)
    refusal = refused_by("aggregator", entry)
    output = found(tmp_path, {entry.seq: refusal})
    assert f"entry {entry.seq} differs: the rejection of message {refusal.of}" in output
    assert "recorded: rejected: no" in output
    assert "replayed: not rejected" in output


def test_refusals_of_other_nodes_are_not_the_aggregators(tmp_path):
    entry = material.quiet(BUFFERED)
    folder = rewrite(BUFFERED, tmp_path, {entry.seq: refused_by("worker-0", entry)})
    assert "match the record\n" in replay(folder).output


def not_accepted(entry, name):
    """Return what a broker writes of a post that it does not accept, in the place of another."""
    return Refusal(seq=entry.seq, at=entry.at, run="simulated", node="broker", id=name, reason="no")


def test_a_message_that_the_broker_did_not_accept_was_sent(tmp_path):
    seq, version = nth(BUFFERED, 1, kind="version")
    changed = {seq: lambda entry: not_accepted(entry, version.id)}
    assert all_equal("fedavg-buffered") in replay(rewrite(BUFFERED, tmp_path, changed)).output


def test_another_message_that_the_broker_did_not_accept_is_a_difference(tmp_path):
    seq, version = nth(BUFFERED, 1, kind="version")
    after = next(s for s, _ in material.messages(BUFFERED, sender="aggregator") if s > seq)
    output = found(tmp_path, {seq: lambda entry: not_accepted(entry, "aggregator/77")})
    assert f"message {after} differs" in output
    assert f"replayed: version {version.id}" in output


def test_another_end(tmp_path):
    end = material.last_entry(BUFFERED)
    output = found(tmp_path, {end.seq: lambda entry: replace(entry, reason="tired")})
    assert f"entry {end.seq} differs: the end of the run\n  recorded: tired" in output
    assert f"replayed: {end.reason}" in output


def test_an_end_that_is_not_there_is_no_difference(tmp_path):
    """A broker may die between the last message and the end."""
    before = material.last_entry(BUFFERED).seq - 1
    assert "match the record\n" in replay(rewrite(BUFFERED, tmp_path, until=before)).output


# ---- the inbox: what was taken is not what the aggregator took then


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_result_is_found_at_the_next_version(name, tmp_path):
    """The model is other; the version record is the first message that tells."""
    folder = GOLDEN / name
    seq, result = nth(folder, 0, kind="result")
    if result.body["groups"][0]["codec"].startswith("raw"):
        blob, data = scaled(folder, seq, 1.5)
    else:
        blob, data = other_bytes(folder, seq)
    changed = edit(blobs=(blob, *result.blobs[1:]))
    output = found(tmp_path, {seq: changed}, source=folder, blobs=[(result.sender, data)])
    version = next(s for s, m in material.messages(folder, kind="version") if s > seq)
    assert f"message {version} differs" in output
    assert "body.model_digest" in output


def other_bytes(folder, seq):
    """Return another blob for a result that a codec wrote."""
    data = bytearray(Trace(folder).blob(message(folder, seq), 0))
    data[0] ^= 1
    return material.Blob.of(bytes(data)), bytes(data)


@pytest.mark.parametrize("change", [{"sender": "worker-7"}, {"re": "aggregator/77"}], ids=str)
def test_an_answer_to_no_task_of_its_sender_is_found(change, tmp_path):
    """The aggregator has nothing to say to it; it had."""
    seq, _ = material.answered_at_once(BUFFERED)
    output = found(tmp_path, {seq: edit(**change)})
    nothing_more = rf"message {seq + 1} differs\n  recorded: task .*\n  replayed: nothing more"
    assert re.search(nothing_more, output)


@pytest.mark.parametrize(
    "change",
    [{"body": {"numbers": {"n": 0, "reply": "update"}}}, {"kind": "failed"}],
    ids=str,
)
def test_a_changed_answer_is_found(change, tmp_path):
    """At the latest where the version should stand that it was a part of."""
    seq, _ = nth(BUFFERED, 0, kind="result")
    output = found(tmp_path, {seq: edit(**change)})
    assert seq < where(output) <= number(BUFFERED, 0, kind="version")


def test_a_dropped_result_is_found(tmp_path):
    seq, _ = material.answered_at_once(BUFFERED)
    assert where(found(tmp_path, {seq: silence})) == seq + 1


def test_two_swapped_results_are_found(tmp_path):
    """The last of a version against the first of the next: both tasks had been sent."""
    results = material.messages(BUFFERED, kind="result")
    sent = {task.id: seq for seq, task in material.messages(BUFFERED, kind="task")}
    last, first, version = next(
        (last, first, version)
        for version, each in material.messages(BUFFERED, kind="version")
        for last in [each.body["position"]]
        for first, other in results
        if first > last and sent[other.re] < last
    )
    changes = {last: says(message(BUFFERED, first)), first: says(message(BUFFERED, last))}
    assert last < where(found(tmp_path, changes)) <= version


def test_a_changed_time_is_found_where_a_checkpoint_depends_on_it(tmp_path):
    """Version 2 came too soon after version 1 for a checkpoint; now it comes late. Or so."""
    (_, before), (seq, version) = material.messages(BUFFERED, kind="version")[:2]
    assert before.to == "checkpoint"
    soon = Trace(BUFFERED).entry(before.body["position"]).at
    at, other = (soon + 60, "checkpoint") if version.to == "record" else (soon, "record")
    change = {version.body["position"]: lambda entry: replace(entry, at=at)}
    output = found(tmp_path, change)
    assert f"message {seq} differs" in output
    assert f"to: '{version.to}' in the record, '{other}' in the replay" in output


def test_the_end_of_the_trace_holds_an_end():
    assert material.last_entry(BUFFERED).reason
