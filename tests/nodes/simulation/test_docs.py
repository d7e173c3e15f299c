"""docs/simulation.md: its configuration and its commands work."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmq.nodes.cli.main import main

TEXT = (Path(__file__).parents[3] / "docs" / "simulation.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line.removeprefix("$ "), comments=True)
    for _, text in BLOCKS
    for line in text.splitlines()
    if line.startswith(("fedmq ", "$ fedmq "))
]
SIMULATIONS = [each for each in COMMANDS if each[:2] == ["fedmq", "simulate"]]
TABLES = [text for kind, text in BLOCKS if kind == "toml"]
QUICK = ("--set", "simulation.learner=curve", "--set", "run.versions=2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "phones.toml").write_text(TABLES[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fedmq(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize("command", SIMULATIONS, ids=shlex.join)
def test_each_simulation_of_the_page_runs(folder, command) -> None:
    result = fedmq(*command[1:], *QUICK)
    assert result.exit_code == 0, result.output
    assert "2 versions committed" in result.output


def test_the_other_schedule_of_the_page_runs(folder) -> None:
    rounds = re.sub(r"\[schedule\].*?\n\n", f"{TABLES[1]}\n", TABLES[0], flags=re.DOTALL)
    (folder / "rounds.toml").write_text(rounds.replace("phones", "rounds"))
    result = fedmq("simulate", "rounds.toml", *QUICK)
    assert result.exit_code == 0, result.output
    assert "fedavg, rounds" in result.output


def test_the_other_commands_of_the_page_work_on_its_run(folder) -> None:
    assert fedmq("simulate", "phones.toml", *QUICK).exit_code == 0
    others = [each[1:] for each in COMMANDS if each[1] in ("trace", "replay", "list")]
    assert len(others) >= 3
    for command in others:
        result = fedmq(*command)
        assert result.exit_code == 0, (command, result.output)
