"""Stands in for the commands that make runs."""

import json
import shutil
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path


class Commands:
    """Stands in for the commands: copies the folder of a finished run; exits with `codes`."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.made: list[str] = []
        self.codes: dict[str, int] = {}
        self.before: Callable[[str], None] = lambda _: None
        self.interrupted = threading.Event()

    def __call__(self, arguments, text, on_line) -> "Child":
        return Child(self, arguments, text)


class Child:
    """One of the commands."""

    reason = "out of luck"

    def __init__(self, commands: Commands, arguments, text) -> None:
        self.commands, self.arguments = commands, arguments
        self.tables = tomllib.loads(text)
        self.folder = Path(arguments[arguments.index("--run") + 1])

    def wait(self) -> int:
        self.commands.made.append(self.folder.name)
        self.commands.before(self.folder.name)
        code = self.commands.codes.get(self.folder.name, 0)
        if code != 2 and not self.folder.exists():
            shutil.copytree(self.commands.source, self.folder)
            if code:
                summary = json.loads((self.folder / "summary.json").read_text())
                status = "failed" if code == 1 else "interrupted"
                summary |= {"status": status, "ended": "out of luck"}
                (self.folder / "summary.json").write_text(json.dumps(summary))
        return code

    def interrupt(self) -> None:
        self.commands.interrupted.set()
