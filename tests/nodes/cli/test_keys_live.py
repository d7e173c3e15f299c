"""Users on two hosts: keys, an invite, and commands as docs/security.md has them."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.access.invites import parse_token
from fedmq.nodes.cli.main import main

pytestmark = pytest.mark.end_to_end

FEDMQ = (sys.executable, "-P", "-m", "fedmq.nodes")
SMALL = ("--set", "problem.clients=2", "--set", "problem.examples=100", "--set", "run.versions=2")


@pytest.fixture
def user(tmp_path):
    """Return a function that starts a command of a user, who has keys of their own."""
    started = []

    def start(name, *words, given=None):
        process = subprocess.Popen(
            [*FEDMQ, *words],
            cwd=tmp_path,
            env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path / name)},
            stdin=subprocess.PIPE if given is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        if given is not None:
            process.stdin.write(given)
            process.stdin.close()
            process.stdin = None
        return process

    yield start
    for each in started:
        each.kill()
        each.communicate()


def keys(*words):
    result = CliRunner().invoke(main, ["keys", *words])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nodes_with_a_key_and_with_an_invite_take_part_in_a_run(user, tmp_path):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    folders = {name: tmp_path / name / "fedmq" / "keys" for name in ("ana", "ben", "cem")}
    at_broker = ("--keys", str(folders["ana"]))
    broker_key = keys("new", "broker", *at_broker)
    keys("new", *at_broker)
    public = str(folders["ana"] / "node.pub")
    roles = ("--role", "aggregator", "--role", "evaluator", "--read-files")
    keys("authorize", public, "--name", "ana", *roles, *at_broker)
    invite = keys("invite", "--role", "worker", "--clients", "1", "--address", endpoint, *at_broker)

    knows = ("--connect", endpoint, "--broker-key", broker_key)
    nodes = [
        user("ana", "aggregator", *knows, "--set", "run.id=keyed", *SMALL),
        user("ana", "worker", *knows, "--evaluator"),
        user("cem", "worker", "--join-file", "-", "--clients", "1", given=invite),
    ]
    ben = keys("new", "--keys", str(folders["ben"]))
    nodes.append(user("ben", "worker", *knows, "--clients", "0"))
    broker = user("ana", "broker", "--bind", endpoint, *at_broker, "--run", "run", "--once")
    until = time.monotonic() + 30
    while not (tmp_path / "run" / "ledger").is_dir():
        assert time.monotonic() < until
        time.sleep(0.05)
    keys("authorize", ben, "--name", "ben", "--role", "worker", "--clients", "0", *at_broker)
    for node in nodes:
        output, _ = node.communicate(timeout=50)
        assert "the run ended: 2 versions committed" in output
        assert node.returncode == 0
        assert parse_token(invite).own.secret not in output
    output, _ = broker.communicate(timeout=20)
    assert broker.returncode == 0
    assert f"public key: {broker_key}\n" in output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["run"] == "keyed"

    access = AccessFile(folders["ana"]).load()
    assert {each.name for each in access.keys.values()} == {"ana", "ben", "invite-1"}
    assert [each.uses for each in access.invites.values()] == [0]
    known = {name: json.loads((folders[name] / "brokers.json").read_text()) for name in folders}
    assert known == {name: {endpoint: broker_key} for name in folders}


def test_a_broker_beyond_its_host_names_both_ways_to_start(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    command = ["broker", "--bind", "tcp://*:0", "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert "`fedmq keys new broker`" in line
    assert "--insecure" in line
    assert not (tmp_path / "run").exists()
