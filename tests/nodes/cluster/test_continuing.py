"""Which commands resume the run in a folder, and which fail with which reason."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmq.algorithms.toolkit.arithmetic import ARITHMETIC
from fedmq.broker.ledger.entries import MESSAGES, Accepted, Ended, Opened, segment_path
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.cli.main import main
from fedmq.nodes.cluster.continuing import MAY_DIFFER, asking, continuation, differences
from fedmq.nodes.cluster.supervisor import worker_names
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.history.run import runs_of
from fedmq.nodes.run.config import Config, build, load
from fedmq.nodes.run.setup import completed, set_up
from fedmq.nodes.run_folder.folder import state_of, usable_config, write_config

GIVEN = {
    "run": {"id": "r", "versions": 10},
    "problem": {"clients": 4},
    "schedule": {"name": "rounds"},
}
BEGUN = 1_790_000_000.123456


def settings(**given: object) -> list[str]:
    """``run__versions=3`` as what stands behind --set."""
    return [f"{key.replace('__', '.')}={value}" for key, value in given.items()]


class Story:
    """A ledger, written entry by entry."""

    def __init__(self, folder: Path, config: Config | None = None) -> None:
        self.ledger = Ledger(folder / "ledger")
        self.at = BEGUN + 1
        text = completed(config or build(GIVEN)).to_toml()
        self.add(Opened, run="r", config=text, total_clients=4)
        self.say("run", config=text, arithmetic=ARITHMETIC)

    def add(self, kind, **fields) -> int:
        self.ledger.append(kind(seq=self.ledger.next_seq, at=self.at, **fields))
        return self.ledger.next_seq - 1

    def say(self, kind: str, sender: str = "aggregator", re: str | None = None, **body) -> int:
        """Accept a message; return its number."""
        name = f"{sender}/{body.pop('id', self.ledger.next_seq)}"
        to = "aggregator" if kind in ("result", "continued") else "record"
        to = f"client/{body['client']}" if kind == "task" else to
        about = {"kind": kind, "id": name, "run": "r", "sender": sender, "to": to}
        return self.add(Accepted, message=encode_message(Message(**about, body=body, re=re)))

    def versions(self, number: int) -> None:
        for version in range(1, number + 1):
            counts = {"results": 1, "position": 0, "mean_staleness": 0.0}
            self.say("version", version=version, model_digest="d", **counts)

    def accuracy(self, value: float) -> None:
        joined = {"node": "evaluator", "role": "evaluator", "session": "s", "clients": []}
        self.say("joined", "broker", **joined)
        self.say("evaluate", model_version=1)
        about = {"kind": "evaluate", "id": "aggregator/e", "run": "r", "sender": "aggregator"}
        message = Message(**about, to="evaluator", body={"model_version": 1})
        self.add(Accepted, message=encode_message(message))
        self.say("score", "evaluator", "aggregator/e", metrics={"accuracy": value})

    def close(self, ended: str = "", **about: bool) -> None:
        if ended:
            self.say("finished", reason=ended, **about)
            self.add(Ended, run="r", reason=ended)
        self.ledger.close()


def begun(folder: Path, versions: int = 4, ended: str = "", accuracy: float | None = None) -> Path:
    """A run's folder as its supervisor leaves it."""
    folder.mkdir(parents=True)
    write_config(folder, completed(build(GIVEN)), BEGUN)
    story = Story(folder)
    story.versions(versions)
    if accuracy is not None:
        story.accuracy(accuracy)
    story.close(ended)
    return folder


def asked(folder: Path | None, file: Path | None = None, **given: object):
    with asking(file, settings(**given), folder, time.time()) as found:
        return found


def goes_on(folder: Path, file: Path | None = None, **given: object):
    return continuation(asked(folder, file, **given))


SAME = {"run__versions": 10, "problem__clients": 4, "schedule__name": "rounds"}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[run]\nversions = 10\n[problem]\nclients = 4\n[schedule]\nname = "rounds"\n')
    return path


def test_the_same_command_resumes_with_a_file_with_settings_and_with_the_folder_alone(
    tmp_path, file
) -> None:
    folder = begun(tmp_path / "run")
    for found in (goes_on(folder), goes_on(folder, file), goes_on(folder, **SAME)):
        assert found is not None
        assert (found.run, found.further) == ("r", False)
        assert found.config == completed(build(GIVEN)).to_toml()
    assert asked(folder).begun == BEGUN


