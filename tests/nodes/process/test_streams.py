"""When standard output fails, a command that only prints ends as Unix tools do; a run continues."""

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


def test_written_text_arrives(pipe) -> None:
    reader, writer = pipe
    made, lost = stream(writer)
    text = io.TextIOWrapper(made, encoding="ascii", errors="backslashreplace", write_through=True)
    text.write("bars \u2581\n" * 500)
    assert os.read(reader, 1 << 20) == b"bars \\u2581\n" * 500
    assert not lost


def test_a_closed_pipe_is_reported_once_and_raises_nothing(pipe) -> None:
    reader, writer = pipe
    made, lost = stream(writer)
    os.close(reader)
    for _ in range(3):
        assert made.write(b"line\n") == 5
    assert lost == ["standard output: broken pipe"]


@pytest.mark.slow
def test_a_pipe_without_a_reader_blocks_once_and_works_again_when_read(pipe) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    made, lost = stream(writer)
    began = time.monotonic()
    for _ in range(200):
        made.write(b"x" * 1000)
    assert time.monotonic() - began < 5, "only the first write waits"
    assert lost == ["standard output: nobody reads it"]
    assert os.read(reader, 1 << 20)
    made.write(b"after")
    assert os.read(reader, 1 << 20).endswith(b"after")


@pytest.mark.slow
def test_a_terminal_without_a_reader_does_not_block() -> None:
    ours, theirs = pty.openpty()
    made, lost = stream(theirs)
    try:
        for _ in range(200):
            made.write(b"x" * 1000)
        assert lost == ["standard output: nobody reads it"]
        flags = fcntl.fcntl(theirs, fcntl.F_GETFL)
        assert not flags & os.O_NONBLOCK, "the shell shares this descriptor"
    finally:
        made.close()
        os.close(ours)
        os.close(theirs)


def test_a_terminal_that_went_away_is_reported() -> None:
    ours, theirs = pty.openpty()
    made, lost = stream(theirs)
    os.close(ours)
    made.write(b"line\n")
    assert lost == ["standard output: input/output error"]
    made.close()
    os.close(theirs)


@pytest.mark.skipif(not HAS_FULL, reason="no /dev/full here")
def test_a_full_disk_is_reported_once() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    made, lost = stream(fd)
    made.write(b"line\n")
    made.write(b"line\n")
    assert lost == ["standard output: no space left on device"]
    os.close(fd)


def test_a_required_stream_raises_and_later_flushes_drop_the_buffer(pipe) -> None:
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


def test_a_closed_descriptor_is_returned_as_an_error() -> None:
    assert isinstance(write_in_time(9999, b"x"), OSError)


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "fedmq.nodes", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


@pytest.mark.end_to_end
@pytest.mark.skipif(not HAS_FULL, reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("list", "problems"), ("--help",)])
def test_a_command_that_cannot_write_its_output_prints_one_line(arguments) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        ended = run(*arguments, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "fedmq: cannot write to standard output: no space left on device\n"


@pytest.mark.end_to_end
def test_a_command_whose_reader_has_gone_ends_by_sigpipe(pipe) -> None:
    reader, writer = pipe
    os.close(reader)
    ended = run("list", "problems", stdout=writer)
    assert ended.returncode == -signal.SIGPIPE
    assert ended.stderr == ""


@pytest.mark.end_to_end
def test_a_command_works_with_closed_standard_streams() -> None:
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
def test_no_file_of_a_run_gets_the_number_of_a_standard_stream(tmp_path) -> None:
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
def test_no_file_of_a_child_process_gets_the_number_of_a_standard_stream() -> None:
    script = f"exec {sys.executable} -P -c '{_OWN_PROCESS}' <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", script], timeout=60, check=False).returncode == 0


@pytest.mark.end_to_end
def test_an_ascii_terminal_prints_escapes() -> None:
    code = "from fedmq.nodes.process import streams; streams.set_up(); print('\u2581')"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
        check=True,
    )
    assert ended.stdout == b"\\u2581\n"
