"""The attacks that were seen to work on an earlier version, each against today's broker.

docs/security.md has the same table. Those that need real sockets, processes or nodes are in
test_table_live.py; benchmarks/attacks.py repeats the floods at full strength.
"""

import time

import pytest

from fedmq.broker.rejections import Code, RejectCode
from fedmq.broker.settings import BrokerSettings, Limits
from tests.attacks.acts import ADMITTED, Stage
from tests.attacks.honest import HonestRun
from tests.attacks.peer import digest, session_id
from tests.attacks.world import CONFIG, MALLORY, outcome, world_of

LIMITS = Limits(
    runs=3,
    nodes=40,
    clients=64,
    waiting=20,
    held_bytes=200_000,
    node_disk=8 << 20,
    run_disk=1 << 30,
)


@pytest.fixture(params=[False, True], ids=["loopback", "keys"])
def keys(request):
    return request.param


@pytest.fixture
def world(keys, tmp_path):
    with world_of(tmp_path, keys=keys, settings=BrokerSettings(limits=LIMITS)) as world:
        yield world


@pytest.fixture
def stage(world):
    return Stage(world)


def hears(peer):
    return outcome(peer.drain())


def test_forged_tasks_with_the_ids_that_the_aggregator_will_use_next(stage):
    """The true results were rejected as repeats of an id, and the run waited for ever."""
    stage.mallory.drain()
    for client in range(9):
        name = f"aggregator/{stage.run.next_id + client}"
        stage.mallory.post("task", f"client/{client}", {"client": client}, id=name)
        assert hears(stage.mallory) is Code.NOT_ALLOWED
    for _ in range(3):
        stage.run.round()
    assert stage.run.senders() <= set(stage.run.peers)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_stranger_takes_the_place_of_a_dead_aggregator(stage, keys, restarted):
    """It was handed the checkpoint, kept the true aggregator out, and ended the run."""
    stage.run.lose("aggregator")
    if restarted:
        stage.world.restart()
        stage.world.advance(200)
    thief = stage.connect()
    thief.hello("aggregator", "aggregator", config=CONFIG, total_clients=10)
    frames = thief.drain()
    assert outcome(frames) is (RejectCode.ROLE if keys else RejectCode.NAME)
    assert not any(frame.get("checkpoint") or frame.get("config") for frame, _ in frames)
    thief.send("over", reason="mine")
    for name in ("aggregator", *(("w1", "w2", "eva") if restarted else ())):
        stage.run.join(name)
    stage.run.round()


def test_very_many_runs(stage, keys):
    """9,501 runs took 374 MB, and honest workers could not tell which run was theirs."""
    heard = []
    for number in range(50):
        peer = stage.connect()
        peer.hello("a", "aggregator", f"run-{number}", config=CONFIG, total_clients=1)
        heard.append(hears(peer))
    if keys:
        assert set(heard) == {RejectCode.ROLE}
        late = stage.world.connect("w1")
        late.hello("late", run="", session=session_id())
        assert hears(late) == ADMITTED, "its key's only run is its run"
    else:
        assert heard == [ADMITTED] * 2 + [RejectCode.LIMIT] * 48
    stage.run.round()


def test_a_post_whose_blob_never_comes_and_then_very_many_posts(stage):
    """They were held: 811 MB by connection."""
    mallory = stage.mallory
    lost = [{"digest": digest(b"lost"), "size": 100}]
    mallory.post("result", "aggregator", blobs=lost, re=stage.task["id"], consumes=[stage.seq])
    for _ in range(100):
        mallory.post("result", "aggregator", {"x": "x" * 46_000})
    stage.world.advance(0.2)
    held = [
        len(frame.frame.message)
        for run in stage.world.driver.core._mailboxes.runs.values()
        for node in run.nodes.values()
        for frame in node.pending_frames
        if hasattr(frame, "frame")
    ]
    assert sum(held) <= LIMITS.held_bytes + 48_000
    stage.run.round()


def test_a_hello_with_very_many_clients(stage):
    """Each took 2.5 s, and 93 MB."""
    peer = stage.connect()
    began = time.perf_counter()
    for clients in ([[0, 1 << 20]], [[0, 1 << 62]], [[0, 1 << 20]] * 1000):
        peer.hello("greedy", clients=clients)
        assert hears(peer) in {RejectCode.LIMIT, RejectCode.CLIENT}
    assert time.perf_counter() - began < 0.5
    stage.run.round()


def test_a_run_with_very_many_clients_that_one_node_hosts(stage, keys):
    """The limit of one Hello holds in the attacker's own run, too."""
    peer, other = stage.connect(), stage.connect()
    peer.hello("a", "aggregator", "q", config=CONFIG, total_clients=1 << 20)
    assert hears(peer) == (RejectCode.ROLE if keys else ADMITTED)
    began = time.perf_counter()
    other.hello("greedy", run="q", clients=[[0, (1 << 20) - 1]])
    assert hears(other) in {RejectCode.LIMIT, RejectCode.RUN, RejectCode.CLIENT}
    assert time.perf_counter() - began < 0.2
    stage.run.round()