def test_what_is_resumed_is_what_the_aggregator_records_of_itself(tmp_path) -> None:
    """Else its broker would take it for one of another configuration."""
    folder = begun(tmp_path / "run")
    found = goes_on(folder, worker__threads=2, run__target_accuracy=0.9)
    assert found is not None
    from fedmq.nodes.run.config import parse

    assert set_up(parse(found.config)).config.to_toml() == found.config


def test_values_that_belong_to_this_host_may_differ(tmp_path) -> None:
    folder = begun(tmp_path / "run")
    more = {"worker__count": 7, "worker__drop": 0.5, "broker__bind": "tcp://127.0.0.1:9"}
    found = goes_on(folder, **more, broker__lease_s=3.0)
    assert found is not None
    assert not found.further
    assert "count = 7" in found.config


def test_a_simulation_may_differ_but_not_what_clients_train(tmp_path) -> None:
    folder = begun(tmp_path / "run")
    found = goes_on(folder, simulation__compute=3.0, simulation__latency="uniform(0, 1)")
    assert found is not None
    assert "compute = 3.0" in found.config
    with pytest.raises(ConfigError, match=r"^simulation\.learner: expected 'train', as in run r"):
        goes_on(folder, simulation__learner="curve")


def test_the_table_in_the_docs_is_the_one_that_is_used() -> None:
    text = (Path(__file__).parents[3] / "docs/configuration.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+?)(?:\.\*)?`.* \| (goal|here) \|", text, re.MULTILINE)
    assert dict(rows) == MAY_DIFFER


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"run__seed": 3}, "run.seed expected 0, got 3"),
        ({"run__checkpoint_s": 2}, "run.checkpoint_s expected 1.0, got 2.0"),
        ({"algorithm__lr": 0.1}, "algorithm.lr expected 0.05, got 0.1"),
        ({"algorithm__name": "fedprox"}, "algorithm.name expected 'fedavg', got 'fedprox'"),
        ({"schedule__name": "stream"}, "schedule.name expected 'rounds', got 'stream'"),
        ({"problem__clients": 5}, "problem.clients expected 4, got 5"),
        ({"problem__examples": 50}, "problem.examples expected not set, got 50"),
        ({"schedule__deadline_s": 4}, "schedule.deadline_s expected none, got 4.0"),
        ({"codec__up": "cast(float16)"}, "codec.up expected 'raw', got 'cast(float16)'"),
        ({"run__id": "other"}, "run.id"),
    ],
)
def test_others_are_refused_by_name_with_both_values(tmp_path, given, expected) -> None:
    folder = begun(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        goes_on(folder, **given)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_that_differs_is_named_at_once_and_an_own_number_may_be_written_as_one_likes(
    tmp_path,
) -> None:
    folder = begun(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run\.seed.*; .*algorithm\.lr"):
        goes_on(folder, run__seed=3, algorithm__lr=0.1, worker__count=3)
    assert goes_on(folder, schedule__over_select=1, run__checkpoint_s=1) is not None
    one, other = build(GIVEN), build({**GIVEN, "problem": {"clients": True}})
    assert differences(one, other)


def test_more_or_fewer_versions_may_be_asked_for_as_long_as_they_are_ahead(tmp_path) -> None:
    folder = begun(tmp_path / "run", versions=4)
    for versions in (4, 5, 100):
        found = goes_on(folder, run__versions=versions)
        assert found is not None
        assert found.further
    with pytest.raises(
        ConfigError, match=r"run\.versions: expected at least 4, which run r .*got 3"
    ):
        goes_on(folder, run__versions=3)


def test_a_run_that_has_ended_goes_further_only_if_more_is_asked_for(tmp_path) -> None:
    folder = begun(tmp_path / "run", versions=10, ended="10 versions committed")
    assert goes_on(folder) is None
    assert goes_on(folder, worker__count=2) is None
    found = goes_on(folder, run__versions=11)
    assert found is not None
    assert found.further
    with pytest.raises(ConfigError, match=r"expected at least 10, .* already has, got 9"):
        goes_on(folder, run__versions=9)


def test_a_run_that_ended_before_it_reached_its_goal_resumes_when_it_is_asked_for_again(
    tmp_path,
) -> None:
    found = goes_on(begun(tmp_path / "run", versions=4, ended="nothing succeeded"))
    assert found is not None
    assert found.further


def test_a_target_that_was_reached_ends_it_and_another_one_must_be_ahead(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    given = {**GIVEN, "run": {**GIVEN["run"], "target_accuracy": 0.5}}
    write_config(folder, completed(build(given)), BEGUN)
    story = Story(folder, build(given))
    story.versions(4)
    story.accuracy(0.625)
    story.close("accuracy 0.6250 reached the target of 0.5")
    assert goes_on(folder) is None
    for more in ({"run__target_accuracy": 0.6}, {"run__versions": 20}):
        with pytest.raises(ConfigError, match=r"run\.target_accuracy: expected more than 0\.6250"):
            goes_on(folder, **more)
    for more in ({"run__target_accuracy": 0.7}, {"run__target_accuracy": "none"}):
        assert goes_on(folder, **more) is not None


@pytest.mark.parametrize(
    ("limit", "raised"),
    [({"patience": 2}, {"run__patience": 3}), ({"max_wall_s": 1.0}, {"run__max_wall_s": 50.0})],
)
def test_a_limit_that_ended_a_run_must_be_raised(tmp_path, limit, raised) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    given = {**GIVEN, "run": {**GIVEN["run"], **limit}}
    write_config(folder, completed(build(given)), BEGUN)
    story = Story(folder, build(given))
    story.versions(4)
    for accuracy in (0.5, 0.25, 0.5):
        story.accuracy(accuracy)
    story.at += 3.0
    story.close("the limit")
    assert goes_on(folder) is None
    (key,) = limit
    with pytest.raises(ConfigError, match=rf"run\.{key}: expected more than run r in .* has used"):
        goes_on(folder, run__versions=20)
    for more in (raised, {f"run__{key}": "none"}):
        found = goes_on(folder, **more)
        assert found is not None
        assert found.further


@pytest.mark.parametrize(
    "stopped",
    [
        ["config.toml"],
        ["config.toml", "ledger/"],
        ["config.toml", "ledger/", "ledger/lock", "broker.log"],
        ["ledger/"],
        ["config.toml.new"],
        ["cluster.log", "config.toml.new"],
        ["cluster.log"],
        ["config.toml", "config.toml.new"],
    ],
)
def test_a_run_that_was_stopped_at_its_very_beginning_begins(tmp_path, stopped, file) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in stopped:
        if name.endswith("/"):
            (folder / name).mkdir()
        elif name == "config.toml":
            write_config(folder, completed(build(GIVEN)), BEGUN)
        else:
            (folder / name).touch()
    found = asked(folder, file, algorithm__lr=0.5)  # nothing was learned: it may be another one
    assert found.recorded is None
    assert found.begun != BEGUN
    assert found.config.run.id == ("r" if "config.toml" in stopped else found.config.run.id) != ""


@pytest.mark.parametrize("text", ["", '[run]\nid = "old"\nseed = 0\nvers'])
def test_half_a_file_of_the_release_before_is_taken_for_what_it_is(tmp_path, text, file) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(text)
    assert asked(folder, file).config.run.id
    Story(folder).close()
    assert goes_on(folder, file) is not None
    assert goes_on(folder) is not None, "its ledger has the configuration, too"


def test_a_run_of_a_release_that_computed_otherwise_is_left_as_it_is(tmp_path) -> None:
    traces = Path(__file__).parents[2] / "golden" / "traces"
    old = shutil.copytree(traces / "0.1.0" / "fedavg-rounds", tmp_path / "old")
    assert goes_on(old) is None, "it has ended"
    with pytest.raises(NodeError, match="started by a release of fedmq that computes differently"):
        goes_on(old, run__versions=40)


def test_code_that_only_a_ledger_names_is_not_run(tmp_path) -> None:
    traces = Path(__file__).parents[2] / "golden" / "traces"
    folder = shutil.copytree(traces / "0.2.0" / "fedavg-buffered", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no usable config\.toml.*tests\.golden\.points:Points"):
        goes_on(folder, run__versions=40)


def test_a_cut_ledger_is_read_up_to_there(tmp_path) -> None:
    folder = begun(tmp_path / "run", versions=3)
    path = segment_path(folder / "ledger", MESSAGES, 0)
    os.truncate(path, path.stat().st_size - 5)
    found = asked(folder)
    assert found.recorded is not None
    assert found.recorded.version == 2
    os.truncate(path, 3)  # all of it is torn
    assert asked(folder).recorded is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["thesis.tex"], "contains thesis.tex"),
        (["a", "b", "c", "d"], r"contains a, b, c, \.\.\."),
        (["summary.json"], "contains summary.json"),
        (["config.toml"], "contains config.toml"),
        (["ledger/", "ledger/accounts.xls"], "contains ledger"),
        (["nodes/"], "contains nodes"),
    ],
)
def test_a_folder_that_is_something_else_is_left_alone(tmp_path, names, expected) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_text("[tool.mine]\nkey = 1\n")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=expected):
        asked(folder)
    assert sorted(folder.rglob("*")) == before


