"""A command of ``fedmq`` in a process of its own, started from Python.

The caller may be a script without a main guard, a notebook, or a program with threads and CUDA:
nothing is forked, and the command has its own signal handlers.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import site
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.process.parent import PARENT_VARIABLE
from fedmq.nodes.process.signals import ENOUGH

_LOOK_MS = 500
_END_S = 30.0
"""Time in which a stopped command ends by itself; a cluster takes up to 10 s."""
_KEPT_LINES = 30
_TERMINAL_VARIABLES = frozenset(
    ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
)
"""They make a command draw on its output as on a terminal; the kernel of a notebook sets some."""
_ERROR = "fedmq: "
"""Start of the lines in which a command reports an error."""


class ChildCommand:
    """One command, from its start to its end.

    Args:
        arguments: of ``fedmq``.
        text: standard input of the command.
        on_line: gets each line of its output.

    Raises:
        ConfigError: an argument has a character that no command line can have.
        NodeError: the command cannot be started.
    """

    def __init__(self, arguments: Sequence[str], text: str, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self._partial = b""
        self._interrupts = 0
        if not sys.executable:
            raise NodeError("cannot start a run: this Python does not know its own executable")
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-P", "-m", "fedmq.nodes", *arguments],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,  # a Ctrl-C reaches it only through `interrupt`
            )
        except ValueError as error:
            raise ConfigError(f"cannot start fedmq {' '.join(arguments)!r}: {error}") from None
        except OSError as error:
            raise NodeError(f"cannot start {sys.executable}: {error.strerror}") from None
        stdin = self._process.stdin
        if stdin is not None:
            with contextlib.suppress(BrokenPipeError), stdin:  # it may end before it reads
                stdin.write(text.encode())

    @property
    def reason(self) -> str:
        """Return the last error that the command has reported, or the end of its output."""
        if self._errors:
            return self._errors[-1]
        return "\n".join(self._lines) or "it printed nothing"

    def wait(self) -> int:
        """Wait for the end of the command; return its exit code, negative if a signal killed it.

        Raises:
            KeyboardInterrupt: after the command has ended; the first one interrupts it, the third
                kills it.
        """
        interrupt: KeyboardInterrupt | None = None
        try:
            while True:
                try:
                    self._read()
                    code = self._process.wait()
                    break
                except KeyboardInterrupt as error:
                    interrupt = interrupt or error
                    self.interrupt()
        finally:
            self._end()
        if interrupt is not None:
            raise interrupt
        return code

    def interrupt(self) -> None:
        """Stop the command as Ctrl-C does; the third call kills it."""
        self._interrupts += 1
        if self._process.poll() is None:
            self._process.send_signal(
                signal.SIGKILL if self._interrupts >= ENOUGH else signal.SIGINT
            )

    def _read(self) -> None:
        """Pass on the output until the command has ended."""
        stdout = self._process.stdout
        if stdout is None:
            return
        poller = select.poll()
        poller.register(stdout, select.POLLIN)
        while True:
            # Something that a user's code started may hold the pipe open after the end.
            over = self._process.poll() is not None
            if not poller.poll(0 if over else _LOOK_MS):
                if over:
                    break
                continue
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            for line in lines:
                self._take(line)
        last, self._partial = self._partial, b""
        if last:
            self._take(last)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="backslashreplace").rstrip("\r")
        self._lines.append(text)
        if text.startswith(_ERROR):
            self._errors.append(text.removeprefix(_ERROR))
        self._on_line(text)

    def _end(self) -> None:
        """End the command if an error in this process left it running."""
        process = self._process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _environment() -> dict[str, str]:
    """Return an environment in which the modules that this process can import are importable."""
    here = [str(each) if each else str(Path.cwd()) for each in sys.path]
    own = _own_paths()
    path = [each for each in here if each not in own]
    kept = {name: value for name, value in os.environ.items() if name not in _TERMINAL_VARIABLES}
    return {**kept, "PYTHONPATH": os.pathsep.join(path), PARENT_VARIABLE: str(os.getpid())}


def _own_paths() -> set[str]:
    """Return the entries of ``sys.path`` that every start of this Python has by itself.

    They stay out of PYTHONPATH: another Python that the command starts would import from them.
    """
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    library = Path(sysconfig.get_path("stdlib"))
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    user = site.getusersitepackages()
    return {*paths, str(library / "lib-dynload"), str(library.parent / archive), user}
