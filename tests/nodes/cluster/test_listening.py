"""Where a cluster's nodes meet: a socket file that only its owner can reach, or else loopback."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from fedmq.broker.router import RouterPort
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.endpoints import MAX_PATH_BYTES
from fedmq.nodes.cluster import listening
from fedmq.nodes.cluster.listening import LOOPBACK, choose_endpoint, remove_socket


@pytest.fixture
def short(tmp_path_factory, monkeypatch) -> Path:
    """A folder whose path leaves room for that of a socket, and the current one."""
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.chdir(folder)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def listen(endpoint: str) -> None:
    RouterPort([endpoint], BrokerSettings()).close()


def test_the_endpoint_is_in_a_private_folder_of_the_run(short) -> None:
    before = os.umask(0)
    try:
        (short / "run").mkdir()
        endpoint, reason = choose_endpoint(Path("run"))
    finally:
        os.umask(before)
    assert (endpoint, reason) == (f"ipc://{short}/run/socket/broker", "")
    assert stat.S_IMODE((short / "run/socket").stat().st_mode) == 0o700
    assert names(short / "run/socket") == [], "what was tried is removed"
    (short / "run").rename("moved")
    assert choose_endpoint(short / "moved")[0] == f"ipc://{short}/moved/socket/broker"
    (short / "link").symlink_to("moved")
    assert choose_endpoint(Path("link"))[0] == f"ipc://{short}/moved/socket/broker"


def test_a_folder_that_others_could_open_is_restricted(short) -> None:
    (short / "socket").mkdir(mode=0o755)
    assert choose_endpoint(short) == (f"ipc://{short}/socket/broker", "")
    assert stat.S_IMODE((short / "socket").stat().st_mode) == 0o700


def test_the_longest_path_is_used_and_a_longer_one_is_not(short) -> None:
    rest = MAX_PATH_BYTES - len(f"{short}//socket/broker")
    longest = short / ("x" * rest)
    endpoint, reason = choose_endpoint(longest)
    assert len(endpoint.removeprefix("ipc://")) == MAX_PATH_BYTES
    assert reason == ""
    listen(endpoint)
    path = short / ("x" * (rest + 1)) / "socket" / "broker"
    assert choose_endpoint(path.parent.parent) == (
        LOOPBACK,
        f"{path} has {MAX_PATH_BYTES + 1} bytes, a socket's path at most {MAX_PATH_BYTES}",
    )


def test_a_file_system_without_sockets_or_permissions_is_reported(short, monkeypatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patch:
        patch.setattr(listening, "_try_socket", refuse)
        endpoint, reason = choose_endpoint(short)
    assert endpoint == LOOPBACK
    assert reason == f"cannot make a socket in {short}/socket: operation not supported"
    monkeypatch.setattr(listening, "restrict", lambda path: f"{path} has the permissions 0777")
    assert choose_endpoint(short) == (LOOPBACK, f"{short}/socket has the permissions 0777")


def test_what_a_killed_broker_left_is_in_nobodys_way(short) -> None:
    endpoint, _ = choose_endpoint(short)
    for name in ("broker", "trial"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(f"{short}/socket/{name}")
    assert choose_endpoint(short) == (endpoint, "")
    listen(endpoint)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{short}/socket/again")
    remove_socket(short)
    assert names(short / "socket") == ["again"], "only its own file is removed"
    (short / "socket/again").unlink()
    remove_socket(short)
    assert names(short) == []
    remove_socket(short)