@pytest.mark.parametrize("run", ["/etc/passwd", "/", "../../x", "a/../../b", "r\0", "~", ".."])
@pytest.mark.parametrize("role", ["worker", "aggregator"])
def test_a_run_id_that_is_a_path(stage, role, run):
    """The worker made that folder, and wrote a client's state there."""
    peer = stage.connect()
    peer.hello("x", role, run, config=CONFIG, total_clients=1)
    assert hears(peer) is RejectCode.RUN
    assert set(stage.world.driver.core._mailboxes.runs) == {"r"}
    stage.run.round()


@pytest.mark.parametrize("session", ["zzzz", "\uffff" * 30, "f" * 120, "ffffffffffffffff-0"])
def test_a_session_that_sorts_after_all_others(stage, keys, session):
    """The true aggregator was rejected ever after, also after a restart of the broker."""
    stage.run.lose("aggregator")
    thief = stage.connect()
    thief.hello("aggregator", "aggregator", session=session, config=CONFIG, total_clients=10)
    thief.send("bye")
    assert hears(thief) in {RejectCode.NAME, RejectCode.ROLE, RejectCode.SESSION}
    stage.run.join("aggregator")
    stage.run.round()
    stage.world.restart()
    for name in ("aggregator", "w1", "w2", "eva"):
        stage.run.join(name)
    stage.run.round()


def test_large_blobs_to_a_client_that_nobody_hosts(stage, keys):
    """1.4 GB of disk in 5 s, for ever."""
    peer = stage.connect()
    peer.hello("a", "aggregator", "q", config=CONFIG, total_clients=1)
    if keys:
        assert hears(peer) is RejectCode.ROLE
        peer = stage.mallory
    peer.drain()
    heard = set()
    for number in range(20):
        blob = number.to_bytes(4, "big") * (1 << 18)
        peer.post("task", "client/0", buffers=[blob])
        heard.add(hears(peer))
    assert heard == ({Code.NOT_ALLOWED} if keys else {"ignored", Code.LIMIT})
    size = sum(path.stat().st_size for path in stage.world.folder.glob("payload-*"))
    honest = sum(map(len, (b"of client 9" * 30_000, b"of client 0" * 30_000))) + (1 << 20)
    assert size < LIMITS.node_disk + honest
    stage.run.round()


def test_large_hellos_before_a_run(world, keys):
    """3,600 of them took 382 MB."""
    heard = set()
    for number in range(100):
        peer = world.connect(MALLORY)
        peer.hello(f"early-{number}", config="x" * 60_000)
        heard.add(hears(peer))
        peer = world.connect(MALLORY)
        peer.hello(f"early-{number}", clients=[[9, 9]] * 1000, config="x" * 20_000)
        heard.add(hears(peer))
    assert heard <= {RejectCode.CONFIG, RejectCode.CLIENT, RejectCode.LIMIT, "waits"}
    kept = [each.hello for each in world.driver.core._admissions.early._waiting.values()]
    assert len(kept) <= LIMITS.waiting
    assert sum(len(hello.config) for hello in kept) == 0
    HonestRun(world)


def test_strangers_wait_for_a_run_before_its_own_nodes(world, keys):
    """Connections that wait are bounded: the run's own nodes still get their places."""
    for number in range(100):
        peer = world.connect(MALLORY)
        peer.hello(f"early-{number}")
    HonestRun(world)


def test_a_flood_of_garbage_is_not_a_flood_of_lines(stage):
    """It wrote 1.6 MB of log a second."""
    before = len(stage.world.logs)
    for number in range(2000):
        stage.mallory.raw(b"\xc1" + number.to_bytes(4, "big"))
    assert hears(stage.mallory) is RejectCode.UNREADABLE
    stage.world.advance(2.0)
    assert len(stage.world.logs) - before <= 3 * LIMITS.log_lines_per_s
    stage.run.round()


def test_a_strangers_second_run_does_not_keep_the_broker_from_ending(keys, tmp_path):
    """`broker --once` did not end."""
    settings = BrokerSettings(limits=LIMITS, only_run="r")
    with world_of(tmp_path, keys=keys, settings=settings) as world:
        stage = Stage(world)
        for name in ("q", "R", "r2"):
            peer = stage.connect()
            peer.hello("a", "aggregator", name, config=CONFIG, total_clients=1)
            assert hears(peer) in {RejectCode.RUN, RejectCode.ROLE}
        stage.run.round()
        agg = stage.run.peers["aggregator"]
        agg.send("over", reason="done")
        for peer in (*stage.run.peers.values(), stage.mallory):
            peer.send("bye")
        world.advance(0.1)
        assert world.driver.core.idle


def test_entries_hold_no_key_of_a_node(stage):
    """Keys stood in `joined` messages."""
    for path in stage.world.folder.glob("messages-*"):
        data = path.read_bytes()
        assert b"joined" in data
        assert b"secret of" not in data
