"""The most telling attacks over real sockets, against real nodes, with and without keys."""

import contextlib
import socket
import threading
import time

import msgpack
import pytest
import zmq

from fedmq.broker.rejections import Code, RejectCode
from fedmq.broker.settings import BrokerSettings
from tests.attacks.live import BEAT_S, LEASE_S, LiveRun, living
from tests.attacks.peer import VERSION, digest, say, session_id, shake_hands, tcp
from tests.attacks.world import MALLORY, outcome

pytestmark = pytest.mark.end_to_end

COLUMNS = pytest.mark.parametrize("keys", [False, True], ids=["loopback", "keys"])
HELLO = {"config": "x", "total_clients": 3}


@pytest.fixture(scope="module", params=[False, True], ids=["loopback", "keys"])
def run(request, tmp_path_factory):
    """A run that goes on for as long as the attacks do."""
    with living(tmp_path_factory.mktemp("live"), keys=request.param) as run:
        run.goes_on(20.0)
        yield run


@contextlib.contextmanager
def admitted(run, node=MALLORY):
    """Connect a raw peer as a worker without clients."""
    with run.peer() as peer:
        peer.hello(node, key="secret of mallory")
        frame, _ = peer.wait("welcome", "reject")
        assert frame["kind"] == "welcome", frame
        yield peer
        peer.send("bye", reason="enough")


