"""``--allow``, the user's own file, names, and what a configuration of others may import."""

import subprocess
import sys

import msgpack
import pytest
import zmq
from click.testing import CliRunner

from fedmq.algorithms.allowed import NOTHING, Allowed
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.wire.schema import Hello, Welcome
from fedmq.nodes.cli.main import main
from fedmq.nodes.cli.nodes import default_name
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.keys.trust import allowed_here, user_file
from fedmq.nodes.replay.fold import recorded_setup
from fedmq.nodes.run import session
from fedmq.nodes.run.config import build, changed, load, parse
from fedmq.nodes.run.session import linked
from fedmq.nodes.run.setup import set_up
from tests.own_code import OWN_CODE

VECTOR = "tests.sim.tally:Vector"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user whose configuration folder is empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "fedmq").mkdir(parents=True)
    return tmp_path / "config" / "fedmq" / "config.toml"


# ---- who gave the configuration


def test_a_persons_own_configuration_may_name_code_and_the_same_from_the_wire_may_not():
    own = build({"problem": {"name": VECTOR}})
    assert own.allowed == Allowed(names=frozenset({VECTOR}))
    assert set_up(own).config.allowed == own.allowed
    stranger = parse(own.to_toml())
    assert stranger.allowed == changed(stranger, ["run.seed=1"]).allowed == NOTHING
    for refused in (lambda: set_up(stranger), lambda: set_up(own, NOTHING)):
        with pytest.raises(ConfigError, match=r"--allow tests\.sim\.tally"):
            refused()
    assert set_up(stranger, own.allowed).problem.clients == set_up(own).problem.clients


def test_what_one_configuration_names_does_not_allow_what_another_names():
    own = build({"problem": {"name": VECTOR}}).allowed
    other = parse(build({"problem": {"name": "tests.golden.points:Points"}}).to_toml())
    with pytest.raises(ConfigError, match=r"problem\.name.*--allow tests\.golden\.points"):
        set_up(other, own)


def test_the_sentence_names_the_run_the_module_and_the_option():
    for table in ("problem", "algorithm"):
        text = build({table: {"name": "sympy:solve"}}).to_toml()
        with pytest.raises(ConfigError) as caught:
            set_up(parse(text), run="harmless")
        for word in (f"{table}.name", "'harmless'", "'sympy'", "--allow sympy"):
            assert word in str(caught.value)


# ---- --allow and the user's file


def test_modules_are_allowed_by_option_and_by_file(home):
    assert user_file() == home
    assert allowed_here(()) == NOTHING
    home.write_text('allow = ["mine", "their.package"]\n')
    expected = frozenset({"mine", "their.package", "more"})
    assert allowed_here(("more",)) == Allowed(modules=expected)


def test_a_relative_folder_for_configurations_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("config", ""):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert user_file() == tmp_path / ".config" / "fedmq" / "config.toml"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"allow = [", "is not TOML"),
        (b"\xff", "is not TOML"),
        (b"alow = []", "unknown key 'alow'; choose from allow"),
        (b'allow = "mine"', "allow: expected a list of modules, got 'mine'"),
        (b"allow = [3]", "allow: expected names of modules, got 3"),
        (b'allow = ["mine:Class"]', "allow: expected names of modules, got 'mine:Class'"),
        (b'allow = ["*"]', "allow: expected names of modules, got '*'"),
        (b'allow = [""]', "allow: expected names of modules, got ''"),
    ],
)
def test_a_broken_file_is_one_sentence(home, content, words):
    home.write_bytes(content)
    for command in (["worker", "--clients", "0"], ["replay", "x"], ["personalise", "x"]):
        if command[0] != "worker":
            command = [command[0], str(recorded(home.parent.parent.parent))]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert result.output.startswith(f"fedmq: {home}")
        assert words in result.output
        assert result.output.count("\n") == 1


def test_a_file_that_cannot_be_read_is_one_sentence(home):
    home.mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        allowed_here(())


