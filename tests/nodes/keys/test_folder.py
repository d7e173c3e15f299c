"""The folder of a user's keys, and the secret of nodes without a key or a folder."""

import stat
import threading

import pytest
from structlog.testing import capture_logs

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.keys.folder import key_folder, secret_for

HERE, THERE = "tcp://127.0.0.1:7700", "tcp://host-b:7700"


def modes(folder):
    return {each.name: stat.S_IMODE(each.stat().st_mode) for each in [folder, *folder.iterdir()]}


def test_the_folder_is_the_one_given_then_the_variables_then_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert key_folder() == tmp_path / "fedmq" / "keys"
    monkeypatch.setenv("FEDMQ_KEYS", "elsewhere")
    assert str(key_folder()) == "elsewhere"
    assert key_folder(tmp_path) == tmp_path


def test_without_a_home_an_error_says_which_option_names_a_folder(monkeypatch):
    monkeypatch.setattr("fedmq.nodes.keys.folder.user_folder", lambda: None)
    with pytest.raises(ConfigError, match=r"--keys DIR or set FEDMQ_KEYS"):
        key_folder()


def test_a_users_nodes_prove_their_names_with_one_secret_for_each_broker(tmp_path):
    folder = tmp_path / "new" / "keys"
    first = secret_for(HERE, folder)
    assert secret_for(HERE, folder) == first != secret_for(THERE, folder)
    assert 32 == len(first) <= 64
    assert modes(folder) == {"keys": 0o700, "keyless.secret": 0o600}
    assert first not in (folder / "keyless.secret").read_text()
    assert secret_for(HERE, tmp_path / "another user") != first


def test_nodes_that_start_at_once_agree_on_the_secret(tmp_path):
    folder, found = tmp_path / "keys", []
    threads = [
        threading.Thread(target=lambda: found.append(secret_for(HERE, folder))) for _ in range(16)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 16
    assert len(set(found)) == 1
    assert [each.name for each in folder.iterdir()] == ["keyless.secret"]


@pytest.mark.parametrize("fault", ["a file", "damaged", "no home"])
def test_a_secret_that_cannot_be_stored_is_random_and_a_warning_says_so(
    tmp_path, monkeypatch, fault
):
    folder = tmp_path / "keys"
    match fault:
        case "a file":
            folder.write_text("")
            reason = f"cannot read {folder / 'keyless.secret'}: not a directory"
        case "damaged":
            folder.mkdir(mode=0o700)
            (folder / "keyless.secret").write_text("")
            (folder / "keyless.secret").chmod(0o600)
            reason = f"{folder / 'keyless.secret'} is damaged; remove it"
        case _:
            folder = None
            monkeypatch.setattr("fedmq.nodes.keys.folder.user_folder", lambda: None)
            reason = "no home"
    with capture_logs() as log:
        assert secret_for(HERE, folder) != secret_for(HERE, folder)
    assert [each["log_level"] for each in log] == ["warning", "warning"]
    assert "if this node restarts" in log[0]["event"]
    assert reason in log[0]["reason"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("tcp://127.0.0.1:7911", "tcp://localhost:7911", True),
        ("tcp://127.0.0.1:7911", "tcp://[::1]:7911", True),
        ("tcp://LocalHost:7911", "tcp://localhost:7911", True),
        ("tcp://Lab.example:7911", "tcp://lab.example:7911", True),
        ("tcp://127.0.0.1:7911", "tcp://127.0.0.1:7912", False),
        ("tcp://lab.example:7911", "tcp://localhost:7911", False),
    ],
)
def test_the_secret_depends_on_the_broker_and_not_on_the_spelling_of_its_address(
    tmp_path, one, other, same
):
    folder = tmp_path / "keys"
    assert (secret_for(one, folder) == secret_for(other, folder)) is same
