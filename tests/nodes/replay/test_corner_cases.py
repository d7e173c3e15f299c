"""Corner cases of a replay that were wrong once."""

import re

import pytest
import torch
from msgspec.structs import replace

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, Ended, Opened
from fedmq.broker.wire.encoding import encode_message
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.run.digests import digest_of
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
    silence,
)
from tests.nodes.replay.test_equal import torn
from tests.own_code import OWN_CODE

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_cut_off_right_before_the_last_message(name, tmp_path):
    finished = number(GOLDEN / name, 0, kind="finished")
    out = replay(rewrite(GOLDEN / name, tmp_path, until=finished - 1)).output
    assert "match the record\n" in out
    assert "1 more action than in the record" in out


@pytest.mark.parametrize(
    ("kind", "index"), [("task", 6), ("version", 0), ("task", 7), ("task", 9), ("version", 1)]
)
def test_until_an_own_message_compares_it(kind, index, tmp_path):
    seq = number(BUFFERED, index, kind=kind)
    folder = rewrite(BUFFERED, tmp_path, {seq: edit(body={"model_version": 9, "version": 9})})
    output = replay(folder, "--until", max(seq, number(BUFFERED, 1, kind="version")), code=1).output
    assert f"message {seq} differs" in output


def test_until_counts_no_fewer_actions():
    """Each message of the aggregator up to there, and each result that it refused."""
    version = number(BUFFERED, 1, kind="version")
    a = replay(BUFFERED, "--until", version).output
    own = [s for s, m in material.messages(BUFFERED, sender="aggregator") if s <= version]
    refused = [s for s in material.refusals(BUFFERED) if s <= version]
    assert f": all {len(own) + len(refused)} actions " in a, a


def test_a_dropped_refusal(tmp_path):
    seq = material.refusal(BUFFERED).seq
    output = replay(rewrite(BUFFERED, tmp_path, {seq: silence}), code=1).output
    assert "an action is not in the record" in output


def test_a_strange_id(tmp_path):
    seq = number(BUFFERED, 1, kind="version")
    output = replay(rewrite(BUFFERED, tmp_path, {seq: edit(id="hello")}), code=1).output
    assert f"message {seq} differs" in output


def test_bad_config_in_run_message(tmp_path):
    seq = number(BUFFERED, 0, kind="run")
    folder = rewrite(BUFFERED, tmp_path, {seq: edit(body={"config": "not [ toml"})})
    assert f"message {seq} differs" in replay(folder, code=1).output


@pytest.mark.parametrize(("key", "kind"), [("version", float), ("used", float), ("version", bool)])
def test_type_change(tmp_path, key, kind):
    """2.0 is not 2, and True is not 1."""
    seq, version = nth(BUFFERED, 0 if kind is bool else 1, kind="version")
    value = kind(version.body[key])
    assert value == version.body[key]
    output = replay(rewrite(BUFFERED, tmp_path, {seq: edit(body={key: value})}), code=1).output
    assert f"message {seq} differs" in output


def test_a_removed_digest(tmp_path):
    seq = number(BUFFERED, 1, kind="version")
    folder = rewrite(BUFFERED, tmp_path, {seq: material.without("model_digest")})
    assert f"message {seq} differs" in replay(folder, code=1).output


def test_an_early_end(tmp_path):
    entry = material.quiet(BUFFERED)
    end = Ended(seq=entry.seq, at=entry.at, run="simulated", reason="tired")
    output = replay(rewrite(BUFFERED, tmp_path, {entry.seq: end}), code=1).output
    assert f"entry {entry.seq} differs: the end of the run" in output


def test_early_end_cut(tmp_path):
    replay(
        rewrite(
            BUFFERED,
            tmp_path,
            until=number(BUFFERED, 14, kind="result"),
            more=[lambda s, a: Ended(seq=s, at=a, run="simulated", reason="tired")],
        ),
        code=1,
    )


def test_damaged_trace_reports_what_lies_before(tmp_path):
    folder, _segment, _ = torn(tmp_path)
    out = replay(folder, code=2)
    assert "match the record\n" in out.output, out.output


def test_damaged_trace_until_before_is_fine(tmp_path):
    folder, _segment, _ = torn(tmp_path)
    replay(folder, "--until", number(BUFFERED, 3, kind="version"))


