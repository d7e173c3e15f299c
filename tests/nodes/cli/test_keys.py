"""``fedmq keys``: what each command stores, prints and refuses."""

import json
import shlex
import stat

import pytest
from click.testing import CliRunner

from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.invites import PREFIX, parse_token
from fedmq.broker.access.key_files import add_broker, read_key
from fedmq.broker.access.rights import Rights
from fedmq.nodes.cli import keys as keys_module
from fedmq.nodes.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The key folder of a user on the broker's host, who has the broker's key."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(keys_module.socket, "gethostname", lambda: "host-a")
    done("new", "broker")
    return tmp_path / "config" / "fedmq" / "keys"


def done(*words):
    result = CliRunner().invoke(main, ["keys", *words], terminal_width=80)
    assert result.exit_code == 0, result.output
    return result


def refused(*words):
    result = CliRunner().invoke(main, ["keys", *words])
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line


def a_key():
    return KeyPair.new().public


def allowed(folder):
    return {each.name: each for each in AccessFile(folder).load().keys.values()}


# ---- new


def test_a_new_key_prints_its_public_half_and_the_command_that_comes_next(folder):
    result = done("new")
    pair = read_key(folder, "node")
    assert result.stdout == f"{pair.public}\n"
    assert pair.secret not in result.output
    command = result.stderr.split("or other roles):\n")[1]
    assert shlex.split(command.replace("\\\n", "")) == [
        *("fedmq", "keys", "authorize", pair.public, "--name", "host-a"),
        *("--role", "worker", "--clients", "FIRST-LAST"),
    ]
    command = command.replace("FIRST-LAST", "0-9")
    assert done(*shlex.split(command.replace("\\\n", ""))[2:]).exit_code == 0
    assert allowed(folder)["host-a"].key == pair.public
    assert {each.name for each in folder.glob("node.*")} == {"node.key", "node.pub"}
    assert stat.S_IMODE((folder / "node.key").stat().st_mode) == 0o600


def test_the_command_after_a_brokers_key_starts_the_broker_with_the_same_folder(folder, tmp_path):
    other = tmp_path / "other keys"
    result = done("new", "broker", "--keys", str(other))
    assert result.stdout == f"{read_key(other, 'broker').public}\n"
    [command] = [line for line in result.stderr.splitlines() if line.startswith("  fedmq")]
    assert shlex.split(command) == [
        *("fedmq", "broker", "--bind", "tcp://*:7700", "--run", "runs/first"),
        *("--keys", str(other)),
    ]


def test_no_key_replaces_another(folder):
    before = (folder / "broker.key").read_bytes()
    assert "the key broker exists in" in refused("new", "broker")
    (folder / "broker.pub").unlink()
    assert "`fedmq keys list` shows it" in refused("new", "broker")
    assert (folder / "broker.pub").read_text() == f"{read_key(folder, 'broker').public}\n"
    assert "invalid name of a key" in refused("new", "../broker")
    assert (folder / "broker.key").read_bytes() == before


# ---- authorize


def test_a_key_is_authorised_as_text_or_as_a_file_with_what_it_may_do(folder, tmp_path):
    key, public = a_key(), tmp_path / "host-b.pub"
    public.write_text(f"{key}\n")
    words = ("--role", "worker", "--clients", "0-4,5-9,12", "--run", "first", "--run", "second")
    result = done("authorize", str(public), *words)
    assert result.output == "authorised host-b: worker; clients 0-9, 12; runs first, second\n"
    expected = Rights(
        name="host-b", key=key, roles=("worker",), clients=((0, 9), (12, 12)),
        runs=("first", "second"),
    )  # fmt: skip
    assert allowed(folder) == {"host-b": expected}
    result = done("authorize", key, "--name", "host-b", "--role", "worker", "--read-files")
    assert result.output == (
        "authorised host-b: worker; all clients; all runs; reads the ledger's files\n"
    )
    other = a_key()
    done("authorize", other, "--role", "aggregator", "--role", "evaluator")
    [name] = set(allowed(folder)) - {"host-b"}
    assert name.startswith("key-")
    assert allowed(folder)[name].roles == ("aggregator", "evaluator")


