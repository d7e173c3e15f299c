"""Options and keys that have a new name: the old one works, is hidden, and prints one line."""

import json

import pytest
from click.testing import CliRunner

from fedmq.broker import router
from fedmq.broker.inspection.trace import Trace
from fedmq.nodes.cli.main import main
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run import toml
from fedmq.nodes.run.config import build, changed, load, parse
from tests.nodes.replay.material import BUFFERED, replay

NOTICE = "fedmq: {} is now {}; the old name works in this release only\n"
OPTIONS = [
    (["broker"], "--offer-parked", "--redeliver-dead-letters"),
    (["replay"], "--against", "--compare"),
    (["trace", "ls"], "--refused", "--rejected"),
]


@pytest.fixture(autouse=True)
def _first_notice():
    toml._print_notice.cache_clear()


@pytest.mark.parametrize(("command", "old", "new"), OPTIONS)
def test_the_help_has_only_the_new_name(command, old, new):
    shown = CliRunner().invoke(main, [*command, "--help"]).output
    assert new in shown
    assert old not in shown


@pytest.mark.parametrize("option", ["--offer-parked", "--redeliver-dead-letters"])
def test_dead_letters_are_redelivered_under_either_name(monkeypatch, tmp_path, option):
    class Started(Exception):
        pass

    def start(binds, folder, settings, ledger_settings, **more):
        assert ledger_settings.redeliver_dead_letters
        raise Started

    monkeypatch.setattr(router, "BrokerServer", start)
    result = CliRunner().invoke(main, ["broker", "--run", str(tmp_path), option])
    assert isinstance(result.exception, Started)
    notice = NOTICE.format("--offer-parked", "--redeliver-dead-letters")
    assert result.stderr == (notice if option == "--offer-parked" else "")


def test_a_saved_state_is_compared_under_either_name(tmp_path):
    replay(BUFFERED, "--save", tmp_path)
    new = replay(BUFFERED, "--compare", tmp_path)
    for words in (["--against", tmp_path], [f"--against={tmp_path}"]):
        old = replay(BUFFERED, *words)
        assert old.stderr == NOTICE.format("--against", "--compare")
        assert old.stdout.splitlines()[:2] == new.stdout.splitlines()[:2]
    assert new.stderr == ""


def test_an_old_name_behind_two_dashes_is_no_option(tmp_path):
    result = CliRunner().invoke(main, ["trace", "ls", "--", "--refused"])
    assert result.exit_code == 2
    assert "is now" not in result.stderr


def test_a_file_of_state_digests_of_an_older_release_is_compared(tmp_path):
    """It names the parts of the state as that release did; others are not compared."""
    parts = {"position": -1, "version": 0, "weights": 0.0, "results": 0, "staleness": "[]"}
    parts |= {"held": "[]", "evaluating": "[]", "waiting": "[]", "next_id": 1, "other": "x"}
    counts = "Counts(used=0, stale=0, refused=0, dropped=0, unused=0)"
    lines = [
        {"run": "simulated", "opened": Trace(BUFFERED).opened.at},
        {"seq": -1, "parts": {**parts, "counts": counts}},
        {"seq": 2, "parts": {**parts, "position": 2, "counts": counts}},
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    replay(BUFFERED, "--compare", tmp_path)
    file.write_text(file.read_text().replace('"next_id": 1', '"next_id": 2'))
    output = replay(BUFFERED, "--compare", tmp_path, code=1).output
    assert "next_id: 2 saved, 1 now" in output


def test_a_key_works_under_its_old_name_with_one_line(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("[broker]\nbeat_s = 0.5\nlease_s = 2\n")
    assert load(file).broker.heartbeat_s == 0.5
    assert load(file, ["broker.beat_s=0.25"]).broker.heartbeat_s == 0.25
    assert build({"broker": {"beat_s": 0.75}}).broker.heartbeat_s == 0.75
    assert capsys.readouterr().err == NOTICE.format("broker.beat_s", "broker.heartbeat_s")
    file.write_text("[broker]\nheartbeat_s = 0.5\n")
    assert load(file).broker.heartbeat_s == 0.5
    assert capsys.readouterr().err == ""


def test_a_recorded_configuration_may_have_the_old_name(tmp_path, capsys):
    text = load(None).to_toml().replace("heartbeat_s = 1.0", "beat_s = 0.5")
    assert parse(text).broker.heartbeat_s == 0.5
    assert changed(parse(text), ["run.seed=1"]).broker.heartbeat_s == 0.5
    file = tmp_path / "config.toml"
    file.write_text(text)
    assert load(file, recorded=True).broker.heartbeat_s == 0.5
    assert capsys.readouterr().err == ""


def test_a_key_under_both_names_is_an_error():
    expected = r"^broker.beat_s is the old name of broker.heartbeat_s: expected one of them, got "
    with pytest.raises(ConfigError, match=expected):
        build({"broker": {"beat_s": 1.0, "heartbeat_s": 1.0}})
