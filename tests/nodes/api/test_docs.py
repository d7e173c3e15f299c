"""docs/python.md: each example works, and the table of columns is complete."""

import re
import shutil
from pathlib import Path

import pytest

from fedmq.codecs.registry import make_codec
from fedmq.nodes.api import running
from fedmq.nodes.api.run import CURVE
from fedmq.nodes.api.sweep_grid import parse_over
from fedmq.nodes.run_folder.model_files import save_model
from tests.algorithms.tiny import Tiny
from tests.nodes.api.commands import Commands

PAGE = Path(__file__).parents[3] / "docs" / "python.md"


@pytest.fixture
def made(folder: Path, tmp_path: Path, monkeypatch) -> Commands:
    """Return commands that copy a finished run with a model, in a folder that has a run.toml."""
    source = shutil.copytree(folder, tmp_path / "source")
    problem = Tiny()
    save_model(source, problem.model().state_dict(), problem, {"run": "r", "version": "3"})
    work = tmp_path / "work"
    work.mkdir()
    (work / "run.toml").write_text("[run]\nversions = 3\n")
    monkeypatch.chdir(work)
    commands = Commands(source)
    monkeypatch.setattr(running, "ChildCommand", commands)
    return commands


def test_each_example_works(made: Commands, capsys) -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)  # noqa: S102 - the page is ours
    assert len(made.made) == 3 + 6 + 2
    printed = capsys.readouterr().out
    assert "<fedmq run " in printed
    assert re.search(r"^\d+\.\d MB: \d+\.\d%$", printed, re.MULTILINE)
    assert "lr 0.1 " in printed
    assert re.search(r"^schedule=rounds-fraction-0\.1-\w+ finished ", printed, re.MULTILINE)


def test_the_page_has_all_columns() -> None:
    assert set(CURVE) <= set(re.findall(r"`(\w+)`", PAGE.read_text()))


def test_each_codec_on_the_page_exists() -> None:
    found = re.findall(r"codec\.\w+=([^'\n]+)'", PAGE.read_text())
    assert found
    for [specs] in ([*parse_over([f"codec.up={each}"]).values()] for each in found):
        for spec in specs:
            make_codec(spec)
