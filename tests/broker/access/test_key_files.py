"""Key files and the brokers that a user's nodes know."""

import errno
import os

import pytest

from fedmq.broker.access import private_files
from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.key_files import (
    add_broker,
    key_names,
    known_brokers,
    new_key,
    own_key,
    public_key,
    read_key,
)
from fedmq.broker.errors import AccessError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


def mode_of(path):
    return path.stat().st_mode & 0o777


def test_a_new_key_is_read_back_and_only_its_owner_may_read_it(folder):
    pair = new_key(folder, "node")
    assert read_key(folder, "node") == pair == own_key(folder, "node")
    assert pair.secret not in repr(pair)
    assert mode_of(folder) == 0o700
    assert mode_of(folder / "node.key") == mode_of(folder / "node.pub") == 0o600
    assert public_key(str(folder / "node.pub")) == public_key(pair.public) == pair.public
    assert key_names(folder) == ["node"]
    assert pair.secret not in (folder / "node.pub").read_text()


def test_a_key_is_never_overwritten(folder):
    pair = new_key(folder, "node")
    with pytest.raises(AccessError, match=r"node.key exists"):
        new_key(folder, "node")
    assert read_key(folder, "node") == pair
    assert sorted(path.name for path in folder.iterdir()) == ["node.key", "node.pub"]


def test_own_key_draws_a_key_where_there_is_none(folder):
    with pytest.raises(FileNotFoundError, match=r"there is no key .*node.key"):
        read_key(folder, "node")
    assert own_key(folder, "node") == read_key(folder, "node")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o611])
def test_a_key_that_others_may_open_is_refused_with_the_command_that_mends_it(folder, mode):
    pair = new_key(folder, "node")
    path = folder / "node.key"
    path.chmod(mode)
    with pytest.raises(AccessError, match=rf"got {mode:04o}: run `chmod 600 {path}`"):
        read_key(folder, "node")
    path.chmod(0o400)
    assert read_key(folder, "node") == pair
    folder.chmod(0o755)
    with pytest.raises(AccessError, match=rf"got 0755: run `chmod 700 {folder}`"):
        read_key(folder, "node")
    with pytest.raises(AccessError, match="chmod 700"):
        new_key(folder, "other")


def test_a_key_of_another_user_is_refused(folder, monkeypatch):
    new_key(folder, "node")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(AccessError, match=r"belongs to .*: run `sudo chown \d+ .* --keys DIR"):
        read_key(folder, "node")


@pytest.mark.parametrize(
    "damage", [lambda text: text[:60], lambda text: text.replace("public", "")]
)
def test_a_damaged_key_is_named(folder, damage):
    new_key(folder, "node")
    path = folder / "node.key"
    path.write_text(damage(path.read_text()))
    with pytest.raises(AccessError, match=r"node.key is damaged: expected the lines"):
        read_key(folder, "node")
    other = KeyPair.new()
    path.write_text(f"public {other.public}\nsecret {KeyPair.new().secret}\n")
    with pytest.raises(AccessError, match="does not belong to its secret"):
        read_key(folder, "node")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101])
def test_invalid_names_are_refused(folder, name):
    with pytest.raises(AccessError, match="invalid name of a key"):
        new_key(folder, name)


@pytest.mark.parametrize("text", ["", "short", "~" * 40, "#" * 40, "é" * 40])
def test_text_that_is_not_a_key_is_refused(text, tmp_path):
    with pytest.raises(AccessError, match=r"expected a public key: 40 characters of Z85, got"):
        public_key(text)
    path = tmp_path / "x.pub"
    path.write_text(text)
    with pytest.raises(AccessError, match=r"x.pub: expected a public key"):
        public_key(str(path))


def test_a_secret_is_not_shown_in_an_error():
    with pytest.raises(AccessError) as error:
        KeyPair.of("my secret that is not a key")
    assert "my secret" not in str(error.value)


def test_known_brokers_are_kept_by_address(folder):
    first, second = KeyPair.new().public, KeyPair.new().public
    assert known_brokers(folder) == {}
    add_broker(folder, "tcp://a:7700", first)
    add_broker(folder, "tcp://b:7700", first)
    add_broker(folder, "tcp://a:7700", second)
    assert known_brokers(folder) == {"tcp://a:7700": second, "tcp://b:7700": first}
    (folder / "brokers.json").write_text('{"tcp://a:7700": "no key"}')
    with pytest.raises(AccessError, match=r"brokers.json is damaged: expected the public"):
        known_brokers(folder)


def test_the_lock_is_waited_for_and_then_reported(folder, monkeypatch):
    monkeypatch.setattr(private_files, "_LOCK_WAIT_S", 0.02)
    private_files.make_key_folder(folder)
    path = folder / "x.json"
    held = r"another process has been holding .*x.json.lock"
    with (
        private_files.locked(path),
        pytest.raises(AccessError, match=held),
        private_files.locked(path),
    ):
        pass
    with private_files.locked(path):
        pass


def test_a_public_file_that_is_missing_is_written_from_the_key(folder):
    pair = new_key(folder, "node")
    (folder / "node.pub").unlink()
    with pytest.raises(AccessError, match="exists"):
        new_key(folder, "node")
    assert (folder / "node.pub").read_text() == f"{pair.public}\n"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_key_is_written_where_there_are_no_hard_links(tmp_path, monkeypatch, code):
    def link(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(private_files.os, "link", link)
    folder = tmp_path / "keys"
    pair = new_key(folder, "node")
    assert read_key(folder, "node") == pair
    with pytest.raises(AccessError, match="exists"):
        new_key(folder, "node")
    assert read_key(folder, "node") == pair
    assert not [*folder.glob(".*")]
