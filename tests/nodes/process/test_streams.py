"""Standard output may fail: a command that only prints ends as Unix tools do, a run goes on."""

import errno
import fcntl
import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from fedmq.nodes.process.streams import OutputFailed, OutputStream, write_in_time

HAS_FULL = os.path.exists("/dev/full")  # noqa: PTH110 - a device, not a file of ours


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.EBADF  # noqa: PT017 - the test has closed it


def stream(fd: int, *, required: bool = False) -> tuple[OutputStream, list[str]]:
    lost: list[str] = []
    made = OutputStream(fd, "standard output", lost.append)
    made.required = required
    return made, lost


def test_what_is_written_arrives(pipe) -> None:
    reader, writer = pipe
    made, lost = stream(writer)
    text = io.TextIOWrapper(made, encoding="ascii", errors="backslashreplace", write_through=True)
    text.write("bars \u2581\n" * 500)
    assert os.read(reader, 1 << 20) == b"bars \\u2581\n" * 500
    assert not lost


def test_a_closed_pipe_is_told_once_and_ends_nothing(pipe) -> None:
    reader, writer = pipe
    made, lost = stream(writer)
    os.close(reader)
    for _ in range(3):
        assert made.write(b"line\n") == 5
    assert lost == ["standard output: broken pipe"]


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_holds_nobody_up_and_goes_on_when_somebody_does(pipe) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    made, lost = stream(writer)
    began = time.monotonic()
    for _ in range(200):
        made.write(b"x" * 1000)
    assert time.monotonic() - began < 5, "it is waited for once, not each time"
    assert lost == ["standard output: nobody reads it"]
    assert os.read(reader, 1 << 20)
    made.write(b"after")
    assert os.read(reader, 1 << 20).endswith(b"after")


@pytest.mark.slow
def test_a_terminal_that_nobody_reads_holds_nobody_up() -> None:
    ours, theirs = pty.openpty()
    made, lost = stream(theirs)
    try:
        for _ in range(200):
            made.write(b"x" * 1000)
        assert lost == ["standard output: nobody reads it"]
        flags = fcntl.fcntl(theirs, fcntl.F_GETFL)
        assert not flags & os.O_NONBLOCK, "the terminal is the shell's, too"
    finally:
        made.close()
        os.close(ours)
        os.close(theirs)


def test_a_terminal_that_went_away_is_told() -> None:
    ours, theirs = pty.openpty()
    made, lost = stream(theirs)
    os.close(ours)
    made.write(b"line\n")
    assert lost == ["standard output: input/output error"]
    made.close()
    os.close(theirs)


@pytest.mark.skipif(not HAS_FULL, reason="no /dev/full here")
def test_a_full_disk_is_told_once() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    made, lost = stream(fd)
    made.write(b"line\n")
    made.write(b"line\n")
    assert lost == ["standard output: no space left on device"]
    os.close(fd)


def test_what_is_required_is_written_or_said_and_buffers_let_go(pipe) -> None:
    reader, writer = pipe
    made, lost = stream(writer, required=True)
    text = io.TextIOWrapper(io.BufferedWriter(made), encoding="utf-8")
    text.write("table\n")
    text.flush()
    assert os.read(reader, 100) == b"table\n"
    os.close(reader)
    text.write("more\n")
    with pytest.raises(OutputFailed, match="cannot write to standard output: broken pipe") as found:
        text.flush()
    assert found.value.broken_pipe
    text.flush()  # as the interpreter does when it ends
    assert not lost


def test_a_descriptor_that_is_closed_is_an_error_not_a_crash() -> None:
    assert isinstance(write_in_time(9999, b"x"), OSError)


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "fedmq.nodes", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


@pytest.mark.end_to_end
@pytest.mark.skipif(not HAS_FULL, reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("list", "problems"), ("--help",)])
def test_a_command_whose_output_finds_no_room_is_one_sentence(arguments) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        ended = run(*arguments, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "fedmq: cannot write to standard output: no space left on device\n"


@pytest.mark.end_to_end
def test_a_command_whose_reader_has_gone_ends_like_other_tools(pipe) -> None:
    reader, writer = pipe
    os.close(reader)
    ended = run("list", "problems", stdout=writer)
    assert ended.returncode == -signal.SIGPIPE
    assert ended.stderr == ""


@pytest.mark.end_to_end
def test_streams_that_were_closed_before_are_no_reason_to_fail() -> None:
    script = f"exec {sys.executable} -P -m fedmq.nodes list problems <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", script], timeout=60, check=False).returncode == 0


_OWN_FILES = """
import os, sys
from fedmq.nodes.process import streams
streams.set_up()
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("printed", flush=True)
assert fd > 2, fd
"""


@pytest.mark.end_to_end
def test_no_file_of_a_run_becomes_standard_output(tmp_path) -> None:
    path = tmp_path / "ledger"
    script = f"exec {sys.executable} -P -c '{_OWN_FILES}' {path} >&-"
    assert subprocess.run(["/bin/sh", "-c", script], timeout=60, check=False).returncode == 0
    assert path.read_bytes() == b""


_OWN_PROCESS = """
import os, subprocess, sys
from fedmq.nodes.process import streams
streams.set_up()
code = "import os; os.fstat(0); os.fstat(1); os.fstat(2)"
sys.exit(subprocess.run([sys.executable, "-c", code], close_fds=True).returncode)
"""


@pytest.mark.end_to_end
def test_no_file_of_a_process_that_is_started_becomes_one_either() -> None:
    script = f"exec {sys.executable} -P -c '{_OWN_PROCESS}' <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", script], timeout=60, check=False).returncode == 0


@pytest.mark.end_to_end
def test_an_ascii_terminal_prints_codes_of_what_it_does_not_have() -> None:
    code = "from fedmq.nodes.process import streams; streams.set_up(); print('\u2581')"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
        check=True,
    )
    assert ended.stdout == b"\\u2581\n"
