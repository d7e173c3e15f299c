"""Peers of a virtual broker that run no program of fedmq: an attacker, and holders of invites."""

from msgspec.structs import replace

from fedmq.broker.access.rights import KEYLESS, Origin
from fedmq.broker.wire.addresses import AGGREGATOR, CHECKPOINT, RECORD, TIMER, WORKER
from fedmq.broker.wire.encoding import decode_message, encode_message
from fedmq.broker.wire.schema import (
    Chunk,
    ChunkRequest,
    Deliver,
    Done,
    Enroll,
    Enrolled,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Post,
    RunEnded,
    UnknownSession,
    Welcome,
)
from fedmq.nodes.simulation.virtual_run import RUN

MALLORY = "mallory"
_KINDS = ("task", "result", "score", "failed", "evaluate", "version", "joined", "left", "tick")
_TO = ("client/0", "client/3", AGGREGATOR, CHECKPOINT, TIMER, RECORD, "evaluator")


class Peer:
    """One end of the virtual network.

    Args:
        network: the virtual network.
        name: of the peer.
        origin: what the transport proves about it.
    """

    def __init__(self, network, name, origin):
        self.network, self.name, self.origin = network, name, origin
        self.peer = network.connect(self)

    def send(self, frame):
        self.network.to_broker(self.peer, frame, ())


class Mallory(Peer):
    """A node that was admitted as a worker without clients, and sends what it may not.

    Args:
        simulation: what it attacks; it knows all messages and connections of its aggregator.
        origin: what the transport proves about it.

    Attributes:
        gained: what it has received that it has no right to.
        attacks: number of attacks that it has made.
    """

    def __init__(self, simulation, origin=KEYLESS):
        super().__init__(simulation.network, MALLORY, origin)
        self._simulation, self._rng = simulation, simulation.rng
        self._hello = Hello(
            node=MALLORY, role=WORKER, session=f"{1:016x}-0", key="key of mallory", run=RUN
        )
        self._n = self.attacks = 0
        self._welcome = False
        self.gained = []
        self._act()

    def arrive(self, frame, buffers):
        if isinstance(frame, Deliver):
            if decode_message(frame.message).kind != "refused":
                self.gained.append(frame)
        elif isinstance(frame, Chunk) and buffers:
            self.gained.append(frame)
        elif isinstance(frame, Welcome):
            self._welcome = True
            if frame.checkpoint is not None:
                self.gained.append(frame)
        elif isinstance(frame, UnknownSession):
            self._introduce()
        elif isinstance(frame, RunEnded):
            self.send(Goodbye())

    def _introduce(self):
        self.send(replace(self._hello, first=self._n))

    def _act(self):
        """Attack, and plan the next attack."""
        if self._simulation._calm:
            self.send(Goodbye())
            return
        if self._welcome:
            self.attacks += 1
            self.network.made["attack"] += 1
            self._rng.choice(self.ATTACKS)(self)
        else:
            self._introduce()
        self.network.after(self._rng.uniform(0.1, 1.0), self._act)

    def _number(self):
        self._n += 1
        return self._n - 1

    def _known(self):
        """Return the messages that the aggregator's present session has sent."""
        return [decode_message(each) for each in self._simulation.aggregator.port.posts.values()]

    # ---- attacks

    def _post(self):
        """Post what only others may: under any id, in any name, about any task."""
        known = self._known()
        re = self._rng.choice(known).id if known else "aggregator/1"
        numbers = {"n": 1, "reply": "update", "tasks": 1}
        message = Message(
            kind=self._rng.choice(_KINDS),
            id=self._rng.choice([f"aggregator/{self._rng.randrange(40)}", f"{re}/result"]),
            run=RUN,
            sender=self._rng.choice([MALLORY, MALLORY, AGGREGATOR, "worker-0"]),
            to=self._rng.choice(_TO),
            re=self._rng.choice([None, re]),
            body={
                "client": 0,
                "model_version": 0,
                "metrics": {"accuracy": 1.0},
                "numbers": numbers,
                "groups": [],
                "token": "retry",
                "after_s": 0.0,
            },
        )
        consumes = tuple(range(self._rng.randrange(30)))
        self.send(Post(n=self._number(), message=encode_message(message), consumes=consumes))

    def _settle(self):
        """Say that it has handled, or rejected, what was delivered to others."""
        seqs = tuple(range(self._rng.randrange(60)))
        self.send(Done(n=self._number(), seqs=seqs, refused=dict.fromkeys(seqs[::3], "no")))

    def _end(self):
        self.send(RunEnded(n=self._number(), reason="it is over"))

    def _read(self):
        """Ask for a blob that another node has posted."""
        blobs = [blob for each in self._known() for blob in each.blobs]
        if blobs:
            blob = self._rng.choice(blobs)
            self.send(
                ChunkRequest(owner=AGGREGATOR, digest=blob.digest, start=0, size=min(64, blob.size))
            )

    def _pose(self):
        """Say Hello as another node, over a connection of its own.

        Without keys, a name that no node has had yet is anybody's.
        """
        sessions = self._simulation.sessions
        names = {each.hello.node for each in sessions if each.link._welcome is not None}
        names &= {AGGREGATOR, "worker-0", "worker-1"}
        if not names:
            return
        name = self._rng.choice(sorted(names))
        session = self._rng.choice(["zzzz", f"{(1 << 64) - 1:016x}-0", f"{0:016x}-0"])
        aggregator = self._simulation.aggregator.hello
        hello = replace(self._hello, node=name, session=session)
        if name == AGGREGATOR:
            config = {"config": aggregator.config, "total_clients": aggregator.total_clients}
            hello = replace(hello, role=AGGREGATOR, **config)
        else:
            index = int(name[-1])
            hello = replace(hello, clients=self._rng.choice([(), ((2 * index, 2 * index + 1),)]))
        Poser(self, f"{MALLORY}-{self.attacks}").send(hello)

    def _take_routing_id(self):
        """Send a frame under the routing id of a node whose connection is closed."""
        closed = [each.port for each in self._simulation.sessions if not each.port.up]
        frame = self._rng.choice([Goodbye(), Heartbeat(taken=1 << 40), Done(seqs=(1, 2, 3))])
        if closed and self.origin.key:  # without keys, nothing tells one peer from the other
            peer = self._rng.choice(closed).peer
            self._simulation.broker.receive(peer, frame, (), self.origin)

    def _enroll(self):
        self.send(Enroll(key="x" * 40))

    ATTACKS = (_post, _post, _post, _settle, _end, _read, _pose, _take_routing_id, _enroll)


