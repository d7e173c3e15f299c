"""Attacks that were seen to work on an earlier version, and need real sockets, nodes or files.

The others are in test_table.py.
"""

import contextlib
import os
import stat
import subprocess
import sys
import threading
import time

import msgpack
import psutil
import pytest
import zmq

from fedmq.broker.settings import BrokerSettings, Limits
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.worker.program import run_worker
from tests.attacks.live import BEAT_S, LEASE_S, LiveRun, living
from tests.attacks.peer import VERSION, Dealer, Peer, digest, say, shake_hands, tcp
from tests.attacks.test_live import answer
from tests.attacks.world import CONFIG

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize("name", ["sympy:solve", "torch.hub:load", "os:system", "builtins:exec"])
@pytest.mark.parametrize("table", ["problem", "algorithm", "schedule"])
def test_a_configuration_that_names_any_callable(tmp_path, name, table):
    """A shell command ran on every worker that waited."""
    mark = tmp_path / "executed"
    code = f"__import__('os').system('touch {mark}')"
    config = f'[{table}]\nname = "{name}"\nf = "{code}"\ncommand = "touch {mark}"\n'
    run = LiveRun(tmp_path / "ledger", 1)
    try:
        with run.peer() as peer:
            peer.hello("aggregator", "aggregator", "harmless", config=config, total_clients=4)
            assert answer(peer) == "admitted"
            with pytest.raises(ConfigError):
                run_worker(run.endpoint, "waiting", [(0, 3)], "worker", give_up_s=5.0)
    finally:
        run.stop()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["{}/out", "../out", "a/../../out", "\x1b[2J"])
def test_a_broker_that_names_a_path_as_the_run(tmp_path, name):
    """The worker made that folder, and wrote a client's state there."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        welcome = {"v": VERSION, "kind": "welcome", "run": name.format(tmp_path)}
        welcome |= {"beat_s": 1.0, "lease_s": 5.0, "config": CONFIG}

        def admit():
            peer, *_ = socket.recv_multipart()
            socket.send_multipart([peer, msgpack.packb(welcome)])

        thread = threading.Thread(target=admit)
        thread.start()
        with pytest.raises(NodeError, match="run name"):
            run_worker(
                f"tcp://127.0.0.1:{port}", "w", [(0, 0)], "worker", folder=tmp_path / "in" / "w"
            )
        thread.join(5)
        socket.linger = 0
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_wants_that_are_never_read(tmp_path):
    """3,000 of a blob of 1 MB took 0.9 GB."""
    limits = Limits(queued_bytes=4 << 20)
    settings = BrokerSettings(lease_s=LEASE_S, beat_s=BEAT_S, limits=limits)
    with living(tmp_path, settings=settings) as run, run.peer() as peer:
        peer.wire.socket.rcvhwm = 1
        peer.hello("a", "aggregator", "q", config=CONFIG, total_clients=1)
        assert answer(peer) == "admitted"
        blob = os.urandom(1 << 20)
        peer.post("run", "checkpoint", buffers=[blob])
        assert peer.wait("receipt")
        process = psutil.Process()
        before = process.memory_info().rss
        for _ in range(400):
            peer.want("a", digest(blob), 0, 1 << 20)
        run.goes_on()
        assert process.memory_info().rss - before < 100e6
        run.goes_on()


def test_a_flood_of_small_messages(tmp_path):
    """194,000 of them in 10 s turned 20.5 versions a second into 0.2."""
    settings = BrokerSettings(lease_s=LEASE_S, beat_s=BEAT_S, limits=Limits(messages_per_s=500.0))
    with living(tmp_path, settings=settings) as run:
        run.goes_on(20.0)
        with run.peer() as peer:
            peer.hello("mallory", key="m")
            assert answer(peer) == "admitted"
            until = time.monotonic() + 1.0
            sent = 0
            while time.monotonic() < until:
                with contextlib.suppress(zmq.Again):
                    for _ in range(200):
                        peer.post("result", "aggregator", re="aggregator/1")
                        sent += 1
                peer.drain()
            assert sent > 2000
            before = run.versions()
            run.goes_on()
            rejected = [each for each in run.messages("refused") if each.to == "node/mallory"]
            assert len(rejected) < 2000
        run.goes_on()
        assert run.versions() > before


def says_nothing(raw):
    """Hold a TCP connection."""


def shakes_hands(raw):
    """Finish the handshake of ZeroMQ."""
    raw.settimeout(0.2)
    with contextlib.suppress(OSError):  # the broker closes it: there are too many
        shake_hands(raw)


def says_something(raw):
    """Send a frame of this protocol, but no Hello."""
    raw.settimeout(0.2)
    with contextlib.suppress(OSError):
        shake_hands(raw)
        say(raw, msgpack.packb({"v": VERSION, "kind": "beat"}))


@pytest.mark.parametrize("act", [says_nothing, shakes_hands, says_something])
def test_connections_at_few_files(tmp_path, act):
    """With 100 silent connections, no new node was admitted for 31 s."""
    endpoint = f"tcp://127.0.0.1:{_free_port()}"
    command = [sys.executable, "-P", "-m", "fedmq.nodes", "broker", "--bind", endpoint]
    few_files = ["bash", "-c", 'ulimit -n 96; exec "$@"', "bash"]
    broker = subprocess.Popen(
        [*few_files, *command, "--run", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with contextlib.ExitStack() as stack:
            _wait_for(endpoint)
            nodes = [Dealer(endpoint) for _ in range(2)]
            for each in nodes:
                stack.callback(each.close)
            first, second = map(Peer, nodes)
            first.hello("a", "aggregator", "q", config=CONFIG, total_clients=1)
            assert answer(first) == "admitted"
            for _ in range(100):
                act(stack.enter_context(tcp(endpoint)))
            began = time.monotonic()
            found = None
            while found != "admitted":  # a node says Hello again after a reconnect
                assert time.monotonic() - began < 5.0
                second.hello("w", run="q")
                found = answer(second, 0.5)
            first.send("beat")
            assert first.wait("beat"), "the node that was admitted before has lost its connection"
    finally:
        broker.terminate()
        broker.wait(10)


def _free_port():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        return socket.bind_to_random_port("tcp://127.0.0.1")


def _wait_for(endpoint, timeout_s=10.0):
    until = time.monotonic() + timeout_s
    while True:
        try:
            tcp(endpoint).close()
        except OSError:
            assert time.monotonic() < until, "the broker does not listen"
            time.sleep(0.05)
        else:
            return


def test_another_local_user_reads_nothing(tmp_path):
    """Keys and ledgers had mode 0644, and the keys of nodes stood in entries."""
    folder = tmp_path / "ledger"
    run = LiveRun(folder, 2, until_idle=True)
    run.start_nodes()
    run.join()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert all("key" not in each.body for each in run.messages("joined"))


@pytest.mark.parametrize("accuracy", [2.0, float("inf"), float("nan")])
def test_the_first_evaluator_names_any_accuracy(tmp_path, accuracy):
    """The run ended as having reached its target."""
    with living(tmp_path, target_accuracy=0.9, without=("eva",)) as run, run.peer() as peer:
        peer.hello("eva", "evaluator", key="m")
        assert peer.wait("welcome")
        found = None
        while found is None:
            peer.listen(0.1)
            found = next(iter(peer.delivered("evaluate")), None)
        seq, message = found
        body = {"metrics": {"accuracy": accuracy}}
        peer.post("score", "aggregator", body, consumes=[seq], re=message["id"])
        assert answer(peer) != "ignored"
        run.goes_on()
        assert not run.messages("finished")
