"""What attackers do in a drill: each act takes the stage, and returns who hears the answer."""

from fedmq.broker.access.rights import Rights
from tests.attacks.honest import MODEL, HonestRun
from tests.attacks.peer import digest, session_id
from tests.attacks.world import CLIENTS, CONFIG, MALLORY, RIGHTS, outcome, public_key

ADMITTED = "admitted"


class Stage:
    """An honest run, and an attacker that is admitted to it and has one task of its own."""

    def __init__(self, world):
        self.world, self.run = world, HonestRun(world)
        self.mallory = self.connect()
        self.mallory.hello(MALLORY, clients=[[9, 9]], key="m")
        assert outcome(self.mallory.drain()) == ADMITTED
        self.run.ask(9, b"of client 9" * 30_000)
        self.mallory.drain()
        [(self.seq, self.task)] = self.mallory.delivered("task")
        self.theirs = self.run.ask(0, b"of client 0" * 30_000)
        w1 = self.run.peers["w1"]
        w1.drain()
        self.their_seq, self.their_task = max(w1.delivered("task"))

    def connect(self, key=MALLORY):
        """Return a further connection of the attacker, or one with the key of this name."""
        return self.world.connect(key)


# ---- what an attack sends


def posts(kind, to, body=None, buffers=(), **fields):
    """Post a message as the admitted attacker."""

    def attack(stage):
        stage.mallory.post(kind, to, body, buffers, **fields)
        return stage.mallory

    return attack


def sends(kind, **fields):
    """Send a frame as the admitted attacker."""

    def attack(stage):
        stage.mallory.send(kind, **fields)
        return stage.mallory

    return attack


def raw(*parts):
    """Send bytes as the admitted attacker."""

    def attack(stage):
        stage.mallory.raw(*(each() if callable(each) else each for each in parts))
        return stage.mallory

    return attack


def hellos(node, role="worker", run="r", **fields):
    """Say Hello over a new connection."""

    def attack(stage):
        peer = stage.connect()
        peer.hello(node, role, run, **fields)
        return peer

    return attack


def answers(stage, **fields):
    """Answer the attacker's own task, but with some field that is wrong."""
    stage.mallory.post("result", "aggregator", re=stage.task["id"], consumes=[stage.seq], **fields)
    return stage.mallory


def answers_another_task(stage):
    stage.mallory.post("result", "aggregator", {"num_examples": 1}, re=stage.theirs)
    return stage.mallory


def answers_another_task_and_consumes_it(stage):
    mallory = stage.mallory
    mallory.post("result", "aggregator", {}, re=stage.theirs, consumes=[stage.their_seq])
    return mallory


def answers_twice(stage):
    for _ in range(2):
        stage.mallory.post("result", "aggregator", re=stage.task["id"], consumes=[stage.seq])
    return stage.mallory


def answers_its_own_task_as_a_score(stage):
    stage.mallory.post("score", "aggregator", {"metrics": {"accuracy": 1.0}}, re="aggregator/9")
    return stage.mallory


def answers_without_its_own_delivery(stage):
    """An answer must consume what it answers, else it could be given again and again."""
    stage.mallory.post("result", "aggregator", {"num_examples": 1})
    return stage.mallory


def takes_the_aggregators_next_id(stage):
    name = f"aggregator/{stage.run.next_id}"
    stage.mallory.post("task", "client/0", {"client": 0}, id=name)
    return stage.mallory


def forges_the_aggregators_next_task(stage):
    name = f"aggregator/{stage.run.next_id}"
    stage.mallory.post("task", "client/0", {"client": 0}, id=name, sender="aggregator")
    return stage.mallory


def done_of_others(stage):
    seqs = [seq for peer in stage.run.peers.values() for seq in peer.deliveries]
    stage.mallory.send("done", seqs=[*seqs, stage.their_seq, 1 << 61])
    return stage.mallory


def rejects_the_tasks_of_others(stage):
    stage.mallory.send("done", refused={stage.their_seq: "no"}, codes={stage.their_seq: "stale"})
    return stage.mallory


def wants(stage, owner="aggregator", data=b"", size=1):
    stage.mallory.want(owner, digest(data), 0, size)
    return stage.mallory


def wants_the_model_of_another_client(stage):
    [blob] = stage.their_task["blobs"]
    stage.mallory.want("aggregator", blob["digest"], 0, 1000)
    return stage.mallory


def wants_its_model_after_it_is_done(stage):
    [blob] = stage.task["blobs"]
    stage.mallory.want("aggregator", blob["digest"], 0, 1000)
    frames = stage.mallory.drain()
    assert outcome(frames) == "bytes"
    stage.mallory.send("done", seqs=[stage.seq])
    stage.mallory.want("aggregator", blob["digest"], 0, 1000)
    return stage.mallory


def wants_before_it_says_hello(stage):
    peer = stage.connect()
    peer.want("aggregator", digest(MODEL))
    return peer


def posts_before_it_says_hello(stage):
    peer = stage.connect()
    peer.node, peer.run = MALLORY, "r"
    peer.post("task", "client/0")
    return peer