def test_a_new_key_replaces_an_old_one_with_its_name_and_rights(folder):
    old, new = a_key(), a_key()
    done("authorize", old, "--name", "host-b", "--role", "worker", "--clients", "0-9")
    result = done("authorize", new, "--replace", "host-b")
    assert result.output == ("authorised host-b: worker; clients 0-9; all runs; replaces 1 key\n")
    assert allowed(folder)["host-b"].key == new
    assert allowed(folder)["host-b"].replaces == (old,)
    assert "no key has the name 'host-c': there are host-b" in refused(
        "authorize", a_key(), "--replace", "host-c"
    )
    assert "leave out the other options" in refused(
        "authorize", a_key(), "--replace", "host-b", "--role", "worker"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--name", "x"], "expected --role, one or more of aggregator, evaluator, worker"),
        (["--name", "a b", "--role", "worker"], "--name: expected 1 to 100 ASCII letters"),
        (["--name", "local", "--role", "worker"], "the name 'local' is reserved"),
        (["--role", "boss"], "--role: expected one of aggregator, evaluator, worker"),
        (["--role", "worker", "--clients", "9-3"], "--clients: expected the lower number first"),
        (["--role", "evaluator", "--clients", "0"], "--clients: only workers host clients"),
        (["--role", "worker", "--run", "../x"], "--run: expected 1 to 100 ASCII letters"),
    ],
)
def test_rights_that_make_no_sense_are_refused(folder, words, sentence):
    assert sentence in refused("authorize", a_key(), *words)
    assert not (folder / "access.json").exists()


def test_a_secret_and_what_is_no_key_are_refused(folder, tmp_path):
    role = ("--role", "worker")
    sentence = refused("authorize", str(folder / "broker.key"), *role)
    assert f"{folder / 'broker.key'} holds a secret key: use {folder / 'broker.pub'}" in sentence
    assert "expected a public key: 40 characters" in refused("authorize", "x" * 39, *role)
    assert "cannot read" in refused("authorize", str(tmp_path / "none.pub"), *role)


def test_a_key_authorised_where_no_broker_has_a_key_is_stored_with_a_hint(folder, tmp_path):
    result = done("authorize", a_key(), "--role", "worker", "--keys", str(tmp_path / "elsewhere"))
    assert "has no key of a broker" in " ".join(result.stderr.split())
    assert len(allowed(tmp_path / "elsewhere")) == 1


def test_others_may_not_open_the_folder(folder):
    folder.chmod(0o755)
    command = f"run `chmod 700 {folder}`"
    for words in (["new"], ["list"], ["revoke", "x"], ["invite", "--role", "worker"]):
        assert command in refused(*words)
    folder.chmod(0o700)
    (folder / "broker.key").chmod(0o644)
    assert f"run `chmod 600 {folder / 'broker.key'}`" in refused("invite", "--role", "worker")


# ---- revoke


def test_a_key_is_revoked_by_its_name_or_by_itself(folder):
    one, two = a_key(), a_key()
    for name, key in (("one", one), ("two", two)):
        done("authorize", key, "--name", name, "--role", "worker")
    result = done("revoke", "one")
    assert result.stdout == "revoked one\n"
    assert "  fedmq keys authorize KEY --replace one\n" in result.stderr
    assert done("revoke", two).stdout == "revoked two\n"
    assert allowed(folder) == {}
    assert "no key or invite is 'one'" in refused("revoke", "one")
    assert f"revoked keys: 2\n  one                   {one[:8]}\n" in done("list").stdout
    new = a_key()
    done("authorize", new, "--replace", "one")
    assert allowed(folder)["one"].replaces == (one,)
    assert "revoked keys: 1\n" in done("list").stdout


