"""One broker writes to a folder; other failures of the lock are reported as such."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger import lock
from fedmq.broker.ledger.lock import LOCK_FILE, FolderLock, proof_in
from fedmq.broker.ledger.writer import Ledger


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_another_broker_is_named_by_its_process(tmp_path):
    held = FolderLock(tmp_path)
    with pytest.raises(LedgerError, match=rf"another broker \(process {os.getpid()} on .*\) is"):
        FolderLock(tmp_path)
    held.release()
    FolderLock(tmp_path).release()


def test_of_a_broker_of_an_older_release_no_process_is_known(tmp_path):
    held = FolderLock(tmp_path)
    (tmp_path / LOCK_FILE).write_text(held.proof)
    with pytest.raises(LedgerError, match=r"^another broker is writing to "):
        Ledger(tmp_path)
    held.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EACCES, errno.EBADF, errno.EIO, errno.ENOSYS])
def test_what_else_refuses_the_lock_is_no_other_broker(tmp_path, monkeypatch, code):
    def refuse(_fd, _operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = open_files()
    with pytest.raises(LedgerError) as caught:
        Ledger(tmp_path)
    assert str(caught.value) == f"cannot lock {tmp_path / LOCK_FILE}: {os.strerror(code)}"
    assert open_files() <= before  # sockets of a test before this one may close meanwhile


def test_a_lock_file_that_cannot_be_opened_is_reported(tmp_path, monkeypatch):
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(LedgerError, match=r"cannot open .*/lock: Is a directory$"):
        Ledger(tmp_path)
    (tmp_path / LOCK_FILE).rmdir()

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / LOCK_FILE).touch()
    monkeypatch.setattr(lock.os, "open", refuse)
    monkeypatch.setattr(lock.os, "geteuid", lambda: 12345)
    owner = r"\(it belongs to .+\)$"
    with pytest.raises(LedgerError, match=rf"cannot open .*/lock: Permission denied {owner}"):
        FolderLock(tmp_path)


def test_the_proof_is_the_first_line(tmp_path):
    held = FolderLock(tmp_path)
    assert proof_in(tmp_path) == held.proof != ""
    held.release()
    (tmp_path / LOCK_FILE).write_text("of an older release")
    assert proof_in(tmp_path) == "of an older release"
    assert proof_in(tmp_path / "nowhere") == ""