def test_what_is_no_folder_is_refused_and_a_new_one_leaves_nothing_behind(tmp_path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="expected a folder"):
            asked(path)
    with asking(None, [], tmp_path / "new" / "run", 0.0):
        assert (tmp_path / "new" / "run").is_dir()
    assert not (tmp_path / "new").exists()


def test_the_id_names_the_folder_if_nothing_else_does(tmp_path, monkeypatch, file) -> None:
    monkeypatch.chdir(tmp_path)
    begun(tmp_path / "runs" / "r")
    assert asked(None, file, run__id="r").recorded is not None
    assert asked(None, run__id="r").recorded is not None
    new = asked(None, file)
    assert new.recorded is None
    assert new.folder == Path("runs") / new.config.run.id
    with pytest.raises(ConfigError, match=r"run\.id: expected r, the run in .*, got s"):
        asked(tmp_path / "runs" / "r", file, run__id="s")


@pytest.mark.parametrize("old", [False, True], ids=["its id in a comment", "of 0.1.0"])
def test_a_runs_own_file_begins_another_run(tmp_path, monkeypatch, old) -> None:
    monkeypatch.chdir(tmp_path)
    folder = begun(tmp_path / "runs" / "r")
    own = folder / "config.toml"
    if old:
        own.write_text(completed(build(GIVEN)).to_toml())
        assert load(own).run.id == "r"
    new = asked(None, own)
    assert new.recorded is None
    assert new.config.run.id not in ("", "r")
    assert completed(new.config).algorithm == completed(build(GIVEN)).algorithm
    assert goes_on(folder, own) is not None
    assert goes_on(folder) is not None
    assert asked(None, own, run__id="r").recorded is not None


