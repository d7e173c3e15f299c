"""Which keys a node uses: those given, those stored, and those that it joins with."""

import errno
import io
import os
import stat

import pytest
from structlog.testing import capture_logs

from fedmq.broker.access import private_files
from fedmq.broker.access.curve import KeyPair, NodeKeys
from fedmq.broker.access.invites import InviteToken
from fedmq.broker.access.key_files import known_brokers, new_key, read_key
from fedmq.broker.enrolment import EnrolmentError, EnrolmentFault
from fedmq.broker.errors import AccessError, GaveUp
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.keys import joining
from fedmq.nodes.keys.folder import secret_for
from fedmq.nodes.keys.joining import ConnectionOptions, credentials, leaves_this_host

HERE, THERE = "tcp://127.0.0.1:7700", "tcp://192.0.2.7:7700"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "fedmq" / "keys"


@pytest.fixture
def handed_in(monkeypatch):
    """Return the keys that were handed in; entries of ``faults`` make the attempts fail."""

    class HandedIn(list):
        def __init__(self):
            super().__init__()
            self.faults, self.now = [], 0.0

        def __call__(self, token, key, timeout_s):
            assert timeout_s > 0
            self.now += timeout_s
            if self.faults:
                fault = self.faults.pop(0)
                raise EnrolmentError(f"it is {fault.value}", fault)
            self.append((token.address, key))

    monkeypatch.setattr(joining, "enroll", found := HandedIn())
    monkeypatch.setattr(joining.time, "monotonic", lambda: found.now)
    return found


def connect(endpoint=None, **options):
    return credentials(ConnectionOptions(endpoint, **options), HERE)


def an_invite(tmp_path, address=THERE):
    token = InviteToken(address, KeyPair.new().public, KeyPair.new())
    path = tmp_path / "invite"
    path.write_text(f"{token.text()}\n")
    path.chmod(0o600)
    return token, path


# ---- without keys


def test_a_broker_of_this_host_needs_no_keys_and_no_words(folder):
    with capture_logs() as log:
        found = connect()
    assert (found.endpoint, found.keys, found.secret) == (HERE, None, secret_for(HERE))
    assert log == []
    assert {each.name for each in folder.iterdir()} == {"keyless.secret"}


def test_a_node_with_a_folder_needs_nothing_of_its_user(folder):
    found = credentials(ConnectionOptions(), HERE, stateless=False)
    assert (found.keys, found.secret) == (None, "")
    assert not folder.exists()


def test_a_connection_to_another_host_without_keys_is_warned_of_once(folder):
    with capture_logs() as log:
        assert connect(THERE).keys is None
    [warning] = log
    assert warning["log_level"] == "warning"
    assert "neither encrypted nor authenticated" in warning["event"]
    assert warning["endpoint"] == THERE
    assert "stored" not in warning


def test_the_warning_names_addresses_for_which_a_key_is_stored(folder):
    new_key(folder, "node")
    for address in ("tcp://host-a.invalid:7700", "tcp://host-b.invalid:7701"):
        connect(address, broker_key=KeyPair.new().public).remember()
    with capture_logs() as log:
        assert connect(THERE).keys is None
    assert [each["stored"] for each in log] == ["tcp://host-a.invalid:7700"]


@pytest.mark.parametrize(
    ("text", "beyond"),
    [
        ("tcp://127.0.0.1:1", False),
        ("tcp://127.3.2.1:1", False),
        ("tcp://[::1]:1", False),
        ("tcp://localhost:1", False),
        ("ipc://x", False),
        ("127.0.0.1", False),
        ("tcp://0.0.0.0:1", True),
        ("tcp://*:1", True),
        ("tcp://[::]:1", True),
        (THERE, True),
        ("tcp://no.such.host.invalid:1", True),
    ],
)
def test_what_stays_on_this_host(text, beyond):
    assert leaves_this_host(text) is beyond


def test_a_user_without_a_home_connects_without_keys(monkeypatch):
    monkeypatch.setattr("fedmq.nodes.keys.folder.user_folder", lambda: None)
    with capture_logs() as log:
        assert connect().keys is None
    assert ["cannot store this user's secret" in each["event"] for each in log] == [True]


# ---- with the broker's key


