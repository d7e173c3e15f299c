"""Where a cluster's nodes meet: a socket file that only its owner can reach, or else loopback."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmq.broker.router import RouterPort
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.endpoints import MAX_PATH_BYTES
from fedmq.nodes.cli.main import main
from fedmq.nodes.cluster import listening as module
from fedmq.nodes.cluster.listening import LOOPBACK, Listening, choose_endpoint, remove_socket
from fedmq.nodes.errors import ConfigError, NodeError


@pytest.fixture
def short(tmp_path_factory, monkeypatch) -> Path:
    """A folder whose path leaves room for that of a socket, and the current one."""
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.chdir(folder)
    return folder


def new_keys(folder: Path) -> Path:
    result = CliRunner().invoke(main, ["keys", "new", "broker", "--keys", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def test_other_hosts_connect_to_another_address_with_the_keys_of_a_folder(short) -> None:
    keys = new_keys(short / "keys")
    listening = Listening.of("tcp://*:0", keys, insecure=False)
    assert listening.options == ["--keys", str(keys)]
    chosen, reason = listening.chosen(short / "run")
    assert reason == ""
    assert list(chosen.endpoints) == [f"ipc://{short}/run/socket/broker", "tcp://*:0"]
    bound = chosen.bound(["tcp://0.0.0.0:7700"])
    assert list(bound.endpoints) == [chosen.endpoint, "tcp://0.0.0.0:7700"]
    assert bound.keys() is not None
    first, *rest = bound.lines()
    assert first == "also listening on tcp://0.0.0.0:7700"
    assert any("fedmq worker --connect" in line for line in rest)
    with pytest.raises(NodeError, match=r"with keys, a cluster needs a socket file: .* bytes"):
        listening.chosen(short / ("x" * 100))


def test_without_an_address_for_others_there_is_nothing_to_announce(short) -> None:
    alone, reason = Listening.of(None, None, insecure=False).chosen(short / ("x" * 100))
    assert reason
    assert list(alone.bound(["tcp://127.0.0.1:4"]).endpoints) == ["tcp://127.0.0.1:4"]
    assert list(alone.lines()) == []
    open_one = Listening.of("tcp://*:7700", None, insecure=True)
    assert (open_one.options, open_one.keys()) == (["--insecure"], None)
    for insecure, folder in ((True, None), (False, short)):
        with pytest.raises(ConfigError, match=r"set broker\.bind, where workers of other hosts"):
            Listening.of(None, folder, insecure=insecure)


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
        patch.setattr(module, "_try_socket", refuse)
        endpoint, reason = choose_endpoint(short)
    assert endpoint == LOOPBACK
    assert reason == f"cannot make a socket in {short}/socket: operation not supported"
    monkeypatch.setattr(module, "restrict", lambda path: f"{path} has the permissions 0777")
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