@pytest.mark.parametrize("more", [{}, {"simulation": {"compute": 2.0}}])
def test_the_configuration_in_a_folder_is_used_with_or_without_optional_tables(tmp_path, more):
    write_config(tmp_path, build({**GIVEN, **more}), BEGUN)
    assert usable_config(tmp_path) == tmp_path / "config.toml"
    # A run that ended before its ledger began keeps its settings and its own code.
    assert asked(tmp_path).config.run.versions == GIVEN["run"]["versions"]


def test_a_configuration_file_is_old_or_new_whatever_happens(tmp_path, monkeypatch) -> None:
    write_config(tmp_path, build(GIVEN), BEGUN)
    before = (tmp_path / "config.toml").read_text()
    assert '# run.id = "r"\n' in before
    assert load(tmp_path / "config.toml").run.id == ""

    def fails(_number: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ConfigError, match=r"cannot write .*config\.toml: input/output error"):
        write_config(tmp_path, build({**GIVEN, "run": {"versions": 3}}), BEGUN)
    assert (tmp_path / "config.toml").read_text() == before


HOLD = (
    "import sys, time\nfrom pathlib import Path\n"
    "from fedmq.{module} import {name}\n"
    "with {call}:\n    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("fedmq command", ("nodes.run_folder.folder", "held", "held(Path(sys.argv[1]))")),
        (
            "broker",
            (
                "broker.ledger.writer",
                "Ledger",
                "__import__('contextlib').closing(Ledger(Path(sys.argv[1]) / 'ledger'))",
            ),
        ),
    ],
)
def test_a_folder_that_another_process_uses_is_refused_at_once_with_its_number(
    tmp_path, what, code
) -> None:
    folder = begun(tmp_path / "run")
    module, name, call = code
    program = HOLD.format(module=module, name=name, call=call)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"in use by another {what}, process {process.pid}"):
            asked(folder)
        assert time.monotonic() - start < 2
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert asked(folder).recorded is not None


