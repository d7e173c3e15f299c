"""Attacks that depend on the order of events, and on what a peer makes the broker keep."""

import time

import pytest

from fedmq.broker.core import mailboxes
from fedmq.broker.core.deduplication import DedupWindow
from fedmq.broker.rejections import Code, RejectCode
from fedmq.broker.settings import BrokerSettings, Limits
from tests.attacks.acts import ADMITTED, Stage
from tests.attacks.honest import NODES
from tests.attacks.peer import digest, session_id
from tests.attacks.world import CONFIG, MALLORY, RIGHTS, outcome, public_key, world_of


@pytest.fixture(params=[False, True], ids=["loopback", "keys"])
def keys(request):
    return request.param


@pytest.fixture
def stage(keys, tmp_path):
    settings = BrokerSettings(limits=Limits(runs=3))
    with world_of(tmp_path, keys=keys, settings=settings) as world:
        yield Stage(world)


@pytest.fixture
def keyed(tmp_path):
    """The stage of a broker with keys."""
    with world_of(tmp_path, keys=True) as world:
        yield Stage(world)


def hears(peer):
    return outcome(peer.drain())


def revoke(stage, name=MALLORY):
    stage.world.access.change(**{name: None})
    stage.world.advance(1)


# ---- keys that change in the middle


def test_a_key_that_is_revoked_during_an_upload(keyed):
    mallory, data = keyed.mallory, bytes(1 << 20)
    blobs = [{"digest": digest(data), "size": len(data)}]
    mallory.post("result", "aggregator", blobs=blobs, re=keyed.task["id"], consumes=[keyed.seq])
    assert mallory.wait("want")
    revoke(keyed)
    mallory.drain()
    mallory.send("chunk", data, owner=MALLORY, digest=digest(data), start=0)
    assert hears(mallory) is RejectCode.KEY
    assert not keyed.world.messages(MALLORY)
    keyed.run.round()


def test_the_clients_of_a_revoked_key_are_free_for_others(keyed):
    revoke(keyed)
    rights = RIGHTS["w2"]
    keyed.world.access.change(w2=type(rights)(name="w2", roles=("worker",), runs=("r",)))
    keyed.world.advance(1)
    heir = keyed.world.connect("w2")
    heir.hello("heir", clients=[[9, 9]])
    assert hears(heir) == ADMITTED
    assert [task["id"] for _, task in heir.delivered("task")] == [keyed.task["id"]]
    keyed.run.round()


def test_the_connection_of_a_revoked_key_is_closed(keyed):
    revoke(keyed)
    assert keyed.mallory.wire.peer in keyed.world.closed
    for name in NODES:
        assert keyed.run.peers[name].wire.peer not in keyed.world.closed


def test_a_key_that_is_revoked_while_the_broker_is_down(keyed):
    keyed.world.access.change(mallory=None)
    keyed.world.restart()
    for name in NODES:
        keyed.run.reconnect(name)
    peer = keyed.connect()
    peer.hello(MALLORY, clients=[[9, 9]], session=keyed.mallory.session)
    assert hears(peer) is RejectCode.KEY
    keyed.run.round()


def test_a_key_that_is_replaced_keeps_its_names_and_its_thief_loses_them(keyed):
    """The owner of w1 draws another key, because the first one was stolen."""
    old = RIGHTS["w1"]
    fields = {"roles": old.roles, "clients": old.clients, "runs": old.runs}
    new = type(old)(name="w1", replaces=(public_key("w1"),), **fields)
    keyed.world.access.change(w1=None, fresh=new)
    keyed.world.advance(1)
    thief = keyed.world.connect("w1")
    thief.hello("w1", clients=[[0, 4]])
    assert hears(thief) is RejectCode.KEY
    own = keyed.world.connect("fresh")
    own.hello("w1", clients=[[0, 4]])
    assert hears(own) == ADMITTED
    keyed.run.peers["w1"] = own
    keyed.run.round()


def test_a_key_whose_rights_no_longer_hold_its_role(keyed):
    keyed.world.access.change(mallory=type(RIGHTS["eva"])(name=MALLORY, roles=("observer",)))
    keyed.world.advance(1)
    mallory = keyed.mallory
    mallory.post("result", "aggregator", re=keyed.task["id"], consumes=[keyed.seq])
    assert hears(mallory) in {RejectCode.ROLE, RejectCode.KEY}
    assert not keyed.world.messages(MALLORY)
    keyed.run.round()