def test_damaged_with_worker(tmp_path):
    """Tasks before the damage are trained again and compared with the record."""
    folder, _segment, _ = torn(tmp_path)
    _, answer = nth(BUFFERED, 0, sender="worker-0", kind="result")
    out = replay(folder, "--worker", "worker-0", code=2)
    assert re.search(rf"^{answer.re}, result in entry \d+: (same bytes|distance)", out.output), (
        out.output
    )


def test_older_config_lacks_a_new_setting(tmp_path):
    def old(text):
        return text.replace("weight_decay = 0.0\n", "")

    folder = rewrite(
        BUFFERED,
        tmp_path,
        {
            0: lambda e: replace(e, config=old(e.config)),
            number(BUFFERED, 0, kind="run"): lambda e: edit(
                body={"config": old(e.read().body["config"])}
            )(e),
        },
    )
    replay(folder)


def test_older_config_whatif(tmp_path):
    from fedmq.nodes.replay.whatif import changed_setup

    def old(text):
        return text.replace("weight_decay = 0.0\n", "")

    folder = rewrite(
        BUFFERED,
        tmp_path,
        {
            0: lambda e: replace(e, config=old(e.config)),
            number(BUFFERED, 0, kind="run"): lambda e: edit(
                body={"config": old(e.read().body["config"])}
            )(e),
        },
    )
    changed_setup(Trace(folder), ["schedule.size=2"], OWN_CODE)


def test_no_checkpoint_sentence(tmp_path):
    folder = rewrite(BUFFERED, tmp_path, until=number(BUFFERED, 0, kind="run") - 1)
    s = refused(folder, "--from-checkpoint")
    assert "there is no checkpoint" in s
    assert "None" not in s, s


def test_compare_steps_from_checkpoint(tmp_path):
    replay(BUFFERED, "--save", tmp_path)
    replay(BUFFERED, "--compare", tmp_path, "--from-checkpoint", code=2)


def test_compare_run_from_checkpoint(tmp_path):
    replay(BUFFERED, "--compare", BUFFERED, "--from-checkpoint", code=2)


def test_until_of_other_run(tmp_path):
    config = Trace(BUFFERED).opened.config
    m = replace(nth(BUFFERED, 0, kind="run")[1], run="other")
    last = material.last_entry(BUFFERED).seq
    more = [
        lambda s, a: Opened(seq=s, at=a, run="other", config=config, total_clients=6),
        lambda s, a: Accepted(seq=s, at=a, message=encode_message(m)),
    ]
    folder = rewrite(BUFFERED, tmp_path, more=more)
    out = replay(folder, "--run-id", "simulated", "--until", last + 2).output
    assert all_equal("fedavg-buffered") in out, out


@pytest.mark.parametrize(
    "body", [{"client": 2}, {"numbers": {"n": 999, "reply": "update"}}, {"model_version": 7}]
)
def test_other_device_hides_fields(tmp_path, body):
    R = GOLDEN / "fedavg-rounds"
    seq, a = material.messages(R, sender="worker-0", kind="result")[0]
    blob, data = scaled(R, seq, 1 + 1e-6)
    folder = rewrite(
        R,
        tmp_path,
        {seq: edit(blobs=(blob, *a.blobs[1:]), body={**body, "device": "x"})},
        blobs=[("worker-0", data)],
    )
    replay(folder, "--worker", "worker-0", "--task", a.re, code=1)


def test_other_device_counters(tmp_path):
    R = GOLDEN / "fedavg-rounds"
    seq, a = material.messages(R, sender="worker-0", kind="result")[0]
    blobs, data = material.counters_of(R, seq, 999)
    folder = rewrite(
        R,
        tmp_path,
        {seq: edit(blobs=blobs, body={"device": "x"})},
        blobs=[("worker-0", each) for each in data],
    )
    replay(folder, "--worker", "worker-0", "--task", a.re, code=1)


def test_other_device_no_weights(tmp_path):
    R = GOLDEN / "fedavg-rounds"
    seq, a = material.messages(R, sender="worker-0", kind="result")[0]
    folder = rewrite(R, tmp_path, {seq: edit(blobs=(), body={"groups": [], "device": "x"})})
    replay(folder, "--worker", "worker-0", "--task", a.re, code=1)


def test_other_device_undecodable(tmp_path):
    R = GOLDEN / "fedavg-rounds"
    seq, a = material.messages(R, sender="worker-0", kind="result")[0]
    folder = rewrite(R, tmp_path, {seq: edit(blobs=a.blobs[:-1], body={"device": "x"})})
    replay(folder, "--worker", "worker-0", "--task", a.re, code=1)