def test_an_option_that_is_no_module_is_refused():
    for wrong in ("", "a:b", "a/b", "..", ".a", "a b"):
        with pytest.raises(ConfigError, match="--allow: expected the name of a module"):
            allowed_here((wrong,))


# ---- a recorded run of a stranger's


def recorded(folder, config=None, run="gift"):
    """Return the folder of a run that has been opened, with any configuration."""
    from fedmq.broker.ledger.entries import Opened
    from fedmq.broker.ledger.writer import Ledger

    target = folder / "stranger"
    if not target.exists():
        text = (config or build({"problem": {"name": "evil:solve"}})).to_toml()
        ledger = Ledger(target / "ledger")
        ledger.append(Opened(seq=0, at=0.0, run=run, config=text, total_clients=4))
        ledger.close()
    return target


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """A stranger's folder with a run, and modules that leave a mark when they are imported."""
    folder = recorded(tmp_path)
    mark = tmp_path / "executed"
    for name in ("evil.py", "triton.py", "readline.py"):
        (folder / name).write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    metadata = folder / "evil-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    groups = ("fedmq.problems", "fedmq.algorithms", "fedmq.codecs")
    points = "".join(f"[{group}]\nevil = evil:solve\n" for group in groups)
    (metadata / "entry_points.txt").write_text(points)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield mark
    sys.modules.pop("evil", None)


@pytest.mark.parametrize(
    "command",
    [
        ["replay", "."],
        ["replay", ".", "--worker", "w"],
        ["replay", ".", "--set", "schedule.size=3"],
        ["replay", ".", "--set", "problem.name=evil:other"],
        ["personalise", "."],
    ],
)
def test_nothing_in_a_strangers_folder_runs(marked, command):
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    for word in ("fedmq: problem.name", "'gift'", "'evil'", "--allow evil"):
        assert word in result.output
    assert not marked.exists()


def test_what_the_person_allows_runs(marked):
    result = CliRunner().invoke(main, ["replay", ".", "--allow", "evil"])
    assert result.exit_code == 2, result.output
    assert "evil:solve does not exist" in result.output
    assert marked.exists()


@pytest.mark.parametrize("table", ["problem", "algorithm"])
def test_settings_of_a_replay_name_nothing_new(tmp_path, table):
    folder = str(recorded(tmp_path, build({"problem": {"name": VECTOR}})))
    setting = ["--set", f"{table}.name=evil:solve"]
    result = CliRunner().invoke(main, ["replay", folder, "--allow", "tests", *setting])
    assert result.exit_code == 2
    assert f"--set {table}.name: cannot be computed from the recorded results" in result.output