def test_a_brokers_key_is_stored_at_the_first_start_and_used_at_the_next(folder, tmp_path):
    own, broker = new_key(folder, "node"), KeyPair.new().public
    public = tmp_path / "broker.pub"
    public.write_text(f"{broker}\n")
    expected = NodeKeys(own, broker)
    first = connect(THERE, broker_key=str(public))
    assert first.keys == expected
    first.remember()
    with capture_logs() as log:
        found = connect(THERE)
    assert found.remember is None
    assert (found.keys, found.secret, log) == (expected, "", [])
    assert connect(HERE).keys is None
    assert stat.S_IMODE((folder / "brokers.json").stat().st_mode) == 0o600


def test_the_variable_names_the_brokers_key_and_the_option_goes_first(folder, monkeypatch):
    new_key(folder, "node")
    one, two = KeyPair.new().public, KeyPair.new().public
    monkeypatch.setenv("FEDMQ_BROKER_KEY", one)
    first = connect(THERE)
    assert first.keys.broker == one
    first.remember()
    with capture_logs() as log:
        second = connect(THERE, broker_key=two)
        assert (second.keys.broker, log) == (two, [])
        second.remember()
    assert [each["stored"] for each in log] == [one]
    assert known_brokers(folder) == {THERE: two}


def test_a_key_that_its_broker_has_not_proved_replaces_no_other(folder):
    new_key(folder, "node")
    right, wrong = KeyPair.new().public, KeyPair.new().public
    connect(THERE, broker_key=right).remember()
    assert connect(THERE, broker_key=wrong).keys.broker == wrong
    assert connect(THERE).keys.broker == right


def test_none_in_place_of_a_key_connects_without_keys_and_forgets_nothing(folder):
    new_key(folder, "node")
    broker = KeyPair.new().public
    connect(HERE, broker_key=broker).remember()
    assert connect(HERE, broker_key="none").keys is None
    assert connect(HERE).keys.broker == broker


def test_another_key_of_this_user_is_named(folder):
    new_key(folder, "node")
    other = new_key(folder, "gpu")
    broker = KeyPair.new().public
    found = connect(THERE, broker_key=broker, key="gpu")
    assert found.keys.own == other
    found.remember()
    with pytest.raises(ConfigError, match=r"no key cpu in .*`fedmq keys new cpu`"):
        connect(THERE, key="cpu")


def test_a_node_without_a_key_learns_how_to_make_one(folder):
    with pytest.raises(ConfigError, match=r"no key node in .*`fedmq keys new`, and authorise it"):
        connect(THERE, broker_key=KeyPair.new().public)


def test_over_a_unix_socket_there_are_no_keys(folder, monkeypatch):
    monkeypatch.setenv("FEDMQ_BROKER_KEY", KeyPair.new().public)
    assert connect("ipc://x").keys is None
    with pytest.raises(ConfigError, match=r"ipc://x: .* use no keys"):
        connect("ipc://x", broker_key=KeyPair.new().public)


# ---- with an invite


def test_a_node_with_an_invite_makes_a_key_once_and_knows_the_broker_afterwards(
    folder, tmp_path, handed_in
):
    token, path = an_invite(tmp_path)
    first = connect(join_file=str(path))
    own = read_key(folder, "node")
    assert (first.endpoint, first.keys) == (THERE, NodeKeys(own, token.broker))
    assert handed_in == [(THERE, own.public)]
    assert connect(join_file=str(path)) == first
    assert connect(THERE) == first
    assert stat.S_IMODE((folder / "node.key").stat().st_mode) == 0o600


def test_an_address_on_the_command_line_replaces_that_of_the_invite(folder, tmp_path, handed_in):
    _, path = an_invite(tmp_path)
    other = "tcp://192.0.2.8:7700"
    assert connect(other, join_file=str(path)).endpoint == other
    assert [address for address, _ in handed_in] == [other]
    assert set(known_brokers(folder)) == {other}


@pytest.mark.parametrize("fault", [EnrolmentFault.REFUSED, EnrolmentFault.UNKNOWN_INVITE])
def test_an_invite_that_is_over_serves_a_node_that_has_joined_and_no_other(
    folder, tmp_path, handed_in, fault
):
    token, path = an_invite(tmp_path)
    handed_in.faults = [fault]
    with pytest.raises(EnrolmentError):
        connect(join_file=str(path))
    assert known_brokers(folder) == {}
    connect(join_file=str(path))
    handed_in.faults = [fault]
    assert connect(join_file=str(path)).keys == NodeKeys(read_key(folder, "node"), token.broker)