def test_where_files_cannot_be_locked_nothing_is_refused(tmp_path, monkeypatch) -> None:
    def no_locks(_file: int, _how: int) -> None:
        raise OSError(37, "No locks available")

    folder = begun(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert asked(folder).recorded is not None


def test_several_runs_in_one_ledger_are_a_brokers(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    story = Story(folder)
    story.add(Opened, run="q", config="[run]", total_clients=1)
    story.close()
    with pytest.raises(ConfigError, match=r"one run, .* has r, q"):
        asked(folder)


def test_what_an_end_left_in_hand_is_in_no_version_that_comes_later(tmp_path) -> None:
    """And the time for which nobody ran the run is not the run's."""
    story = Story(tmp_path)
    joined = {"node": "w", "role": "worker", "session": "s", "clients": [[0, 1]]}
    story.say("joined", "broker", **joined)
    for client in (0, 1):
        story.say("task", client=client, model_version=0, id=f"t{client}")
    counts = {"results": 1, "mean_staleness": 0.0, "max_staleness": 0, "model_digest": "d"}
    first = story.say("result", "w", "aggregator/t0", client=0, model_version=0)
    story.say("version", version=1, position=first, **counts)
    story.say("result", "w", "aggregator/t1", client=1, model_version=0)
    story.say("finished", reason="done")
    story.add(Ended, run="r", reason="done", nodes={"w": {"sent_bytes": 5, "received_bytes": 7}})
    config = completed(build({**GIVEN, "run": {"versions": 11}})).to_toml()
    story.at += 500.0
    more = story.say("continued", "broker", config=config, further=True, stopped_s=499.0)
    story.say("version", version=2, position=more, **counts)
    story.say("finished", reason="more")
    story.add(Ended, run="r", reason="more", nodes={"w": {"sent_bytes": 6, "received_bytes": 8}})
    story.close()
    history = runs_of(read_entries(tmp_path / "ledger"), BEGUN)["r"]
    assert (history.ended, history.version, history.config) == ("more", 2, config)
    assert history.wall_s == pytest.approx(2.0)
    assert (history.wire_down, history.wire_up) == (11, 15)
    found = history.outcomes
    assert (found.results, found.used, found.unused) == (2, 2, 0)
    assert [found.clients[client].good for client in (0, 1)] == [1, 0]
    assert not history.nodes["w"].here
    assert found.staleness.total() == 1


def runs_found(folder):
    return [*runs_of(read_entries(folder / "ledger")).values()]


def test_a_broker_reports_what_it_finds_and_what_it_waits_for(tmp_path) -> None:
    assert state_of([], once=True) == "no run yet, waiting for an aggregator"
    runs = runs_found(begun(tmp_path / "one", versions=4))
    assert state_of(runs, once=True) == "run r at version 4, waiting for its aggregator"
    ended = runs_found(begun(tmp_path / "two", ended="done"))
    assert state_of(ended, once=False) == "run r has ended; waiting for new runs"
    assert state_of(ended, once=True) == "run r has ended; nothing left to do"
    assert state_of(runs * 9, once=False).endswith("; 4 more runs")


def test_a_run_that_has_ended_is_shown_and_nothing_is_started(tmp_path) -> None:
    folder = begun(tmp_path / "run", versions=10, ended="10 versions committed", accuracy=0.5)
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(main, ["cluster", "--run", str(folder)])
    assert result.exit_code == 0, result.output
    assert "10 versions committed" in result.output
    assert "run r has ended" in result.output
    assert json.loads((folder / "summary.json").read_text())["versions"] == 10
    assert set(folder.rglob("*")) - set(before) == {folder / "summary.json"}


def test_a_run_that_failed_after_its_last_version_is_shown_with_the_exit_code_1(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, completed(build(GIVEN)), BEGUN)
    story = Story(folder)
    story.versions(10)
    story.close("fedavg raised ValueError", failed=True)
    result = CliRunner().invoke(main, ["cluster", "--run", str(folder)])
    assert (result.exit_code, "failed" in result.output) == (1, True), result.output


def test_a_broker_for_a_run_that_has_ended_ends_at_once_with_its_summary(tmp_path) -> None:
    folder = begun(tmp_path / "run", versions=10, ended="10 versions committed")
    command = ["broker", "--run", str(folder), "--bind", "tcp://127.0.0.1:0", "--once"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "run r has ended; nothing left to do" in result.output
    assert json.loads((folder / "summary.json").read_text())["ended"] == "10 versions committed"


def test_a_wrong_configuration_for_a_run_is_one_sentence(tmp_path) -> None:
    folder = begun(tmp_path / "run")
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(main, ["cluster", "--run", str(folder), "--set", "run.seed=9"])
    assert result.exit_code == 2
    assert "run.seed expected 0, got 9" in result.output
    assert sorted(folder.rglob("*")) == before


def test_only_workers_that_there_are_have_values_of_their_own() -> None:
    def named(name: str, count: int, clients: int = 40) -> list[str]:
        worker = {"count": count, "nodes": {name: {"slowdown": 4.0}}}
        return worker_names(build({"worker": worker}), clients)

    assert named("worker-3", 4) == ["worker-0", "worker-1", "worker-2", "worker-3"]
    for name, count, clients, there in (
        ("worker-9", 4, 40, "worker-0 to worker-3"),
        ("worker-3", 4, 2, "worker-0 to worker-1"),
        ("evaluator", 1, 40, "worker-0"),
    ):
        with pytest.raises(ConfigError, match=f"expected {there}, got {name!r}"):
            named(name, count, clients)