def takes_a_name(stage, state, node="w1", role="worker", victim="", **fields):
    """Say Hello under an honest node's name while it is connected, away, or not back yet."""
    victim = victim or node
    if state == "away":
        stage.run.lose(victim)
    elif state == "restarted":
        stage.world.restart()
    peer = stage.connect()
    peer.hello(node, role, **fields)
    stage.world.advance(0.2)
    peer.send("bye", reason="mine")
    if state == "away":
        stage.run.join(victim)
    elif state == "restarted":
        for each in stage.run.peers:
            stage.run.reconnect(each)
    return peer


def takes_the_place(stage, state, name="aggregator", **fields):
    """Say Hello as the run's aggregator, with the configuration that every node gets."""
    fields = {"config": CONFIG, "total_clients": CLIENTS, **fields}
    return takes_a_name(stage, state, name, "aggregator", "aggregator", **fields)


def repeats_a_session(stage):
    """Say Hello with the very session of a connected node."""
    w1 = stage.run.peers["w1"]
    peer = stage.connect()
    peer.hello("w1", session=w1.session, got=w1.taken, first=w1.n)
    return peer


def claims_a_routing_id(stage):
    """Send frames under the routing id of a connection that was just lost, with another key."""
    w1 = stage.run.peers["w1"]
    w1.wire.is_up = False
    peer = stage.world.connect(MALLORY, peer=w1.wire.peer)
    peer.node, peer.run, peer.n = "w1", "r", w1.n
    peer.post("result", "aggregator", {}, re=stage.theirs, consumes=[stage.their_seq])
    peer.send("bye", reason="not mine")
    stage.run.ask(0)
    heard = peer.drain()
    assert not any(frame["kind"] == "deliver" for frame, _ in heard)
    stage.run.reconnect("w1")
    return heard


def opens_runs(stage, count):
    for number in range(count):
        peer = stage.connect()
        peer.hello("aggregator", "aggregator", f"run-{number}", config="x", total_clients=1)
    return peer


def joins_often(stage, count):
    for number in range(count):
        peer = stage.connect()
        peer.hello(f"sybil-{number}")
    return peer


def enrolls(stage, invite="", key="new"):
    peer = stage.connect(invite or MALLORY)
    peer.send("enroll", key=public_key(key))
    return peer


def uses_an_invite_twice(stage):
    for key in ("first", "second"):
        peer = enrolls(stage, "invite", key)
    return peer


def enrolls_the_key_of_another(stage):
    """The rights of a key that is known must not become those of an invite."""
    peer = enrolls(stage, "invite", "aggregator")
    assert stage.world.access.access.keys[public_key("aggregator")].roles == ("aggregator",)
    return peer


def with_an_invite(kind, **fields):
    """Send a frame other than enroll with an invite's key."""

    def attack(stage):
        peer = stage.connect("invite")
        peer.node, peer.run = "w9", "r"
        if kind == "post":
            peer.post("note", "aggregator")
        else:
            peer.send(kind, **fields)
        return peer

    return attack


def sends_after_its_key_was_revoked(stage, *, hello=False):
    stage.world.access.change(**{MALLORY: None})
    stage.world.advance(1)
    stage.mallory.drain()
    if hello:
        peer = stage.connect()
        peer.hello(MALLORY, clients=[[9, 9]])
        return peer
    stage.mallory.post("result", "aggregator", re=stage.task["id"], consumes=[stage.seq])
    return stage.mallory


def loses_a_client(stage):
    """Its rights have become less than what it hosts."""
    less = RIGHTS[MALLORY]
    stage.world.access.change(mallory=Rights(name=less.name, roles=less.roles, clients=()))
    stage.world.advance(1)
    stage.mallory.post("result", "aggregator", re=stage.task["id"], consumes=[stage.seq])
    return stage.mallory


def runs_on_two_hosts(stage):
    """Two nodes of one name and key: the newer session stays, the older ends."""
    second = stage.connect()
    second.hello(MALLORY, clients=[[9, 9]], key="m", session=session_id())
    assert outcome(second.drain()) == ADMITTED
    return stage.mallory


def is_an_observer(stage, kind="result"):
    peer = stage.connect("watcher")
    peer.hello("watcher", "observer")
    assert outcome(peer.drain()) == ADMITTED
    peer.post(kind, "aggregator")
    return peer


def evaluates(stage, kind="task", to="client/0", **fields):
    """Post as the run's evaluator, whose key an attacker has got hold of."""
    eva = stage.run.peers["eva"]
    eva.post(kind, to, **fields)
    stage.world.advance(0.2)
    heard = eva.drain()
    eva.send("done", seqs=[seq for seq, _ in eva.delivered("refused")])
    stage.run.join("eva")
    return heard


def asks_for_another_configuration(stage):
    peer = stage.connect()
    peer.hello("aggregator", "aggregator", config="[run]\nseed = 1\n", total_clients=10)
    assert not any("config" in frame for frame, _ in peer.drain())
    peer.hello("aggregator", "aggregator", config="[run]\nseed = 1\n", total_clients=10)
    return peer


def sends_a_blob_that_no_message_names(stage):
    message = stage.mallory.message("result", "aggregator", re=stage.task["id"])
    stage.mallory.send("post", b"x", message=message, inline=[7], consumes=[stage.seq])
    return stage.mallory


def says_hello_with(stage, key):
    peer = stage.connect(key)
    peer.hello("x")
    return peer
