"""A node's key and its sessions, in its folder."""

import time

import pytest

from fedmq.nodes.errors import NodeError
from fedmq.nodes.run.session import new_session, node_key, session_id


def test_a_node_keeps_its_key_and_no_two_nodes_share_one(tmp_path):
    keys = {node_key(tmp_path / name) for name in ("a", "b", "a", "b")}
    assert len(keys) == 2
    assert all(0 < len(key) <= 64 for key in keys)


def test_without_a_folder_or_a_users_secret_each_start_has_its_own_key():
    assert node_key(None) != node_key(None)
    assert node_key(None, "mine") == "mine"


@pytest.mark.parametrize("fault", ["no folder", "no file"])
def test_a_key_that_cannot_be_read_or_written_is_an_error(tmp_path, fault):
    folder = tmp_path / "node"
    if fault == "no folder":
        folder.write_text("")
    else:
        (folder / "key").mkdir(parents=True)
    with pytest.raises(NodeError) as caught:
        node_key(folder)
    assert str(folder) in str(caught.value)


@pytest.fixture
def clock(monkeypatch):
    """Set the time that the node's machine shows, in seconds since 1970."""

    def show(seconds):
        monkeypatch.setattr(time, "time_ns", lambda: int(seconds * 1e9))

    return show


def test_sessions_sort_by_their_start(tmp_path, clock):
    ids = []
    for second in (1.8e9, 1.8e9 + 1, 4e9):
        clock(second)
        ids += [new_session(None), new_session(tmp_path / "never made")]
    assert ids[::2] == sorted(ids[::2])
    assert ids[1::2] == sorted(ids[1::2])
    assert len(set(ids)) == 6


def test_a_session_follows_the_last_one_though_the_clock_was_set_back(tmp_path, clock):
    clock(1.8e9)
    sessions = [new_session(tmp_path)]
    for seconds in (1.8e9 - 3600, 1.8e9, 0.0, 1.8e9 + 1):
        clock(seconds)
        sessions.append(new_session(tmp_path))
    assert sessions == sorted(set(sessions))
    assert sessions[-1].startswith(f"{int((1.8e9 + 1) * 1e9):016x}-")


@pytest.mark.parametrize("content", [b"", b"\0" * 30, b"\xff\xfe", b"18-", b"x" * 16 + b"-00\n"])
def test_a_damaged_file_of_the_last_session_counts_as_none(tmp_path, clock, content):
    clock(1.8e9)
    (tmp_path / "session").write_bytes(content)
    first = new_session(tmp_path)
    assert first.startswith(f"{int(1.8e9 * 1e9):016x}-")
    assert new_session(tmp_path) > first


def test_a_node_starts_though_its_session_cannot_be_stored(tmp_path):
    (tmp_path / "session").mkdir()
    assert new_session(tmp_path) < new_session(tmp_path)


def test_an_id_has_the_length_that_sorts_until_the_year_2554():
    assert session_id(1, "", "ab") == "0000000000000001-ab"
    assert session_id(1, "00000000000000ff-cd", "ab") == "0000000000000100-ab"


def test_a_session_that_cannot_be_stored_leaves_no_file(tmp_path, monkeypatch):
    def full(path, _):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    assert new_session(tmp_path)
    assert list(tmp_path.iterdir()) == []
