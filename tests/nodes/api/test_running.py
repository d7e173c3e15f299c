"""``fedmq.run`` and ``fedmq.simulate``: what they start, and what they raise."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fedmq
from fedmq.nodes.api import running
from fedmq.nodes.api.running import printer

PROBLEM = """
import torch
from torch import nn
from fedmq import Examples, Problem

class Points(Problem):
    def __init__(self, clients=4, seed=0, faulty=False):
        self.clients, self.seed, self.faulty = clients, seed, faulty
    def model(self):
        return nn.Linear(2, 2)
    def client(self, index):
        return self.draw(index)
    def test(self):
        return self.draw(1000)
    def loss(self, outputs, y):
        if self.faulty:
            raise ValueError("no loss today")
        return nn.functional.cross_entropy(outputs, y)
    def metrics(self, outputs, y):
        return {"accuracy": (outputs.argmax(1) == y).float().mean(), "version": 1.0}
    def draw(self, seed):
        x = torch.randn(50, 2, generator=torch.Generator().manual_seed(seed))
        return Examples(x, (x.sum(1) > 0).long())
"""


class Command:
    """Stands in for `ChildCommand`: makes the folder that a command would make."""

    code, reason = 0, ""
    made: "list[Command]" = []  # noqa: RUF012 - the tests read it
    source: Path | None = None

    def __init__(self, arguments, text, on_line) -> None:
        self.arguments, self.text = arguments, text
        type(self).made.append(self)
        on_line("a line")

    def wait(self) -> int:
        folder = Path(self.arguments[self.arguments.index("--run") + 1])
        if self.source is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(self.source)
        return self.code


@pytest.fixture
def command(monkeypatch, tmp_path: Path, folder: Path) -> type[Command]:
    monkeypatch.chdir(tmp_path)
    fresh = type("Fresh", (Command,), {"made": [], "source": folder})
    monkeypatch.setattr(running, "ChildCommand", fresh)
    return fresh


def test_a_new_run_gets_an_id_and_a_folder_of_that_name(command, tmp_path: Path) -> None:
    run = fedmq.run({"run.versions": 3}, workers=2)
    (made,) = command.made
    assert made.arguments[:3] == ["cluster", "-", "--run"]
    assert made.arguments[4:] == ["--workers", "2"]
    assert run.folder.parent == tmp_path / "runs"
    assert f'id = "{run.folder.name}"' in made.text
    assert "versions = 3" in made.text


def test_a_run_of_a_name_or_in_a_folder(command, tmp_path: Path) -> None:
    assert fedmq.run({"run.id": "mine"}).folder == tmp_path / "runs" / "mine"
    assert fedmq.run({}, folder="here").folder == tmp_path / "here"
    assert "id =" not in command.made[1].text


def test_simulate_passes_its_options_on(command) -> None:
    fedmq.simulate({}, clients=100, processes=2, folder="s", on="ray", settings={"run.seed": 3})
    (made,) = command.made
    assert made.arguments == [
        *("simulate", "-", "--run", "s"),
        *("--clients", "100", "--processes", "2", "--on", "ray"),
    ]
    assert "seed = 3" in made.text


def test_a_bad_configuration_starts_nothing(command) -> None:
    with pytest.raises(fedmq.ConfigError, match=r"unknown key 'run\.sede'"):
        fedmq.run({"run.sede": 1})
    assert command.made == []


def test_bad_input_that_the_command_finds_is_the_same_error(command) -> None:
    command.code, command.reason = 2, "algorithm.lr: expected a number above 0, got -1"
    with pytest.raises(fedmq.ConfigError, match=r"^algorithm\.lr: expected a number above 0"):
        fedmq.run({"algorithm.lr": -1})


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, "out of luck"), (130, "a signal stopped it"), (-9, "signal 9 killed it; .* out of luck")],
)
def test_a_failed_run_is_an_error_with_the_run(command, code: int, reason: str) -> None:
    command.code, command.reason = code, "out of luck"
    with pytest.raises(fedmq.RunFailed, match=reason) as caught:
        fedmq.run({})
    assert isinstance(caught.value.run, fedmq.Run)
    command.source = None
    with pytest.raises(fedmq.RunFailed) as caught:
        fedmq.run({})
    assert caught.value.run is None


def test_progress_goes_to_standard_error_only_if_somebody_sees_it(command, capsys) -> None:
    fedmq.run({}, folder="a")
    fedmq.run({}, folder="b", progress=True)
    fedmq.run({}, folder="c", progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "a line\n")


def test_a_line_that_the_terminal_cannot_show_is_escaped(monkeypatch, tmp_path: Path) -> None:
    with (tmp_path / "ascii").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        printer(progress=True)("ü")
    assert (tmp_path / "ascii").read_text() == "\\xfc\n"


@pytest.mark.end_to_end
def test_a_script_without_a_main_guard_runs_from_another_folder(tmp_path: Path) -> None:
    """Its module is beside it; a run that fails does not end the script."""
    code, elsewhere = tmp_path / "code", tmp_path / "elsewhere"
    code.mkdir()
    elsewhere.mkdir()
    (code / "my_problem.py").write_text(PROBLEM)
    (code / "script.py").write_text(
        textwrap.dedent("""
            import sys
            import fedmq

            assert "torch" not in sys.modules
            config = {"problem.name": "my_problem:Points", "run.versions": 4, "run.id": "a"}
            config["run.evaluate_every"] = 2
            run = fedmq.run(config, workers=2)
            print(run.status, run.curve["version"].tolist(), list(run.curve)[-1])
            print(sorted(run.model()), run.trace)
            try:
                fedmq.run({**config, "problem.faulty": True, "run.failures": 2}, folder="b")
            except fedmq.RunFailed as error:
                print("failed:", error, "|", error.run.status)
            try:
                fedmq.run({**config, "algorithm.lr": -1.0}, folder="c")
            except fedmq.ConfigError as error:
                print("invalid:", error)
        """)
    )
    done = subprocess.run(
        [sys.executable, "../code/script.py"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    curve, model, failed, invalid = done.stdout.splitlines()
    assert curve == "finished [0, 2, 4] metrics.version"
    assert model.startswith("['bias', 'weight'] <trace of ")
    assert failed.startswith("failed: ")
    assert "no loss today" in failed
    assert failed.endswith("| failed")
    assert invalid.startswith("invalid: algorithm.lr: expected")
    assert done.stderr == ""
    assert (elsewhere / "runs" / "a" / "summary.json").exists()


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", 7])
@pytest.mark.parametrize("function", ["run", "simulate", "sweep", "load", "config"])
def test_a_path_that_cannot_exist_is_a_configuration_error(function: str, path) -> None:
    calls = {
        "run": lambda: fedmq.run({}, folder=path),
        "simulate": lambda: fedmq.simulate({}, folder=path),
        "sweep": lambda: fedmq.sweep({}, {"run.seed": [0]}, folder=path),
        "load": lambda: fedmq.load(path),
        "config": lambda: fedmq.simulate(path),
    }
    with pytest.raises(fedmq.ConfigError, match=r"expected .* got"):
        calls[function]()


def test_an_option_that_no_command_line_can_have_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(fedmq.ConfigError, match=r"cannot start fedmq .*null byte"):
        fedmq.simulate({}, folder=tmp_path / "r", on="\0")
