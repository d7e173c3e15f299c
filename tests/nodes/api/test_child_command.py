"""The command in a child process: its output, its errors, its end, and its environment."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedmq.nodes.api import child_command
from fedmq.nodes.api.child_command import ChildCommand
from fedmq.nodes.errors import NodeError

end_to_end = pytest.mark.end_to_end


def silent(_: str) -> None:
    pass


def command_of(monkeypatch, code: str) -> None:
    """Make `ChildCommand` run this code, in the place of ``python -P -m fedmq.nodes``."""
    popen = subprocess.Popen

    def start(command, **more):
        return popen([sys.executable, "-c", code], **more)

    monkeypatch.setattr(child_command.subprocess, "Popen", start)


@end_to_end
def test_lines_go_to_the_caller_and_errors_become_the_reason() -> None:
    lines: list[str] = []
    child = ChildCommand(["list", "nonsense"], "", lines.append)
    assert child.wait() == 2
    assert child.reason.startswith("list: expected one of algorithms, codecs")
    assert lines == [f"fedmq: {child.reason}"]


@end_to_end
def test_output_without_an_error_is_the_reason(monkeypatch) -> None:
    command_of(monkeypatch, "print('one'); print('two', end=''); raise SystemExit(5)")
    child = ChildCommand([], "", silent)
    assert child.wait() == 5
    assert child.reason == "one\ntwo"


@end_to_end
def test_the_command_reads_the_text_from_its_standard_input(monkeypatch) -> None:
    command_of(monkeypatch, "import sys; print(sys.stdin.read())")
    lines: list[str] = []
    assert ChildCommand([], "[run]\n" * 20_000, lines.append).wait() == 0
    assert len(lines) == 20_001


@end_to_end
def test_a_process_that_holds_the_output_open_does_not_delay_the_end(monkeypatch) -> None:
    code = "import os, time\nif os.fork() == 0: time.sleep(20)\nos._exit(0)"
    command_of(monkeypatch, code)
    began = time.monotonic()
    assert ChildCommand([], "", silent).wait() == 0
    assert time.monotonic() - began < 10


@end_to_end
def test_an_interrupt_ends_the_command_and_is_raised_again(monkeypatch) -> None:
    code = (
        "import time\ntry: print('ready', flush=True); time.sleep(20)\n"
        "except KeyboardInterrupt: print('bye')"
    )
    command_of(monkeypatch, code)
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "ready":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ChildCommand([], "", on_line).wait()
    assert lines == ["ready", "bye"]


@end_to_end
def test_the_third_interrupt_kills(monkeypatch) -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(20)"
    )
    command_of(monkeypatch, code)
    ready = threading.Event()
    child = ChildCommand([], "", lambda _: ready.set())
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(child.wait()))
    waiting.start()
    assert ready.wait(10)
    for _ in range(3):
        child.interrupt()
    waiting.join(10)
    assert codes == [-signal.SIGKILL]


@end_to_end
def test_an_error_of_the_caller_ends_the_command(monkeypatch) -> None:
    command_of(monkeypatch, "import time; print('ready', flush=True); time.sleep(20)")
    pids: list[int] = []

    def fail(_: str) -> None:
        raise ZeroDivisionError

    child = ChildCommand([], "", fail)
    pids.append(child._process.pid)
    with pytest.raises(ZeroDivisionError):
        child.wait()
    assert not psutil.pid_exists(pids[0])


@end_to_end
def test_the_command_ends_with_the_process_that_started_it() -> None:
    """Also if that is killed: nobody could see or stop the command."""
    code = (
        "from fedmq.nodes.process.parent import follow_parent; import time\n"
        "follow_parent(); print(flush=True); time.sleep(20)"
    )
    starter = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {code!r}], stdout=subprocess.PIPE,\n"
        "    env={**os.environ, 'FEDMQ_PARENT': str(os.getpid())})\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(20)"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert psutil.wait_procs([child], timeout=10)[1] == []


def test_a_python_without_an_executable_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(NodeError, match="does not know its own executable"):
        ChildCommand([], "", silent)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(NodeError, match="cannot start /nowhere/python: No such file"):
        ChildCommand([], "", silent)


def test_modules_that_are_importable_here_are_importable_there(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    library = os.path.dirname(os.__file__)  # noqa: PTH120 - as sys.path has it
    monkeypatch.setattr(sys, "path", ["", "/my/code", library, f"{library}/site-packages"])
    path = child_command._environment()["PYTHONPATH"].split(os.pathsep)
    assert path[:2] == [str(tmp_path), "/my/code"]
    assert library not in path
