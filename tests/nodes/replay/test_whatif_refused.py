"""``--set``: settings that cannot be computed from recorded results, and invalid runs."""

import pytest

from tests.nodes.replay import material
from tests.nodes.replay.material import BUFFERED, refused, replay


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("problem.clients=3", "other data"),
        ("problem.name=tests.sim.tally:Vector", "other data"),
        ("algorithm.lr=0.1", "would have sent other results"),
        ("algorithm.epochs=9", "would have sent other results"),
        ("algorithm.name=fedprox", ""),
        ("schedule.concurrency=9", "other clients would have been given tasks"),
        ("schedule.name=rounds", ""),
        ("codec.up=raw", "encoded differently"),
        ("codec.down=cast(float16)", "encoded differently"),
        ("run.seed=1", ""),
        ("run.versions=3", ""),
        ("worker.slowdown=2.0", ""),
        ("worker.threads=2", ""),
        ("broker.lease_s=1.0", ""),
    ],
)
def test_a_change_under_which_the_results_mean_nothing_is_refused(setting, reason):
    sentence = refused(BUFFERED, "--set", setting)
    key = setting.partition("=")[0]
    assert sentence.startswith(
        f"fedmq: --set {key}: cannot be computed from the recorded results: "
    )
    assert reason in sentence
    assert "algorithm.server_lr" in sentence
    assert "schedule.size" in sentence


def test_one_refused_key_among_others_is_refused():
    sentence = refused(BUFFERED, "--set", "schedule.size=2", "--set", "run.seed=1")
    assert "run.seed" in sentence


@pytest.mark.parametrize("setting", ["run.foo=1", "codec.sideways=raw", "nonsense.key=1"])
def test_an_unknown_key_is_refused(setting):
    assert "unknown key" in refused(BUFFERED, "--set", setting)


@pytest.mark.parametrize(
    "setting",
    [
        "schedule.size=0",
        "schedule.size=many",
        "schedule.staleness=exponential(1)",
        "schedule.staleness=polynomial(-1)",
        "schedule.max_staleness=-1",
        "algorithm.server_lr=0",
    ],
)
def test_a_bad_value_is_refused_with_its_key(setting):
    assert setting.partition("=")[0] in refused(BUFFERED, "--set", setting)


@pytest.mark.parametrize("setting", ["size=2", "schedule=2", "schedule.size", "=", ".size=1"])
def test_what_is_no_setting_is_refused(setting):
    assert "--set" in refused(BUFFERED, "--set", setting)


def test_a_tampered_run_is_no_ground_for_a_what_if(tmp_path):
    seq = material.number(BUFFERED, 1, kind="version")
    changed = {seq: material.edit(body={"model_digest": "0" * 32})}
    folder = material.rewrite(BUFFERED, tmp_path, changed)
    assert f"message {seq} differs" in replay(folder, "--set", "schedule.size=2", code=1).output


def test_a_run_that_was_cut_off_has_its_curve_so_far(tmp_path):
    last = material.number(BUFFERED, 0, kind="version", body={"version": 4})
    folder = material.rewrite(BUFFERED, tmp_path, until=last)
    evaluated = [seq for seq, _ in material.messages(BUFFERED, kind="evaluate") if seq <= last]
    output = replay(folder, "--set", "schedule.size=2").output
    assert len(evaluated) == 2
    assert len(output.strip().split("\n")) == 2 + len(evaluated) + 1