def test_an_old_ledger_whose_run_has_another_id_is_still_read(tmp_path):
    config = build({"problem": {"name": VECTOR}})
    config = config.model_copy(update={"run": config.run.model_copy(update={"id": "../old run"})})
    folder = recorded(tmp_path, config, run="../old run")
    assert recorded_setup(Trace(folder), allowed=OWN_CODE).config.run.id == "../old run"
    for command in (["trace", "ls", str(folder)], ["replay", str(folder), "--allow", "tests"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output


# ---- a stranger at the broker


HELLO = {
    "v": [1, 2],
    "kind": "hello",
    "node": "aggregator",
    "role": "aggregator",
    "session": "1",
    "key": "",
    "first": 0,
    "got": 0,
    "clients": [],
    "total_clients": 8,
}


@pytest.mark.end_to_end
def test_a_strangers_run_executes_nothing_on_a_waiting_worker(tmp_path):
    """A peer that speaks the protocol by itself brings a run whose problem is a shell command."""
    mark = tmp_path / "executed"
    command = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    config = f'[problem]\nname = "sympy:solve"\nf = "{command}"\n'
    fedmq = [sys.executable, "-P", "-m", "fedmq.nodes"]
    how = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    bind = ["--bind", "tcp://127.0.0.1:0", "--run", "run"]
    started = [broker := subprocess.Popen([*fedmq, "broker", *bind], **how)]
    try:
        endpoint = broker.stderr.readline().split()[2].rstrip(",")
        options = ["--connect", endpoint, "--clients", "0-3", "--state", "state"]
        started.append(worker := subprocess.Popen([*fedmq, "worker", *options], **how))
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.linger = 0
            peer.connect(endpoint)
            peer.send(msgpack.packb({**HELLO, "run": "harmless", "config": config}))
            sentence = worker.communicate(timeout=60)[1].strip().split("\n")[-1]
    finally:
        for each in started:
            each.kill()
            each.communicate()
    assert worker.returncode == 2
    assert sentence.startswith("fedmq: problem.name of run 'harmless': 'sympy:solve'")
    assert sentence.endswith("add --allow sympy")
    assert not mark.exists()


# ---- names

BAD = ("..", ".", "/etc", "a/b", "../x", "a\n", "\n", "-a", ".a", "_a", "a b", "ä")
BAD = (*BAD, "a\0", "x" * 101)


@pytest.mark.parametrize("name", BAD)
def test_a_node_sends_no_hello_with_a_name_that_is_none(name):
    for fields in ({"node": name}, {"node": "w", "run": name}):
        hello = Hello(role="worker", session="s", **fields)
        with pytest.raises(NodeError, match="expected 1 to 100 ASCII letters"):
            linked("tcp://127.0.0.1:1", hello).__enter__()


@pytest.mark.parametrize("name", BAD)
def test_a_run_cannot_be_given_such_an_id(name):
    with pytest.raises(ConfigError, match=r"run\.id: expected 1 to 100 ASCII letters"):
        build({"run": {"id": name}})
    assert parse(build({}).to_toml().replace('id = ""', 'id = "_old"')).run.id == "_old"


@pytest.mark.parametrize("name", ["a", "0", "run-1", "20261130-1.x_y", "x" * 100])
def test_a_name_that_is_one(name):
    assert load(None, [f'run.id="{name}"']).run.id == name


@pytest.mark.parametrize(("answer", "run"), [*((bad, "") for bad in BAD), ("", ""), ("b", "a")])
def test_a_node_leaves_a_broker_that_welcomes_it_to_no_run_or_another(monkeypatch, answer, run):
    """A run's id becomes the name of a folder of the worker's."""
    closed = []

    class Link:
        def welcome(self):
            return Welcome(run=answer, beat_s=1.0, lease_s=10.0)

        def close(self, reason="", *, failed=False, silent=False):
            closed.append((reason, failed))

    monkeypatch.setattr(session.NodeLink, "connect", lambda *_: Link())
    hello = Hello(node="w", role="worker", session="s", run=run)
    with pytest.raises(NodeError), linked("x", hello):
        raise AssertionError("let in")
    [(reason, failed)] = closed
    assert failed
    assert "run" in reason


HOSTS = ("h", "my-host.example.org", "Büro №5", "", "-x", "_", "h" * 200, "a\n")
RANGES = ([], [(0, 3)], [(7, 7)], [(0, 3), (7, 9)], [(each, each) for each in range(900)])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("clients", RANGES, ids=len)
def test_every_host_and_every_list_of_ranges_makes_a_name(host, clients):
    build({"run": {"id": default_name(host, clients)}})  # checked by the same function


def test_different_hosts_and_ranges_make_different_names():
    many = [(2 * i, 2 * i) for i in range(60)]
    hosts = ("h", "h.0-3", "h-0", "h_0", "h 0", "h/0", "é", "è", "x" * 95, "x" * 96)
    ranges = ([], [(0, 3)], [(0, 0), (3, 3)], [(0, 0)], [(3, 3)], many, many[:-1], many[1:])
    names = {default_name(host, each) for host in hosts for each in ranges}
    assert len(names) == len(hosts) * len(ranges)