def answer(peer, timeout_s=5.0):
    """Return the first typed answer that comes."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found = outcome(peer.listen(0.05))
        if found != "ignored":
            return found
    return "ignored"


# ---- what an admitted worker may not do


@pytest.mark.parametrize(
    ("kind", "to", "code"),
    [
        ("task", "client/0", Code.NOT_ALLOWED),
        ("evaluate", "evaluator", Code.NOT_ALLOWED),
        ("version", "checkpoint", Code.NOT_ALLOWED),
        ("timer", "timer", Code.NOT_ALLOWED),
        ("joined", "aggregator", Code.RESERVED_KIND),
        ("result", "aggregator", Code.NOT_ASKED),
        ("score", "aggregator", Code.NOT_ASKED),
    ],
)
def test_a_worker_posts_nothing_but_answers(run, kind, to, code):
    with admitted(run) as peer:
        peer.post(kind, to, {"token": "x", "after_s": 0, "metrics": {"accuracy": 2.0}})
        assert answer(peer) is code
    run.goes_on()


def test_a_worker_reads_nothing_that_was_not_sent_to_it(run):
    [*_, task] = run.messages("task")
    with admitted(run) as peer:
        for blob in task.blobs:
            peer.want("aggregator", blob.digest, 0, 1)
            assert answer(peer) == "no bytes"
    run.goes_on()


def test_a_worker_does_not_end_the_run(run):
    with admitted(run) as peer:
        peer.send("over", reason="mine")
        assert answer(peer) is RejectCode.UNEXPECTED
    run.goes_on()


@pytest.mark.parametrize("session", [None, "zzzz", "f" * 100])
@pytest.mark.parametrize(
    ("node", "role"), [("w1", "worker"), ("aggregator", "aggregator"), ("second", "aggregator")]
)
def test_names_and_the_place_of_the_aggregator_are_taken(run, node, role, session):
    with run.peer() as peer:
        fields = HELLO if role == "aggregator" else {}
        peer.hello(node, role, session=session or session_id(), **fields)
        expected = {RejectCode.NAME, RejectCode.RUN}
        if run.ring is not None and role == "aggregator":
            expected = {RejectCode.ROLE}
        assert answer(peer) in expected
        peer.send("bye")
    run.goes_on()


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([b"\xc1garbage"], RejectCode.UNREADABLE),
        ([msgpack.packb({"v": [9, 0], "kind": "beat"})], RejectCode.VERSION),
        ([msgpack.packb({"v": VERSION, "kind": "shell"})], RejectCode.UNREADABLE),
        ([b"x" * 70_000], RejectCode.UNREADABLE),
    ],
)
def test_bytes_that_are_no_frame_are_rejected(run, parts, code):
    with run.peer() as peer:
        peer.raw(*parts)
        assert answer(peer) is code
    run.goes_on()


def test_very_many_clients_cost_nothing(run):
    with run.peer() as peer:
        began = time.monotonic()
        for _ in range(50):
            peer.hello("greedy", clients=[[0, 1 << 20]])
            assert answer(peer) in {RejectCode.LIMIT, RejectCode.CLIENT}
        assert time.monotonic() - began < 2.0
    run.goes_on()


def test_a_key_is_handed_in_with_an_invite_only(run):
    with run.peer() as peer:
        peer.send("enroll", key="k" * 40)
        assert answer(peer) in {RejectCode.UNEXPECTED, RejectCode.INVITE}
    run.goes_on()


def test_silent_connections_keep_nobody_out(run):
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(tcp(run.endpoint))
        began = time.monotonic()
        with admitted(run):
            assert time.monotonic() - began < 3.0
        run.goes_on()


def test_a_second_connection_with_the_routing_id_of_another_gets_nothing(run):
    with run.peer(routing_id=b"same") as first:
        first.hello(MALLORY, key="secret of mallory")
        assert answer(first) == "admitted"
        with run.peer(routing_id=b"same") as second:
            second.send("beat")
            assert answer(second, 0.5) == "ignored"
        first.send("beat")
        assert first.wait("beat")
        first.send("bye")
    run.goes_on()


def test_metadata_of_a_handshake_proves_nothing(run):
    """A hand-written client claims a User-Id in its READY command."""
    header = msgpack.packb(
        {"v": VERSION, "kind": "hello", "node": "aggregator", "role": "aggregator"}
        | {"session": session_id(), "run": "r", **HELLO}
    )
    heard = b""
    with tcp(run.endpoint) as raw, contextlib.suppress(OSError):
        raw.settimeout(2.0)
        shake_hands(raw, User_Id=b"aggregator", Peer_Address=b"127.0.0.1")
        say(raw, header)
        while b"reject" not in heard:
            heard += raw.recv(1 << 16)
    assert b"welcome" not in heard
    assert (b"reject" in heard) == (run.ring is None)  # with keys, it fails at the handshake
    run.goes_on()


# ---- strangers, with keys


@pytest.mark.parametrize("stranger", ["no keys", "an unknown key", "the key of another broker"])
def test_a_stranger_fails_at_the_handshake(tmp_path, stranger):
    with living(tmp_path, keys=True) as run:
        public, secret, broker = run.ring.of_peer("stranger")
        keys = {
            "no keys": None,
            "an unknown key": (public, secret, broker),
            "the key of another broker": (*run.ring.of_peer(MALLORY)[:2], public),
        }[stranger]
        with run.peer(keys=keys) as peer:
            assert peer.wire.handshake() is not zmq.Event.HANDSHAKE_SUCCEEDED
            with contextlib.suppress(zmq.Again):
                peer.hello("w1")
            assert peer.wait("welcome", "reject", timeout_s=0.5) is None
        run.goes_on()


def test_a_key_that_is_revoked_ends_its_connection_and_cannot_return(tmp_path):
    with living(tmp_path, keys=True) as run:
        run.goes_on(20.0)
        with admitted(run) as peer:
            rights = dict(run.ring.store.access.keys)
            del rights[run.ring.public(MALLORY)]
            run.ring.store.access = type(run.ring.store.access)(keys=rights, keyless=None)
            peer.send("beat")
            assert answer(peer) is RejectCode.KEY
            with run.peer() as again:
                assert again.wire.handshake() is not zmq.Event.HANDSHAKE_SUCCEEDED
        run.goes_on()


# ---- a whole run among attackers


@COLUMNS
def test_a_run_among_attackers_ends_with_the_model_that_it_has_alone(tmp_path, keys):
    digests = []
    for attacked in (False, True):
        settings = BrokerSettings(lease_s=LEASE_S, beat_s=BEAT_S, only_run="r")
        run = LiveRun(tmp_path / str(attacked), 15, settings, keys=keys, until_idle=True)
        over = threading.Event()
        attackers = threading.Thread(target=attack, args=(run, over))
        run.start_nodes()
        try:
            run.goes_on(20.0)
            if attacked:
                attackers.start()
            run.join()
        finally:
            over.set()
            run.stop()
        if attacked:
            attackers.join(20.0)
        assert run.ends["aggregator"] == "15 versions committed", run.ends
        digests.append(run.messages("version")[-1].body["model_digest"])
    assert digests[0] == digests[1]


def attack(run, over):
    """Attack a run in every way that these tests know, until it is over."""
    number = 0
    with run.peer() as inside, run.peer() as outside, contextlib.suppress(zmq.Again, OSError):
        inside.hello(MALLORY, key="secret of mallory")
        while not over.wait(0.005):
            number += 1
            task = {"client": 0, "model_version": 0, "reply": 0}
            inside.post("task", f"client/{number % 3}", task, id=f"aggregator/{number}")
            inside.post("result", "aggregator", {"num_examples": 1}, re=f"aggregator/{number}")
            inside.post("score", "aggregator", {"metrics": {"accuracy": 9.0}})
            inside.post("tick", "aggregator", {"token": "final"})
            inside.send("done", seqs=list(range(200)), refused={number: "no"})
            inside.want("aggregator", digest(b"model"), 0, 1)
            inside.send("over", reason="mine")
            outside.raw(b"\xc1garbage")
            outside.hello(f"run-{number}", "aggregator", f"run-{number}", **HELLO)
            outside.hello("w1", clients=[[0, 1]], session=session_id())
            outside.hello("aggregator", "aggregator", session="zzzz", **HELLO)
            outside.hello("greedy", clients=[[0, 1 << 20]])
            outside.send("bye")
            if number % 10 == 0:
                with contextlib.suppress(OSError), tcp(run.endpoint) as raw:
                    raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    raw.shutdown(socket.SHUT_RDWR)
            inside.drain()
            outside.drain()
