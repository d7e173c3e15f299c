"""No error in the view ends a run: narrow and ASCII terminals, and exceptions while drawing."""

import io
import os
import re
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from fedmq.nodes.cluster import view
from fedmq.nodes.cluster.console import SupervisorConsole, output_console
from fedmq.nodes.cluster.view import LiveView, closing_table
from fedmq.nodes.history.curve import CurvePoint
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.run_folder.summary import summary_of


@dataclass
class Terminal:
    """A console that keeps what it shows, and what was reported about it."""

    is_terminal: bool
    width: int = 80
    encoding: str = "utf-8"
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bytes = io.BytesIO()
        # As `streams` sets a process's own up.
        file = io.TextIOWrapper(
            self.bytes, encoding=self.encoding, errors="backslashreplace", write_through=True
        )
        self.console = Console(
            file=file,
            force_terminal=self.is_terminal,
            width=self.width,
        )

    def view(self, title: str = "a run") -> LiveView:
        return LiveView(self.console, title, self.text.append)

    @property
    def shown(self) -> str:
        return self.bytes.getvalue().decode(self.encoding)


def history() -> RunHistory:
    made = RunHistory(0.0, now=10.0)
    made.curve = [
        CurvePoint(version, float(version), {"accuracy": 0.1 * version}) for version in (1, 9)
    ]
    return made


@pytest.mark.parametrize("width", [1, 2, 20, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_any_terminal_shows_a_run(is_terminal, encoding, width, monkeypatch) -> None:
    monkeypatch.setattr(view, "_LIVE_EVERY_S", 0.0)
    terminal = Terminal(is_terminal, width, encoding)
    with terminal.view() as shown:
        shown.show(history())
        shown.show(history())
    assert terminal.text == []
    assert "run" in terminal.shown or width < 3
    if is_terminal and width == 80:
        assert ("█" if encoding == "utf-8" else "#") in terminal.shown


def test_a_title_is_text_whatever_is_in_it() -> None:
    terminal = Terminal(is_terminal=False)
    with terminal.view("a [/run] of [red]"):
        pass
    assert terminal.shown.strip() == "a [/run] of [red]"


def test_after_an_error_in_the_live_view_lines_follow(monkeypatch) -> None:
    monkeypatch.setattr(view, "render", lambda *_, **__: 1 // 0)
    terminal = Terminal(is_terminal=True)
    with terminal.view() as shown:
        for _ in range(3):
            shown.show(history())
    assert len(terminal.text) == 1
    assert "the live view failed: ZeroDivisionError" in terminal.text[0]
    assert "accuracy 90.00%" in terminal.shown


def test_an_error_in_the_lines_is_reported_once_and_ends_nothing(monkeypatch) -> None:
    monkeypatch.setattr(view, "line", lambda *_, **__: 1 // 0)
    terminal = Terminal(is_terminal=False)
    with terminal.view() as shown:
        for _ in range(3):
            shown.show(history())
    assert len(terminal.text) == 1
    assert "the view failed: ZeroDivisionError" in terminal.text[0]


def test_a_console_that_fails_is_reported_once(monkeypatch) -> None:
    terminal = Terminal(is_terminal=True)
    monkeypatch.setattr(terminal.console, "print", lambda *_, **__: 1 // 0)
    with terminal.view() as shown:
        shown.show(history())
        shown.show(history())
    assert 1 <= len(terminal.text) <= 2


def test_a_run_of_which_nothing_is_recorded_has_a_summary_and_a_table() -> None:
    summary = summary_of(RunHistory(0.0))
    assert summary["algorithm"] is None
    assert summary["versions"] == 0
    rows = dict(closing_table(summary).rows)
    assert (rows["run"], rows["versions"], rows["accuracy"]) == ("-", "0", "- (best -)")


@pytest.mark.parametrize(("is_terminal", "lines"), [(True, 4), (False, 1)])
def test_the_closing_table_has_no_padding_and_fits_a_terminal(is_terminal, lines) -> None:
    summary = summary_of(RunHistory(0.0)) | {"ended": "because of " + "it " * 80 + "all"}
    terminal = Terminal(is_terminal)
    terminal.console.print(closing_table(summary), soft_wrap=True)
    found = re.sub(r"\x1b\[[0-9;]*m", "", terminal.shown).splitlines()
    assert [each for each in found if each != each.rstrip()] == []
    first = next(index for index, each in enumerate(found) if each.startswith("ended"))
    assert found[first + lines].startswith("algorithm")
    if is_terminal:
        assert max(map(len, found)) <= 80


def test_what_cannot_be_shown_is_printed_and_logged(tmp_path) -> None:
    terminal = Terminal(is_terminal=False)
    output = SupervisorConsole(terminal.console, tmp_path / "cluster.log")
    output.show(lambda: closing_table({}))
    assert "cannot print the summary: KeyError('results'); see summary.json" in terminal.shown
    assert "see summary.json" in (tmp_path / "cluster.log").read_text()


def test_a_log_that_cannot_be_opened_silences_nobody(tmp_path) -> None:
    (tmp_path / "cluster.log").mkdir()
    terminal = Terminal(is_terminal=False)
    SupervisorConsole(terminal.console, tmp_path / "cluster.log").say("a sentence")
    assert terminal.shown == "a sentence\n"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_variable_does_not_make_a_pipe_a_terminal(variable: str, monkeypatch) -> None:
    monkeypatch.setenv(variable, "1")
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert not output_console().is_terminal