def test_aggregator_listed_as_node_with_results():
    s = refused(BUFFERED, "--worker", "x")
    assert "aggregator" not in s, s


@pytest.mark.parametrize("setting", ["schedule.foo=1", "algorithm.foo=1", "schedule.sise=2"])
def test_unknown_key_whatif(setting):
    assert "unknown key" in refused(BUFFERED, "--set", setting)


def test_what_if_with_metrics_of_text(tmp_path):
    seq, _m = material.messages(BUFFERED, kind="score")[1]
    folder = rewrite(
        BUFFERED, tmp_path, {seq: edit(body={"metrics": {"accuracy": "high", "loss": None}})}
    )
    assert "match the record\n" in replay(folder).output
    replay(folder, "--set", "schedule.size=2")


def test_digest_empty_tensor():
    assert digest_of(torch.zeros(0)) != digest_of(("torch.float32", [0]))


def test_digest_collision():
    A, B = 5, 6
    t = torch.tensor(list(b"[1"), dtype=torch.uint8)
    assert digest_of([[t, A], B]) != digest_of([[("torch.uint8", [2]), [A]], B])


def test_save_after_failure_leaves_no_file(tmp_path):
    version = number(BUFFERED, 1, kind="version")
    folder = rewrite(BUFFERED, tmp_path / "r", {version: edit(body={"used": 0})})
    replay(folder, "--save", tmp_path / "s", code=1)
    assert not (tmp_path / "s" / "steps.jsonl").exists()


def test_whatif_damage(tmp_path):
    folder, _segment, _ = torn(tmp_path)
    out = replay(folder, "--set", "schedule.size=2", code=2)
    assert "left: as recorded" in out.output, out.output


@pytest.mark.parametrize(
    ("which", "ch"),
    [
        (
            lambda: material.refusal(BUFFERED).seq,
            lambda e: replace(e, reason="\x1b[2Jhello\nworld"),
        ),
        (lambda: number(BUFFERED, 1, kind="version"), edit(to="x\x1b[2J")),
        (lambda: material.last_entry(BUFFERED).seq, lambda e: replace(e, reason="\x1b[2J")),
    ],
    ids=["refusal", "message", "end"],
)
def test_escape(tmp_path, which, ch):
    from fedmq.nodes.replay.record import Diverged

    seq = which()
    with pytest.raises(Diverged) as e:
        list(Replay(Trace(rewrite(BUFFERED, tmp_path, {seq: ch})), allowed=OWN_CODE).steps())
    assert "\x1b" not in str(e.value)


def test_compare_a_shorter_run_until(tmp_path):
    short = rewrite(BUFFERED, tmp_path, until=number(BUFFERED, 14, kind="result"))
    until = number(BUFFERED, 24, kind="result")
    output = replay(BUFFERED, "--compare", short, "--until", until, code=1).output
    assert "only this run continues" in output


def test_whatif_table_is_not_cut_by_a_width():
    narrow, wide = (
        replay(BUFFERED, "--set", "schedule.size=2", env={"COLUMNS": width}).output
        for width in ("30", "300")
    )
    assert narrow == wide
    assert max(map(len, narrow.split("\n"))) > 60


def test_scores_tell_their_device():
    assert "device" in material.messages(BUFFERED, kind="score")[0][1].body


def test_an_entry_behind_the_end_is_refused_with_the_number_of_the_last():
    last = list(Trace(BUFFERED).entries())[-1].seq
    for words in (["--until", last + 1], ["--until", 10**9, "--from-checkpoint"]):
        sentence = replay(BUFFERED, *words, code=2).stderr
        assert f"is not in the ledger: the last one is entry {last}" in sentence
    replay(BUFFERED, "--until", last)


def test_a_worker_and_a_task_that_are_not_there_are_refused_with_those_that_are():
    sentence = replay(BUFFERED, "--worker", "worker-99", code=2).stderr
    assert "--worker: expected a node with results (" in sentence
    assert sentence.endswith("got 'worker-99'\n")
    name = sentence.partition("(")[2].partition(",")[0]
    sentence = replay(BUFFERED, "--worker", name, "--task", "x", code=2).stderr
    assert f"--task: expected a task with a result from {name} (" in sentence