class Poser(Peer):
    """A further connection of Mallory's."""

    def __init__(self, mallory, name):
        super().__init__(mallory.network, name, mallory.origin)
        self._mallory = mallory

    def arrive(self, frame, buffers):
        if isinstance(frame, Welcome | Deliver | Chunk):
            self._mallory.gained.append(frame)


class Guest(Peer):
    """The holder of an invite, who hands in a key until it is answered.

    Args:
        network: the virtual network.
        name: of the guest.
        invite: public key of the invite.
        key: public key that it hands in.
        on_enrolled: called once when the key is stored.

    Attributes:
        invite, key: as given.
        is_enrolled: whether the broker has said that it has stored the key.
    """

    def __init__(self, network, name, invite, key, on_enrolled=lambda: None):
        super().__init__(network, name, Origin(invite, "10.0.0.9"))
        self.invite, self.key, self._on_enrolled = invite, key, on_enrolled
        self.is_enrolled = False
        self._ask()

    def _ask(self):
        if not self.is_enrolled:
            self.send(Enroll(key=self.key))
            self.network.after(1.0, self._ask)

    def arrive(self, frame, buffers):
        if isinstance(frame, Enrolled) and not self.is_enrolled:
            self.is_enrolled = True
            self.network.made["key enrolled"] += 1
            self._on_enrolled()
