"""An honest run in a `World`: correct raw peers, whose steps are checked one by one."""

from tests.attacks.peer import digest
from tests.attacks.world import CLIENTS, CONFIG, MALLORY

MODEL = bytes(range(256)) * 2048
"""A blob that is too large to travel with a delivery: nodes fetch it."""
NODES = {
    "aggregator": {"role": "aggregator", "config": CONFIG, "total_clients": CLIENTS},
    "w1": {"role": "worker", "clients": [[0, 4]]},
    "w2": {"role": "worker", "clients": [[5, 8]]},
    "eva": {"role": "evaluator"},
}
"""The fields of each honest node's Hello."""


class HonestRun:
    """A run of a world: an aggregator, two workers, an evaluator; each a correct raw peer.

    Attributes:
        version: number of versions committed.
        peers: by name.
        next_id: number of the aggregator's next message.
    """

    def __init__(self, world):
        self.world = world
        self.version = self.next_id = 0
        self.peers = {}
        for name in NODES:
            self.join(name)
        self.round()

    def join(self, name):
        """Start a node, or start it again, and have it admitted."""
        peer = self.peers[name] = self.world.connect(name)
        self._hello(name)
        return peer

    def reconnect(self, name):
        """Have a session go on over a new connection."""
        peer = self.peers[name]
        peer.wire = self.world.connect(name).wire
        self._hello(name)

    def lose(self, name):
        """Have a node fail: its lease ends, and nothing but its name remains."""
        self.peers[name].wire.is_up = False
        self.world.advance(15)

    def _hello(self, name):
        peer = self.peers[name]
        state = {"first": peer.n, "got": peer.taken, "key": f"secret of {name}"}
        peer.hello(name, **NODES[name], **state)
        frames = peer.drain()
        assert any(frame["kind"] == "welcome" for frame, _ in frames), (name, frames)

    def _post(self, *args, **fields):
        """Post a message of the aggregator."""
        self.next_id += 1
        name = f"aggregator/{self.next_id - 1}"
        return self.peers["aggregator"].post(*args, id=name, **fields)

    def ask(self, client, model=MODEL):
        """Ask a client for a result; return the id of the task."""
        body = {"client": client, "model_version": self.version}
        return self._post("task", f"client/{client}", body, [model])

    def round(self):
        """Ask every client, answer, evaluate, and commit a version; check each step."""
        agg, number = self.peers["aggregator"], self.version
        names = {self.ask(client): client for client in range(9)}
        evaluation = self._post("evaluate", "evaluator", {"model_version": number})
        for name in ("w1", "w2"):
            worker = self.peers[name]
            worker.drain()
            for seq, task in worker.delivered("task"):
                if task["id"] in names:
                    answer_task(worker, seq, task)
        eva = self.peers["eva"]
        eva.drain()
        for seq, message in eva.delivered("evaluate"):
            if message["id"] == evaluation:
                body = {"metrics": {"accuracy": 0.5}}
                eva.post("score", "aggregator", body, consumes=[seq], re=message["id"])
        agg.drain()
        answered = {each["re"]: seq for seq, each in agg.delivered("result", "score")}
        assert answered.keys() >= {*names, evaluation}, "the honest run has lost answers"
        self.version += 1
        body = {"version": self.version}
        for to in ("record", "checkpoint"):
            self._post("version", to, body, [MODEL])
        agg.send("done", seqs=sorted(agg.deliveries))
        self._check_acknowledged()

    def _check_acknowledged(self):
        for name, peer in self.peers.items():
            peer.drain()
            self.world.advance(0.1)
            peer.drain()
            upto = [frame["upto"] for frame, _ in peer.heard if frame["kind"] == "receipt"]
            assert not peer.n or upto[-1] == peer.n - 1, f"{name}'s frames are not acknowledged"
            # The aggregator learns that the attacker's own answer to its task was rejected.
            by = {each["body"]["by"] for _, each in peer.delivered("refused")}
            assert by <= {MALLORY}, f"a message of {name} was rejected"
            assert not any(frame["kind"] == "reject" for frame, _ in peer.heard), name

    def senders(self):
        """Return who has sent what was delivered to the honest nodes, other than the broker."""
        peers = self.peers.values()
        return {each["sender"] for peer in peers for each in peer.deliveries.values()} - {"broker"}


def answer_task(worker, seq, task):
    """Fetch a task's model, and post a result."""
    for blob in task["blobs"]:
        worker.want(task["sender"], blob["digest"], 0, blob["size"])
        frames = [(frame, data) for frame, data in worker.drain() if frame["kind"] == "chunk"]
        [(_, [data])] = frames
        assert digest(data) == blob["digest"]
    body = {"client": task["body"]["client"], "num_examples": 3}
    worker.post("result", "aggregator", body, [b"update"], consumes=[seq], re=task["id"])