def test_rights_that_shrink_and_grow_again(keyed):
    for _ in range(3):
        revoke(keyed)
        keyed.world.access.change(mallory=RIGHTS[MALLORY])
        keyed.world.advance(1)
        peer = keyed.connect()
        peer.hello(MALLORY, clients=[[9, 9]])
        assert hears(peer) == ADMITTED
    keyed.run.round()


def test_an_invite_that_cannot_be_stored(keyed):
    """The answer says so, and no key is admitted that a restart would forget."""
    keyed.world.access.fails = "no space left on the device"
    peer = keyed.world.connect("invite")
    for _ in range(3):
        peer.send("enroll", key=public_key("new"))
        assert hears(peer) is RejectCode.INVITE
    assert public_key("new") not in keyed.world.access.access.keys
    keyed.world.access.fails = ""
    keyed.world.advance(10)
    peer.send("enroll", key=public_key("new"))
    assert hears(peer) == "enrolled"
    keyed.run.round()


def test_an_invite_in_a_flood_is_stored_once(keyed):
    """Each use is a write that is synced: a repeated one is answered from memory."""
    stored = []
    enroll = keyed.world.access.enroll
    keyed.world.access.enroll = lambda *use: stored.append(use) or enroll(*use)
    peer = keyed.world.connect("invite")
    for number in range(50):
        peer.send("enroll", key=public_key("new"))
        peer.send("enroll", key=public_key(f"other-{number}"))
        peer.send("enroll", key=public_key("aggregator"))
    assert len(stored) == 1
    keyed.run.round()


def test_what_an_invites_key_may_do_after_its_use_is_nothing(keyed):
    peer = keyed.world.connect("invite")
    peer.send("enroll", key=public_key("new"))
    assert hears(peer) == "enrolled"
    peer.hello("new", clients=[[9, 9]])
    assert hears(peer) is RejectCode.KEY
    peer.post("result", "aggregator")
    assert hears(peer) is RejectCode.KEY
    own = keyed.world.connect("new")
    own.hello("new")
    assert hears(own) == ADMITTED
    keyed.run.round()


# ---- sessions and connections


def test_a_name_during_its_lease(stage):
    """Its connection is gone, its lease is not over: a stranger gets neither name nor client."""
    stage.run.peers["w1"].wire.is_up = False
    stage.world.advance(3)
    for name, clients in (("w1", [[0, 4]]), ("w1", []), ("other", [[0, 0]])):
        thief = stage.connect()
        thief.hello(name, clients=clients)
        assert hears(thief) in {RejectCode.NAME, RejectCode.CLIENT}
    stage.run.reconnect("w1")
    stage.run.round()


def test_two_sessions_of_one_key_under_two_names(stage):
    second = stage.connect()
    second.hello("mallory-2", clients=[[9, 9]], key="m")
    assert hears(second) is RejectCode.CLIENT
    second.hello("mallory-2", key="m")
    assert hears(second) == ADMITTED
    second.post("result", "aggregator", re=stage.task["id"], consumes=[stage.seq])
    assert hears(second) is Code.NOT_ASKED
    stage.run.round()


def test_one_connection_under_many_names(stage):
    """A connection that changes its name leaves the session that it had."""
    for number in range(20):
        stage.mallory.hello(f"name-{number}", session=session_id())
        assert hears(stage.mallory) == ADMITTED
        stage.mallory.post("result", "aggregator", re=stage.task["id"], consumes=[stage.seq])
        stage.mallory.n = 0
        stage.mallory.drain()
    alive = [node.name for node in stage.world.driver.core._sessions.alive()]
    assert len(alive) == len(NODES) + 1
    assert not stage.world.messages(MALLORY)
    stage.run.round()


@pytest.mark.parametrize("got", [0, 1, 1 << 40, 1 << 62])
def test_a_hello_that_claims_to_have_every_delivery(stage, got):
    mallory = stage.mallory
    mallory.hello(MALLORY, clients=[[9, 9]], key="m", got=got, first=got)
    mallory.drain()
    stage.run.ask(9)
    stage.world.advance(1)
    mallory.hello(MALLORY, clients=[[9, 9]], key="m", got=0, first=1 << 62)
    mallory.drain()
    stage.run.round()


def test_a_session_that_repeats_its_hello(stage):
    """A Hello is costly, so `Limits.costly_per_s` bounds them; each takes milliseconds."""
    for _ in range(15):
        stage.run.ask(9, stage.run.version.to_bytes(2, "big") * 100_000)
    mallory = stage.mallory
    mallory.drain()
    for _ in range(200):
        mallory.hello(MALLORY, clients=[[9, 9]], key="m", got=0)
    size = sum(len(part) for parts in mallory.wire.arrived for part in parts)
    mallory.drain()
    assert size < 25e6
    stage.world.advance(2)
    assert len(mallory.delivered("task")) == 16
    stage.run.round()