def test_a_key_is_revoked_by_its_beginning_if_no_other_begins_so(folder):
    key = a_key()
    done("authorize", key, "--name", "one", "--role", "worker")
    assert "no key or invite is" in refused("revoke", key[:7])
    assert done("revoke", key[:8]).stdout == "revoked one\n"


def test_a_beginning_of_several_keys_revokes_none(folder):
    names = ("one", "two")
    for name in names:
        done("authorize", a_key(), "--name", name, "--role", "worker")
    path = AccessFile(folder).path
    content = json.loads(path.read_text())
    for rights in content["keys"]:
        rights["key"] = "abcdefgh" + rights["key"][8:]
    path.write_text(json.dumps(content))
    assert "several keys begin with 'abcdefgh': there are one, two" in refused("revoke", "abcdefgh")
    assert set(allowed(folder)) == set(names)


# ---- invite


def test_only_the_invite_goes_to_standard_output(folder):
    result = done("invite", "--role", "worker", "--clients", "10-19", "--uses", "4", "--for", "2d")
    token = parse_token(result.stdout)
    assert token.address == "tcp://host-a:7700"
    assert token.broker == read_key(folder, "broker").public
    assert PREFIX not in result.stderr
    assert "invite: worker; clients 10-19; all runs; 4 uses, valid for 2 days" in result.stderr
    assert "fedmq worker --clients 10-19 --join-file INVITE" in result.stderr
    [stored] = AccessFile(folder).load().invites.values()
    assert stored.rights.key == token.own.public
    assert stored.uses == 4
    assert token.own.secret not in (folder / "access.json").read_text()


def test_invites_have_names_of_their_own(folder):
    role = ("invite", "--role", "evaluator", "--address", "tcp://10.0.0.1:9")
    for words in ((), (), ("--name", "gpus"), ()):
        assert parse_token(done(*role, *words).stdout).address == "tcp://10.0.0.1:9"
    names = {each.rights.name for each in AccessFile(folder).load().invites.values()}
    assert names == {"invite", "invite-2", "gpus", "invite-3"}
    assert done("revoke", "invite-2").output == "revoked invite-2\n"
    assert len(AccessFile(folder).load().invites) == 3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--for", "1"], "--for: expected a time such as 30m, 1h or 2d, got '1'"),
        (["--for", "0h"], "--for: expected a time such as 30m, 1h or 2d, got '0h'"),
        (["--for", "999999999d"], "--for: expected a time such as 30m"),
        (["--for", "1.5h"], "--for: expected a time such as 30m"),
        (["--uses", "0"], "--uses: expected a whole number from 1, got 0"),
        (["--address", "host-a:7700"], "--address: expected tcp://HOST:PORT or ipc://PATH"),
        (["--address", "tcp://*:7700"], "--address: expected the broker's host"),
        (["--address", "ipc://x"], "--address: expected tcp://HOST:PORT"),
    ],
)
def test_invites_that_make_no_sense_are_refused(folder, words, sentence):
    assert sentence in refused("invite", "--role", "worker", *words)
    assert not (folder / "access.json").exists()


def test_an_invite_needs_the_brokers_key(folder, tmp_path):
    other = tmp_path / "other"
    sentence = refused("invite", "--role", "worker", "--keys", str(other))
    assert f"run `fedmq keys new broker --keys {other}` first, on the broker's host" in sentence


