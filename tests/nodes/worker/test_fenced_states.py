"""States of clients that several workers save: the newest task's state counts.

A worker is suspended or killed before any step of a save. Meanwhile another one takes over its
client and does the same task and later ones; then the first one continues.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from fedmq.nodes.errors import NodeError
from fedmq.nodes.worker.client_files import ClientFolder
from fedmq.nodes.worker.client_state import ClientStateStore
from tests.nodes.worker.test_client_state import kept, same

STEPS = ("mkdir", "listdir", "scandir", "open", "link", "unlink")
"""The system calls of a save."""


class Killed(BaseException):
    """The worker was killed."""


@contextlib.contextmanager
def before_step(step, happens):
    """Call ``happens`` before the n-th system call in the block, or the first with a name.

    Yields the list of calls so far.
    """
    steps = []

    def watched(name, real):
        def call(*args, **more):
            if not quiet:
                steps.append(name)
                if step == len(steps) - 1 or (step == name and steps.count(name) == 1):
                    quiet.append(True)
                    happens()
                    quiet.clear()
            return real(*args, **more)

        return call

    quiet = []
    with pytest.MonkeyPatch.context() as patch:
        # `Path.read_bytes` opens by io, `write_private` by os.
        for module, name in (*((os, each) for each in STEPS), (sys.modules["io"], "open")):
            patch.setattr(module, name, watched(name, getattr(module, name)))
        yield steps


def names(folder):
    return sorted(each.name for each in (folder / "client-0").iterdir())


def steps_of_a_save(folder):
    ClientStateStore(folder).put(0, kept(seq=3))
    with before_step(-1, lambda: None) as steps:
        ClientStateStore(folder).put(0, kept(seq=20))
    assert steps.count("link") == steps.count("open") == 1
    assert "unlink" in steps
    return len(steps)


@pytest.mark.parametrize("meanwhile", [(20, 106), (106,), (20,), ()], ids=str)
def test_a_save_that_is_suspended_before_any_step_replaces_no_newer_state(tmp_path, meanwhile):
    for step in range(steps_of_a_save(tmp_path / "none")):
        folder = tmp_path / str(step)
        ClientStateStore(folder).put(0, kept(seq=3))

        def taken_over(folder=folder):
            for number in meanwhile:
                ClientStateStore(folder).put(0, kept(data=(b"theirs",), seq=number))

        mine = kept(data=(b"mine",), seq=20)
        with before_step(step, taken_over):
            stands = ClientStateStore(folder).put(0, mine)
        newest = ClientStateStore(folder).get(0)
        assert newest.seq == max(20, *meanwhile, 0)
        if newest.seq == 20:
            assert same(stands, newest)  # what is posted is what the next task starts from
        else:
            assert same(newest, kept(data=(b"theirs",), seq=106))
            ClientStateStore(folder).put(0, kept(seq=107))
            assert names(folder) == ["000000000107.state"]


def test_a_save_that_is_killed_before_any_step_leaves_the_old_state_or_the_new_one(tmp_path):
    def killed():
        raise Killed

    for step in range(steps_of_a_save(tmp_path / "none")):
        folder = tmp_path / str(step)
        ClientStateStore(folder).put(0, kept(seq=3))
        with before_step(step, killed), pytest.raises(Killed):
            ClientStateStore(folder).put(0, kept(seq=20))
        assert ClientStateStore(folder).get(0).seq in (3, 20)
        ClientStateStore(folder).put(0, kept(seq=21))
        assert names(folder) == ["000000000021.state"]


def test_incomplete_files_of_a_killed_worker_are_never_read_and_get_removed(tmp_path):
    ClientStateStore(tmp_path).put(0, kept(seq=3))
    folder = tmp_path / "client-0"
    for name in ("000000000099.0a1b.new", "000000000003.0a1b.new", "notes.txt"):
        (folder / name).write_bytes(b"half")
    assert ClientStateStore(tmp_path).get(0).seq == 3
    ClientStateStore(tmp_path).put(0, kept(seq=20))
    assert names(tmp_path) == [
        "000000000020.state",
        "000000000099.0a1b.new",  # of a save that may be going on
        "notes.txt",
    ]


def test_a_reader_finds_the_newest_state_while_files_are_removed(tmp_path):
    for number in (3, 20):
        ClientStateStore(tmp_path).put(0, kept(seq=number))
        with before_step(
            "open", lambda number=number: ClientStateStore(tmp_path).put(0, kept(seq=number + 5))
        ):
            assert ClientStateStore(tmp_path).get(0).seq == number + 5


@pytest.mark.parametrize("step", ["open", "link"])
def test_a_folder_that_disappears_during_a_write_is_an_error(tmp_path, step):
    def gone():
        shutil.rmtree(tmp_path / "client-0")

    ClientStateStore(tmp_path).put(0, kept(seq=3))
    with before_step(step, gone), pytest.raises(NodeError, match=r"cannot write .*client-0"):
        ClientStateStore(tmp_path).put(0, kept(seq=20))
    assert not (tmp_path / "client-0").exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_protects_newer_states_too(tmp_path, monkeypatch, code):
    def link(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    ClientStateStore(tmp_path).put(0, kept(seq=106))
    ClientStateStore(tmp_path).put(0, kept(seq=20))
    assert ClientStateStore(tmp_path).get(0).seq == 106
    first = kept(data=(b"first",), seq=107)
    ClientStateStore(tmp_path).put(0, first)
    assert same(ClientStateStore(tmp_path).put(0, kept(data=(b"second",), seq=107)), first)
    # Another worker's, between the look and the link.
    with before_step(
        "open", lambda: ClientStateStore(tmp_path).put(0, kept(data=(b"theirs",), seq=108))
    ):
        assert not ClientFolder(tmp_path, 0).save(108, b"late")
    assert names(tmp_path) == ["000000000108.state"]


def test_the_state_file_of_an_older_release_is_read_until_a_newer_state_exists(tmp_path):
    ClientStateStore(tmp_path / "now").put(3, kept(seq=5))
    data = (tmp_path / "now" / "client-3" / "000000000005.state").read_bytes()
    old = tmp_path / "old"
    old.mkdir()
    (old / "client-3.state").write_bytes(data)
    assert same(ClientStateStore(old).get(3), kept(seq=-1))
    ClientStateStore(old).put(3, kept("aggregator/9", seq=0))
    assert ClientStateStore(old).get(3).task == "aggregator/9"
    assert [each.name for each in old.iterdir()] == ["client-3"]


def test_the_newest_task_counts_in_memory_too():
    locals_ = ClientStateStore()
    newest = kept(seq=106)
    assert locals_.put(0, newest) is newest
    late, again = kept(seq=20), kept(seq=106)
    assert locals_.put(0, late) is late
    assert locals_.put(0, again) is newest
    assert locals_.get(0) is newest


@pytest.mark.end_to_end
def test_a_suspended_process_does_not_replace_the_newer_state_when_it_continues(tmp_path):
    """It suspends itself after it has written its file, before it gives the file its name."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fedmq.nodes.worker.client_files import ClientFolder\n"
        "real = os.link\n"
        "def link(*args):\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    real(*args)\n"
        "os.link = link\n"
        "print(ClientFolder(Path(sys.argv[1]), 0).save(20, b'task 20'))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            [written] = (tmp_path / "client-0").iterdir()
            assert written.read_bytes() == b"task 20"
            for number in (19, 106):
                ClientStateStore(tmp_path).put(0, kept(seq=number))
            process.send_signal(signal.SIGCONT)
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert output == "False\n"
    assert ClientStateStore(tmp_path).get(0).seq == 106
    assert names(tmp_path) == ["000000000106.state"]