def test_what_has_another_key_than_the_invites_broker_is_not_joined(folder, tmp_path, handed_in):
    _, path = an_invite(tmp_path)
    connect(join_file=str(path))
    handed_in.faults = [EnrolmentFault.OTHER_BROKER]
    with pytest.raises(EnrolmentError):
        connect(join_file=str(path))
    with pytest.raises(ConfigError, match="the invite is for a broker with another key"):
        connect(join_file=str(path), broker_key=KeyPair.new().public)


def test_an_invite_is_not_used_up_if_the_brokers_key_cannot_be_stored(
    folder, tmp_path, handed_in, monkeypatch
):
    """As when the node's key is mounted read-only."""
    new_key(folder, "node")
    _, path = an_invite(tmp_path)

    def read_only(path, flags, mode=0o777):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return os.open(path, flags, mode)

    monkeypatch.setattr(private_files, "open_file", read_only)
    with pytest.raises(AccessError, match=r"read-only file system: .* not used; .* --keys DIR"):
        connect(join_file=str(path))
    assert handed_in == []


def test_a_node_may_start_before_its_broker(folder, tmp_path, handed_in):
    _, path = an_invite(tmp_path)
    handed_in.faults = [EnrolmentFault.NO_ANSWER] * 3
    with capture_logs() as log:
        connect(join_file=str(path))
    assert len(handed_in) == 1
    waiting = [each["event"] for each in log if "waiting for the broker" in each["event"]]
    assert waiting == [f"waiting for the broker at {THERE} for {s} s" for s in (3, 10, 30)]
    handed_in.faults = [EnrolmentFault.NO_ANSWER] * 3
    with pytest.raises(GaveUp, match=r"gave up: waiting for the broker at .* for 12 s; it did not"):
        connect(join_file=str(path), give_up_s=12.0)


def test_an_invite_comes_from_standard_input_or_from_the_variable(
    folder, tmp_path, handed_in, monkeypatch
):
    token, _ = an_invite(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"  {token.text()}\n"))
    assert connect(join_file="-").keys.broker == token.broker
    monkeypatch.setenv("FEDMQ_JOIN", token.text())
    assert connect().endpoint == THERE
    assert len(handed_in) == 2
    assert connect().endpoint == HERE  # no process that the node starts gets it


def test_a_file_that_others_can_read_is_warned_of(folder, tmp_path, handed_in):
    _, path = an_invite(tmp_path)
    path.chmod(0o644)
    with capture_logs() as log:
        connect(join_file=str(path))
    assert f"other users of this host can read the invite in {path}" in log[0]["event"]


def test_a_file_that_is_missing_or_holds_no_invite_is_one_sentence(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"--join-file: cannot read .*: no such file"):
        connect(join_file=str(tmp_path / "none"))
    (tmp_path / "other").write_text("hello")
    with pytest.raises(AccessError, match="expected an invite"):
        connect(join_file=str(tmp_path / "other"))
    (tmp_path / "other").write_text("")
    with pytest.raises(AccessError, match=r"expected an invite that .*, got nothing"):
        connect(join_file=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="use no keys"):
        connect("ipc://x", join_file=str(an_invite(tmp_path)[1]))


# ---- key folders that cannot be used


def test_a_home_that_is_no_folder_stops_no_node_without_keys(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("FEDMQ_KEYS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert connect().keys is None


def test_a_broker_key_that_cannot_be_stored_is_used_with_a_warning(folder, monkeypatch):
    def fails(*_):
        raise AccessError("cannot write: read-only file system")

    new_key(folder, "node")
    monkeypatch.setattr(joining, "add_broker", fails)
    broker = KeyPair.new().public
    with capture_logs() as log:
        found = connect(THERE, broker_key=broker)
        found.remember()
    assert found.keys.broker == broker
    assert [each["log_level"] for each in log] == ["warning"]
    assert "give --broker-key at each start" in log[0]["event"]