@pytest.mark.parametrize("words", [["--join-file"], [], ["--clients", "0"]])
def test_an_invite_on_the_command_line_is_refused_and_not_shown(tmp_path, words):
    token = "fedmq-invite-1:c2VjcmV0"  # noqa: S105 - no secret
    for command in (["worker", *words, token], ["worker", f"--join-file={token}"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        [line] = result.output.splitlines()
        assert line.startswith("fedmq: an invite on a command line can be read by other users")
        assert "--join-file FILE" in line
        assert "c2VjcmV0" not in line


# ---- list


def test_the_list_shows_each_key_with_its_rights_and_each_invite_with_its_state(
    folder, monkeypatch
):
    key = a_key()
    done("authorize", key, "--name", "host-b", "--role", "worker", "--clients", "0-9")
    done("invite", "--role", "worker", "--uses", "2", "--for", "1h", "--name", "gpus")
    text = done("list").stdout
    assert f"{key[:8]}  worker; clients 0-9; all runs" in text
    assert key not in text
    assert "open, 2 uses left, until 20" in text
    [stored] = AccessFile(folder).load().invites.values()
    for used in (a_key(), a_key()):
        AccessFile(folder).enroll(used, stored.rights.key, 0.0)
    assert "used up; worker" in done("list").stdout
    monkeypatch.setattr(keys_module.time, "time", lambda: 1e10)
    assert "expired, 0 uses left; worker" in done("list").stdout


def test_the_list_has_the_keys_of_this_folder_and_the_brokers_that_it_knows(folder):
    other = a_key()
    add_broker(folder, "tcp://host-c:7700", other)
    text = done("list").stdout
    assert "authorised keys: none" in text
    assert f"  broker                {read_key(folder, 'broker').public}\n" in text
    assert f"  tcp://host-c:7700     {other}\n" in text


def test_a_damaged_file_hides_no_other_and_its_error_says_what_to_do(folder):
    done("new")
    done("authorize", a_key(), "--name", "host-b", "--role", "worker")
    add_broker(folder, "tcp://host-c:7700", a_key())
    names = ("node.key", "access.json", "brokers.json")
    whole = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).write_bytes(b"{")
        result = CliRunner().invoke(main, ["keys", "list"])
        assert result.exit_code == 2
        [line] = result.stderr.splitlines()
        assert line.startswith(f"fedmq: {folder / name} is ")
        assert "or remove it" in line or "restore it" in line
        assert "cannot be used" in result.stdout
        assert read_key(folder, "broker").public in result.stdout
        assert ("host-b" in result.stdout) is (name != "access.json")
        (folder / name).write_bytes(whole[name])
    for name in names:
        (folder / name).write_bytes(b"{")
    assert len(CliRunner().invoke(main, ["keys", "list"]).stderr.splitlines()) == 3
    line = refused("new")
    assert f"{folder / 'node.key'} is damaged" in line
    assert "or remove it, run `fedmq keys new node`" in line


def test_the_list_fits_a_terminal(folder):
    runs = [word for number in range(20) for word in ("--run", f"run-number-{number}")]
    done("authorize", a_key(), "--name", "x" * 60, "--role", "worker", *runs)
    clients = ",".join(str(each) for each in range(0, 60, 2))
    done("authorize", a_key(), "--name", "y", "--role", "worker", "--clients", clients)
    done("invite", "--role", "worker", "--name", "z" * 30)
    add_broker(folder, "tcp://a-host-with-a-long-name.example.org:7700", a_key())
    folder_line, *lines = done("list").stdout.splitlines()
    assert folder_line == str(folder)  # a path is not cut, so that it can be copied
    assert [each for each in lines if len(each) > 80] == []


def test_the_list_as_json_has_whole_keys_and_no_secrets(folder):
    key = a_key()
    done("authorize", key, "--name", "host-b", "--role", "worker", "--clients", "0-9")
    token = parse_token(done("invite", "--role", "worker").stdout)
    text = done("list", "--json").stdout
    found = json.loads(text)
    expected = {
        "name": "host-b", "key": key, "roles": ["worker"], "clients": [[0, 9]], "runs": [],
        "read_files": False, "replaces": [],
    }  # fmt: skip
    assert found["keys"] == [expected]
    [invited] = found["invites"]
    assert (invited["key"], invited["open"], invited["uses_left"]) == (token.own.public, True, 1)
    assert found["revoked"] == []
    assert found["own_keys"] == {"broker": read_key(folder, "broker").public}
    for secret in (token.own.secret, read_key(folder, "broker").secret):
        assert secret not in text


@pytest.mark.parametrize("command", [[], ["new"], ["authorize"], ["list"], ["revoke"], ["invite"]])
def test_help_fits_a_terminal(command):
    result = done(*command, "--help")
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