def test_a_node_that_reconnects_some_times_gets_its_messages_at_once(stage):
    stage.run.ask(0)
    for _ in range(3):
        stage.run.reconnect("w1")
        assert stage.run.peers["w1"].delivered("task")
    stage.run.round()


def test_frames_of_an_earlier_session_are_not_those_of_the_next(stage):
    """Recorded frames of w1, sent again by another, are not w1's."""
    w1 = stage.run.peers["w1"]
    result = w1.message("result", "aggregator", {"num_examples": 1}, re=stage.theirs)
    for n in (0, w1.n, stage.mallory.n):
        stage.mallory.send("post", message=result, n=n, consumes=[stage.their_seq])
    stage.mallory.n += 1
    assert hears(stage.mallory) is Code.NOT_OWN
    stage.run.round()


def test_chunks_that_wait_for_a_connection_are_not_for_the_next_with_its_routing_id(keyed):
    w1 = keyed.run.peers["w1"]
    keyed.world.not_reading.add(w1.wire.peer)
    [blob] = keyed.their_task["blobs"]
    w1.want("aggregator", blob["digest"], 0, blob["size"])
    w1.wire.is_up = False
    peer = keyed.world.connect(MALLORY, peer=w1.wire.peer)
    peer.send("beat")
    keyed.world.not_reading.clear()
    keyed.world.advance(1)
    assert not any(buffers for _, buffers in peer.drain())
    keyed.run.reconnect("w1")
    keyed.run.round()


# ---- what a peer makes the broker do


def test_a_rejected_post_takes_no_longer_because_of_its_body(stage):
    """48 KiB of empty lists took 40 ms to decode and check: 25 a second kept the broker busy."""
    mallory = stage.mallory
    message = mallory.message("result", "aggregator", {"x": [[]] * 46_000})
    frames = [mallory.frame("post", message=message) for _ in range(200)]
    began = time.perf_counter()
    for frame in frames:
        mallory.raw(frame)
    assert time.perf_counter() - began < 1.0
    assert hears(mallory) is Code.NOT_ASKED
    stage.run.round()


# ---- what a peer makes the broker keep


def test_a_client_rejects_its_task_again_and_again(stage):
    before = len(stage.world.entries())
    for _ in range(100):
        stage.mallory.send("done", refused={stage.seq: "no" * 900}, codes={stage.seq: "x" * 40})
    assert len(stage.world.entries()) - before <= 4
    agg = stage.run.peers["aggregator"]
    agg.drain()
    [(seq, message)] = agg.delivered("refused")
    assert message["re"] == stage.task["id"]
    agg.deliveries.pop(seq)
    agg.send("done", seqs=[seq])
    stage.run.round()


def test_another_nodes_posts_do_not_empty_the_window_of_ids(stage):
    """An aggregator that restarts posts again what it posted since its last checkpoint."""
    ids = stage.world.driver.core._mailboxes
    ids.leader_window = ids.dedup_window = ids.rejected_window = DedupWindow(64)
    body = {"client": 0, "model_version": 0}
    task = stage.run.peers["aggregator"].message("task", "client/0", body, id="aggregator/x")
    agg = stage.run.peers["aggregator"]
    agg.send("post", message=task)
    for _ in range(200):
        stage.mallory.post("result", "aggregator")
    agg.send("post", message=task)
    stage.world.advance(0.2)
    assert [each.id for each in stage.world.messages()].count("aggregator/x") == 1


def test_another_runs_posts_do_not_empty_the_window_of_ids(stage, keys):
    if keys:
        pytest.skip("the attacker's key may not open runs")
    ids = stage.world.driver.core._mailboxes
    ids.leader_window = DedupWindow(64)
    agg = stage.run.peers["aggregator"]
    body = {"client": 0, "model_version": 0}
    task = agg.message("task", "client/0", body, id="aggregator/x")
    agg.send("post", message=task)
    other = stage.connect()
    other.hello("aggregator", "aggregator", "q", config=CONFIG, total_clients=1)
    for _ in range(200):
        other.post("version", "record")
    agg.send("post", message=task)
    stage.world.advance(0.2)
    assert [each.id for each in stage.world.messages()].count("aggregator/x") == 1


