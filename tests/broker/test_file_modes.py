"""What a broker stores is its owner's alone, also in folders that an older release made."""

import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedmq.broker.driver import BrokerDriver
from fedmq.broker.file_modes import make_private_folder, open_private, restrict, write_private
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from tests.broker.clocks import stopped_clock
from tests.broker.net import Net
from tests.permissions import readable_by_others


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o000, 0o700, 0o600), (0o177, 0o600, 0o600)])
def test_new_ones_are_the_owners_alone_whatever_the_umask(tmp_path, mask, folder, file) -> None:
    with umask(mask):
        make_private_folder(tmp_path / "a")
        write_private(tmp_path / "one", b"1")
        with open_private(tmp_path / "two", "ab") as two:
            two.write(b"2")
    assert (mode(tmp_path / "a"), mode(tmp_path / "one"), mode(tmp_path / "two")) == (
        *(folder, file, file),
    )


def test_missing_parents_are_private_and_folders_that_exist_stay(tmp_path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with umask(0):
        make_private_folder(tmp_path / "open" / "a" / "b")
        make_private_folder(tmp_path / "open" / "a" / "b")
    assert mode(tmp_path / "open") == 0o755
    assert mode(tmp_path / "open" / "a") == mode(tmp_path / "open" / "a" / "b") == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_private_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        make_private_folder(tmp_path / "file" / "a")


def test_restricting_reports_what_it_cannot_change(tmp_path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o644)
    assert restrict(file) == ""
    assert mode(file) == 0o600
    assert restrict(Path(os.devnull)) == "", "a device is left as it is"
    assert mode(Path(os.devnull)) & 0o077
    file.chmod(0o640)
    monkeypatch.setattr(Path, "chmod", refuse)
    assert restrict(file) == f"{file} has the permissions 0640"
    assert "No such file" in restrict(tmp_path / "missing")


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_ledger_is_the_brokers_alone(tmp_path, durability) -> None:
    with umask(0):
        net = Net(tmp_path / "run" / "ledger")
        net.driver.close()
        opened = open_at(net.folder, net, durability)
        opened.close()
    assert readable_by_others(tmp_path / "run") == []
    assert net.logged == [], "nothing to warn of"


def test_an_old_ledger_is_restricted_and_one_of_another_user_is_warned_of_once(
    tmp_path, monkeypatch
) -> None:
    folder = tmp_path / "ledger"
    net = Net(folder)
    net.driver.close()
    folder.chmod(0o755)
    for each in folder.iterdir():
        each.chmod(0o644)
    open_at(folder, net).close()
    assert readable_by_others(folder) == []
    assert net.logged == []

    folder.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", refuse)
    open_at(folder, net).close()
    reason = f"{folder} has the permissions 0755"
    assert net.logged == [("warning", "other users may be able to read the ledger", reason)]


def refuse(*_) -> None:
    raise PermissionError(errno.EPERM, "not the owner")


def open_at(folder: Path, net: Net, durability="process") -> BrokerDriver:
    settings = LedgerSettings(durability)
    clock = stopped_clock()
    return BrokerDriver.open(folder, BrokerSettings(), settings, Logged(net), clock)


class Logged:
    """The port of a broker that keeps warnings."""

    def __init__(self, net: Net) -> None:
        self.net, net.logged = net, []
        self.has_room = net.has_room

    def log(self, level, event, fields) -> None:
        if level == "warning":
            self.net.logged.append((level, event, fields.get("reason")))
