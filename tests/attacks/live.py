"""A live broker with an honest run of real nodes, on threads of this process and real sockets."""

import contextlib
import threading
import time
from dataclasses import dataclass, replace

import msgspec

from fedmq.algorithms.problems.base import Problem
from fedmq.broker.access.broker_keys import BrokerKeys
from fedmq.broker.access.curve import KeyPair, NodeKeys
from fedmq.broker.access.rights import Access, Invite, Rights
from fedmq.broker.errors import BrokerError
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings
from fedmq.nodes.aggregator.program import run_aggregator
from fedmq.nodes.errors import NodeError
from fedmq.nodes.run.config import build
from fedmq.nodes.worker.program import run_worker
from tests.attacks.peer import Dealer, Peer
from tests.attacks.world import MALLORY, MemoryAccess
from tests.sim.tally import Tally, Vector

ANY = "tcp://127.0.0.1:0"
BEAT_S, LEASE_S = 0.2, 1.0
GIVE_UP_S = 1.0


@dataclass(frozen=True)
class Scored(Vector):
    """The same problem, with an accuracy that is one."""

    def metric_range(self, name):
        return Problem.metric_range(self, name)


@dataclass(frozen=True)
class Paced(Tally):
    """A client takes a while to train, so that attacks meet a run in the middle.

    Its updates are small, so that the run can go on for very many versions.
    """

    pause_s: float = 0.02

    def train(self, task, client):
        time.sleep(self.pause_s)
        found = super().train(task, client)
        weights = {"vector": found.payload.weights["vector"] * 1e-3}
        return replace(found, payload=replace(found.payload, weights=weights))


def config(versions, **run):
    """Return the configuration of a run in rounds of all three clients; ``run``: more keys."""
    run = {"versions": versions, "evaluate_every": 1, "checkpoint_s": 0.0, **run}
    return build(
        {
            "problem": {"name": "tests.attacks.live:Scored", "dim": 100_000, "clients": 3},
            "algorithm": {"name": "tests.attacks.live:Paced"},
            "schedule": {"name": "rounds", "fraction": 1.0},
            "run": run,
        }
    )


RIGHTS = {
    "aggregator": Rights(name="aggregator", roles=("aggregator",), runs=("r", "q")),
    "w1": Rights(name="w1", roles=("worker",), clients=((0, 1),), runs=("r",)),
    "w2": Rights(name="w2", roles=("worker",), clients=((2, 2),), runs=("r",), read_files=True),
    "eva": Rights(name="eva", roles=("evaluator",), runs=("r",)),
    MALLORY: Rights(name=MALLORY, roles=("worker",), clients=(), runs=("r",)),
}
INVITED = Rights(name="invited", roles=("worker",), clients=(), runs=("r",))


class Keyring:
    """The key pairs of a broker, of its nodes, of an invite, and of a stranger."""

    def __init__(self):
        self.pairs = {name: KeyPair.new() for name in (*RIGHTS, "broker", "invite", "stranger")}
        keys = {self.public(name): self.rights(name, each) for name, each in RIGHTS.items()}
        invited = self.rights("invite", INVITED)
        invite = Invite(rights=invited, uses=1, expires_at=time.time() + 600)
        invites = {self.public("invite"): invite}
        self.store = MemoryAccess(Access(keys=keys, invites=invites))

    def public(self, name):
        return self.pairs[name].public

    def rights(self, name, rights):
        return msgspec.structs.replace(rights, key=self.public(name))

    def of_node(self, name):
        return NodeKeys(self.pairs[name], self.public("broker"))

    def of_peer(self, name):
        """Return (own public, own secret, broker's public) for a raw peer."""
        return self.public(name), self.pairs[name].secret, self.public("broker")


class LiveRun:
    """A broker and the nodes of run ``r``: an aggregator, two workers and an evaluator.

    Args:
        folder: of the ledger.
        versions: after which the run ends.
        keys: whether the broker has keys.
        settings: of the broker.
        until_idle: whether the broker ends with its run.
        without: names of nodes that are not started.
        more: further keys of the configuration's table ``run``.

    Attributes:
        endpoint: of the broker.
        ring: all keys; None without.
        ends: why each node ended, by name.
    """

    def __init__(
        self, folder, versions, settings=None, *, keys=False, until_idle=False, without=(), **more
    ):
        self.folder, self.ends, self.without = folder, {}, without
        self.config = config(versions, **more)
        self.ring = Keyring() if keys else None
        settings = settings or BrokerSettings(lease_s=LEASE_S, beat_s=BEAT_S)
        with_keys = {}
        if keys:
            with_keys = {"keys": BrokerKeys(self.ring.pairs["broker"], self.ring.store)}
        self.server = BrokerServer(ANY, folder, settings, **with_keys)
        self.endpoint = self.server.endpoint
        self._threads = {}
        self._start("broker", lambda: self.server.serve(until_idle=until_idle))

    def start_nodes(self):
        self._start("aggregator", self._aggregator)
        until = time.monotonic() + 20.0
        while not self.messages("run"):
            assert time.monotonic() < until, self.ends
            time.sleep(0.02)
        for name, clients in (("w1", [(0, 1)]), ("w2", [(2, 2)])):
            self._start(name, lambda name=name, clients=clients: self._worker(name, clients))
        if "eva" not in self.without:
            self._start("eva", lambda: self._worker("eva", (), "evaluator"))

    def _aggregator(self):
        return run_aggregator(self.endpoint, self.config, "r", **self._how("aggregator"))

    def _worker(self, name, clients, role="worker"):
        return run_worker(self.endpoint, name, clients, role, "r", **self._how(name))

    def _how(self, name):
        how = {"allowed": self.config.allowed, "give_up_s": GIVE_UP_S}
        return how if self.ring is None else {**how, "keys": self.ring.of_node(name)}

    def _start(self, name, work):
        def run():
            try:
                self.ends[name] = work()
            except (BrokerError, NodeError) as error:
                self.ends[name] = error

        self._threads[name] = threading.Thread(target=run, name=name)
        self._threads[name].start()

    def join(self, timeout_s=20.0):
        """Wait until the broker and all nodes have ended."""
        for name, thread in self._threads.items():
            thread.join(timeout_s)
            assert not thread.is_alive(), f"{name} does not end"

    def stop(self):
        self.server.stop()
        self.join()

    def messages(self, kind):
        entries = [each for each in read_entries(self.folder) if isinstance(each, Accepted)]
        return [message for message in (each.read() for each in entries) if message.kind == kind]

    def versions(self):
        return len(self.messages("version"))

    def goes_on(self, timeout_s=5.0):
        """Wait until two more versions have been committed."""
        before, until = self.versions(), time.monotonic() + timeout_s
        while self.versions() < before + 2:
            assert time.monotonic() < until, f"no version in {timeout_s} s; {self.ends}"
            time.sleep(0.02)

    @contextlib.contextmanager
    def peer(self, name=MALLORY, **dealer):
        """Connect a raw peer for a while, with the key of a name."""
        if self.ring is not None:
            dealer.setdefault("keys", self.ring.of_peer(name))
        wire = Dealer(self.endpoint, **dealer)
        try:
            yield Peer(wire)
        finally:
            wire.close()


@contextlib.contextmanager
def living(folder, versions=1_000_000, **settings):
    """Run a broker and an honest run for a while."""
    run = LiveRun(folder, versions, **settings)
    try:
        run.start_nodes()
        yield run
    finally:
        run.stop()