def test_runs_that_end_at_once(stage, keys):
    """A run that has ended is not free either: its entry, and what the broker keeps of it."""
    if keys:
        pytest.skip("the attacker's key may not open runs")
    codes = set()
    for number in range(300):
        peer = stage.connect()
        peer.hello("a", "aggregator", f"run-{number}", config="x" * 20_000, total_clients=1)
        codes.add(hears(peer))
        peer.send("over", reason="next")
        peer.send("bye")
    runs = stage.world.driver.core._mailboxes.runs
    kept = sum(len(run.config) for run in runs.values() if run.over)
    assert RejectCode.LIMIT in codes or kept < 1e6
    stage.run.round()


def test_very_many_timers(stage, keys, monkeypatch):
    """Each stays in memory until it is due; other runs still set theirs."""
    if keys:
        pytest.skip("the attacker's key may not open runs")
    monkeypatch.setattr(mailboxes, "MAX_TIMERS", 100)
    monkeypatch.setattr(mailboxes, "_FEW_TIMERS", 10)
    peer = stage.connect()
    peer.hello("a", "aggregator", "q", config=CONFIG, total_clients=1)
    assert hears(peer) == ADMITTED
    heard = []
    for number in range(120):
        peer.post("timer", "timer", {"token": f"t{number}", "after_s": 1e9})
        heard.append(hears(peer))
    assert heard == ["ignored"] * 100 + [Code.LIMIT] * 20
    agg = stage.run.peers["aggregator"]
    agg.post("timer", "timer", {"token": "mine", "after_s": 1})
    stage.world.advance(2)
    agg.drain()
    assert [each["body"]["token"] for _, each in agg.delivered("tick")] == ["mine"]
    stage.run.round()


@pytest.mark.parametrize("to", ["record", "checkpoint", "aggregator"])
def test_messages_without_blobs_count_as_disk_too(keys, tmp_path, to):
    """The limits of disk are of what a node makes the ledger store, in blobs or in messages.

    An aggregator has a reserve beyond it, `CONTROL_BYTES`.
    """
    if keys:
        pytest.skip("the attacker's key may not open runs")
    settings = BrokerSettings(limits=Limits(node_disk=2 << 20))
    with world_of(tmp_path, keys=False, settings=settings) as world:
        stage = Stage(world)
        peer = stage.connect()
        peer.hello("a", "aggregator", "q", config=CONFIG, total_clients=1)
        codes = set()
        for _ in range(300):
            peer.post("note", to, {"x": "x" * 40_000})
            codes.add(hears(peer))
        assert Code.LIMIT in codes
        stage.run.round()


def test_rejected_posts_are_counted_and_small(stage):
    """Each is recorded with its reason; `Limits.costly_per_s` bounds them."""
    size = sum(path.stat().st_size for path in stage.world.folder.glob("messages-*"))
    for number in range(300):
        stage.mallory.post("task", "client/0", {"x": "x" * 40_000}, id=f"{number:0200}")
    stage.world.advance(1)
    grown = sum(path.stat().st_size for path in stage.world.folder.glob("messages-*")) - size
    assert grown < 300 * 1200
    assert stage.world.charged == 300
    stage.run.round()


def test_one_key_does_not_take_all_places_of_those_who_wait(tmp_path):
    """Nodes of the run that come before its aggregator wait, too."""
    settings = BrokerSettings(limits=Limits(waiting=20))
    with world_of(tmp_path, keys=True, settings=settings) as world:
        for number in range(50):
            peer = world.connect(MALLORY)
            peer.hello(f"early-{number}")
        early = world.connect("w1")
        early.hello("w1", clients=[[0, 4]], key="secret of w1")
        assert hears(early) == "waits"


def test_a_name_of_an_authorised_key_is_that_keys(keyed):
    """Another key cannot take it before its node has joined."""
    keyed.world.access.change(late=RIGHTS["w1"].__class__(name="late", roles=("worker",)))
    keyed.world.advance(1)
    thief = keyed.connect()
    thief.hello("late")
    assert hears(thief) is RejectCode.NAME
    own = keyed.world.connect("late")
    own.hello("late")
    assert hears(own) == ADMITTED


def test_one_key_does_not_take_all_names_of_a_run(tmp_path):
    with world_of(tmp_path, keys=True, settings=BrokerSettings(limits=Limits(nodes=20))) as world:
        stage = Stage(world)
        answers = []
        for number in range(20):
            peer = stage.connect()
            peer.hello(f"name-{number}")
            answers.append(hears(peer))
            peer.send("bye")
        assert answers.count(ADMITTED) < 12
        assert answers[-1] is RejectCode.LIMIT
        world.access.change(late=RIGHTS["w1"].__class__(name="late", roles=("worker",)))
        world.advance(1)
        own = world.connect("late")
        own.hello("late")
        assert hears(own) == ADMITTED
