"""Which keys a broker uses, and what its operator learns."""

import shlex

import pytest

from fedmq.broker.access.key_files import new_key
from fedmq.broker.errors import AccessError
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.keys import serving
from fedmq.nodes.keys.serving import broker_keys, how_to_connect, unused_keys

HERE, ALL = "tcp://127.0.0.1:7700", "tcp://*:7700"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(serving.socket, "gethostname", lambda: "host-a")
    return tmp_path / "config" / "fedmq" / "keys"


def test_on_this_host_a_broker_uses_keys_only_if_its_operator_names_them(folder):
    own = new_key(folder, "broker")
    assert broker_keys([HERE, "ipc://x"], None, insecure=False) is None
    assert broker_keys([HERE], folder, insecure=False).own == own


def test_an_operator_whose_broker_uses_no_keys_learns_how_it_would(folder):
    assert unused_keys() == ""
    new_key(folder, "node")
    assert unused_keys() == ""
    new_key(folder, "broker")
    assert f"--keys {folder} makes it use the key there" in unused_keys()


def test_beyond_this_host_it_uses_the_users_keys_unless_anybody_may_connect(folder):
    assert broker_keys([ALL], None, insecure=False) is None  # and BrokerServer refuses
    own = new_key(folder, "broker")
    assert broker_keys([HERE, ALL], None, insecure=False).own == own
    assert broker_keys([ALL], None, insecure=True) is None


def test_what_contradicts_itself_or_is_missing_is_one_sentence(folder, tmp_path):
    new_key(folder, "broker")
    with pytest.raises(ConfigError, match="leave out --keys, or --insecure"):
        broker_keys([ALL], folder, insecure=True)
    other = tmp_path / "other keys"
    with pytest.raises(ConfigError) as caught:
        broker_keys([HERE], other, insecure=False)
    assert f"`fedmq keys new broker --keys '{other}'`" in str(caught.value)


def test_a_users_folder_that_cannot_be_opened_is_named_with_what_to_do(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(file))
    assert unused_keys() == ""
    assert broker_keys([HERE], None, insecure=False) is None
    with pytest.raises(AccessError, match=r"not a directory\. .*--keys DIR .*--insecure"):
        broker_keys([ALL], None, insecure=False)


@pytest.mark.parametrize(
    ("endpoints", "address"),
    [
        (["tcp://[::]:7700"], "tcp://host-a:7700"),
        (["ipc://x", "tcp://192.0.2.1:7"], "tcp://192.0.2.1:7"),
        (["tcp://127.0.0.1:1", "tcp://192.0.2.1:7"], "tcp://192.0.2.1:7"),
        (["tcp://127.0.0.1:1"], "tcp://127.0.0.1:1"),
        (["tcp://[2001:db8::1]:7"], "tcp://[2001:db8::1]:7"),
    ],
)
def test_the_operator_gets_the_public_key_and_a_command_for_nodes(folder, endpoints, address):
    new_key(folder, "broker")
    keys = broker_keys([ALL], None, insecure=False)
    first, _, *command = how_to_connect(keys, endpoints)
    assert first == f"public key: {keys.own.public}"
    assert shlex.split("".join(command).replace("\\", "")) == [
        *("fedmq", "worker", "--connect", address),
        *("--broker-key", keys.own.public, "--clients", "FIRST-LAST"),
    ]
    assert list(how_to_connect(keys, ["ipc://x"])) == [first]
