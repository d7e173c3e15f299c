"""Stop signals end a process at any time, in any number, whatever code they interrupt."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmq.nodes.process.signals import ENOUGH, INTERRUPTED, Stopped, StopSignals, blocked

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("watchdog", [False, True])
def test_the_first_signal_raises_and_later_ones_do_not_interrupt_cleanup(number, watchdog):
    if not watchdog and number != signal.SIGTERM:
        pytest.skip("the supervisor of a cluster handles it for its nodes")
    signals = StopSignals()
    ended = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            ended.append(number)

    with signals.taken(watchdog=watchdog):
        with pytest.raises(Stopped, match=number.name):
            work()
        assert signals.count == 2
    assert ended == [number]
    assert not signals.installed


def test_handlers_are_restored():
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals().taken():
        assert [signal.getsignal(each) for each in SIGNALS] != before
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_noting_calls_the_function_for_each_signal_and_raises_nothing():
    signals = StopSignals()
    calls = []
    with signals.taken():
        with signals.noting(lambda: calls.append(signals.count)):
            for _ in range(ENOUGH):
                signal.raise_signal(signal.SIGINT)
            assert calls == [1, 2, 3]
            with signals.noting(lambda: calls.append(-1)):
                assert calls[-1] == -1, "it is called at once for signals received before"
        with pytest.raises(Stopped, match="SIGINT"):
            signals.check()


def test_a_node_of_a_cluster_ignores_ctrl_c():
    with StopSignals().taken(watchdog=False):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().taken():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_at_a_prompt_ctrl_c_cancels_the_line():
    signals = StopSignals()
    with signals.taken():
        with signals.prompting(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.count == 0
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_blocked_masks_the_signals_inside_the_block():
    with blocked():
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert mask >= set(SIGNALS)
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())


# ---- in a process of its own

_BEGIN = """
import hashlib, os, signal, sys, time
from fedmq.nodes.process import signals
from fedmq.nodes.process.ending import ending_well
from fedmq.nodes.process.signals import this_process
signals._GRACE_S = float(sys.argv[1])
def ready():
    print("ready", flush=True)
"""

CODES = {
    "asleep": "time.sleep(60)",
    "in a long call of a library": "hashlib.pbkdf2_hmac('sha256', b'', b'', 500_000_000)",
    "in code that catches everything": """
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
""",
    "in a finalizer": """
class Slow:
    def __del__(self):
        time.sleep(60)
it = Slow()
del it
time.sleep(60)
""",
    "waiting for a thread of the user's at the very end": """
import threading
threading.Thread(target=time.sleep, args=(60,)).start()
""",
    "ended with an error that the signal caused": """
try:
    time.sleep(60)
except BaseException as error:
    raise RuntimeError("half done") from error
""",
    "asleep in a process that has forked": """
if os.fork() == 0:
    try:
        time.sleep(1)
    except KeyboardInterrupt:
        os._exit(0)
    os._exit(0)
time.sleep(60)
""",
}


class Process:
    def __init__(self, code: str, grace_s: float) -> None:
        indented = "\n".join(f"    {line}" for line in code.strip().splitlines())
        text = f"{_BEGIN}\nwith ending_well():\n    ready()\n{indented}\n"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", text, str(grace_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # into the code after that line

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.mark.end_to_end
@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_one_signal_ends_a_process(code):
    process = Process(code, 0.5)
    process.process.send_signal(signal.SIGINT)
    assert process.end() == (INTERRUPTED, "fedmq: stopped by SIGINT\n")


@pytest.mark.end_to_end
@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_the_third_signal_does_not_wait(code):
    process = Process(code, 1000)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if process.process.poll() is None:
            process.process.send_signal(number)
            time.sleep(0.05)
    assert process.end() == (INTERRUPTED, "fedmq: stopped by SIGTERM\n")


@pytest.mark.end_to_end
def test_later_signals_do_not_interrupt_cleanup():
    code = """
try:
    time.sleep(60)
finally:
    time.sleep(0.3)
    os.write(2, b"clean ")
"""
    process = Process(code, 1000)
    for _ in range(2):
        process.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.end() == (INTERRUPTED, "clean fedmq: stopped by SIGINT\n")


@pytest.mark.end_to_end
def test_the_watchdog_does_not_end_a_block_of_noting():
    """A supervisor takes longer to end its nodes than the watchdog waits."""
    code = """
with this_process.noting():
    while not this_process.count:
        time.sleep(0.01)
    time.sleep(1.0)
    os.write(2, b"whole ")
"""
    process = Process(code, 0.1)
    process.process.send_signal(signal.SIGINT)
    assert process.end() == (INTERRUPTED, "whole fedmq: stopped by SIGINT\n")


@pytest.mark.end_to_end
def test_a_forked_process_has_the_default_handlers():
    code = """
pid = os.fork()
if pid == 0:
    time.sleep(60)
time.sleep(0.1)
os.kill(pid, signal.SIGTERM)
os.write(2, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}".encode())
time.sleep(0.3)
"""
    assert Process(code, 0.1).end() == (0, "-15")


def takes_signals(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.end_to_end
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize("after_s", [0.0, 0.15, 0.45])
def test_a_command_that_has_just_started_prints_one_line(tmp_path, after_s):
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fedmq.nodes", "cluster"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not takes_signals(process.pid):
        assert time.monotonic() < deadline
    time.sleep(after_s)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert (process.returncode, output) == (INTERRUPTED, "fedmq: stopped by SIGINT\n")
