"""fedmq's side of the broker benchmark: a broker and its nodes, each in its own process."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import distinct, is_small, memory, pace, send_json, time_receiver, time_round_trips

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.access import rights
from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.access.broker_keys import BrokerKeys
from fedmq.broker.access.curve import KeyPair, NodeKeys
from fedmq.broker.errors import LinkClosed
from fedmq.broker.link.events import Delivery
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings, Durability, LedgerSettings
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, CLIENT, WORKER
from fedmq.broker.wire.schema import Blob, Buffer, Hello, Message

RUN = "benchmark"
OWN_CODE = Allowed(modules=frozenset({"rounds"}))
CLIENTS = 1024


def let_nodes_talk() -> None:
    """Let the nodes of a broker in this process post messages that nobody asked for."""
    for role, to in ((WORKER, AGGREGATOR), (WORKER, CLIENT), (AGGREGATOR, CLIENT)):
        rights.POSTS[role, "benchmark", to] = False


def broker(
    pipe: Connection,
    folder: str,
    *,
    share_files: bool = True,
    durability: Durability = "process",
    own: KeyPair | None = None,
    admitted: Sequence[str] = (),
) -> None:
    """Serve; report the endpoint. With a key of its own, admit the public keys of nodes."""
    let_nodes_talk()
    settings = LedgerSettings(durability, share_files=share_files)
    keys = None
    if own is not None:
        access = AccessFile(Path(folder).parent / "keys")
        for number, key in enumerate(admitted):
            access.authorize(rights.Rights(name=f"node-{number}", key=key, read_files=True))
        keys = BrokerKeys(own, access)
    endpoint = "tcp://127.0.0.1:0"
    server = BrokerServer(endpoint, Path(folder), BrokerSettings(), settings, keys=keys)
    send_json(pipe, [server.endpoint, server.endpoint])
    server.serve()


class Peer:
    """A node with one address: the aggregator's or a client's."""

    def __init__(self, endpoint: str, address: str, keys: NodeKeys | None = None) -> None:
        self.name = address.replace("client/", "worker-")
        session = f"{os.getpid()}-{time.time_ns()}"
        if address == AGGREGATOR:
            hello = Hello(
                node=self.name, role=AGGREGATOR, session=session, run=RUN, total_clients=CLIENTS
            )
        else:
            client = int(address.removeprefix("client/"))
            hello = Hello(node=self.name, role=WORKER, session=session, clients=((client, client),))
        self.link = NodeLink.connect(endpoint, hello, keys)
        self.link.welcome()
        self._ids = itertools.count()

    def post(
        self,
        to: str,
        body: dict[str, Any],
        data: Sequence[tuple[Blob, Buffer]] = (),
        consumes: tuple[int, ...] = (),
    ) -> None:
        """Post a message with these blobs."""
        message = Message(
            kind="benchmark",
            id=f"{self.name}/{next(self._ids)}",
            run=RUN,
            sender=self.name,
            to=to,
            body=body,
            blobs=tuple(blob for blob, _ in data) if data else (),
        )
        self.link.post(message, [buffer for _, buffer in data] if data else (), consumes)

    def get(self) -> Delivery:
        """Return the next message from another node; skip the broker's joins and leaves."""
        while (delivery := self.link.get()).message.sender == BROKER:
            self.link.done([delivery.seq])
        return delivery

    def linger(self) -> None:
        """Wait for the end of the run, then close the link."""
        with contextlib.suppress(LinkClosed):
            while True:
                self.get()
        self.link.close()


def send_fedmq(
    _pipe: Connection,
    endpoint: str,
    to: list[str],
    size: int,
    repeated: int | None = None,
    keys: NodeKeys | None = None,
) -> None:
    """Send a stream; ``to`` holds the receiver's address and the sender's own.

    Every large message has new bytes; with ``repeated``, the stream cycles through that many.
    """
    receiver, own = to
    peer = Peer(endpoint, own, keys)
    window, batch, _ = pace(size)
    buffers = distinct(size, repeated or window + 1)
    fixed = {"x": bytes(next(buffers))}
    payloads: Iterator[tuple[Blob, Buffer]] = ((Blob.of(data), data) for data in buffers)
    if repeated:
        payloads = itertools.cycle(list(itertools.islice(payloads, repeated)))
    credit = window
    while True:
        while credit < batch:
            delivery = peer.get()
            credit += delivery.message.body["taken"]
            peer.link.done([delivery.seq])
        for _ in range(batch):
            if is_small(size):
                peer.post(receiver, fixed)
            else:
                peer.post(receiver, {}, [next(payloads)])
        credit -= batch


def receive_fedmq(
    pipe: Connection,
    endpoint: str,
    own: str,
    sender: str,
    size: int,
    seconds: float,
    keys: NodeKeys | None = None,
) -> None:
    """Receive and time a stream."""
    peer = Peer(endpoint, own, keys)
    _, _, credit = pace(size)
    taken: list[int] = []

    def take() -> None:
        delivery = peer.get()
        if is_small(size):
            length = len(delivery.message.body["x"])
        else:
            length = memoryview(delivery.read(0)).nbytes
        if length != size:
            raise SystemExit(f"expected {size} bytes, got {length}")
        taken.append(delivery.seq)
        if len(taken) == credit:
            peer.link.done(taken)
            peer.post(sender, {"taken": len(taken)})
            taken.clear()

    time_receiver(pipe, take, seconds)
    while True:
        take()


def ping_fedmq(pipe: Connection, endpoint: str, seconds: float) -> None:
    """Measure round trips to the aggregator."""
    peer = Peer(endpoint, "client/0")

    def exchange() -> None:
        peer.post(AGGREGATOR, {})
        peer.link.done([peer.get().seq])

    time_round_trips(pipe, exchange, seconds)


def echo_fedmq(_pipe: Connection, endpoint: str) -> None:
    """Answer every message of client 0."""
    peer = Peer(endpoint, AGGREGATOR)
    while True:
        peer.post("client/0", {}, consumes=(peer.get().seq,))


def fan_out_fedmq(pipe: Connection, endpoint: str, workers: int, size: int) -> None:
    """Post one model for all workers; report the seconds until all but one have it."""
    peer = Peer(endpoint, AGGREGATOR)
    model = os.urandom(size)
    send_json(pipe, "ready")
    pipe.recv_bytes()
    began = time.monotonic()
    data = [(Blob.of(model), model)]
    for index in range(workers):
        peer.post(f"client/{index}", {}, data)
    last = began
    for _ in range(workers - 1):
        delivery = peer.get()
        last = max(last, delivery.message.body["at"])
        peer.link.done([delivery.seq])
    send_json(pipe, last - began)
    pipe.recv_bytes()
    peer.link.over("all workers have the model")
    peer.linger()
    send_json(pipe, "over")


def collect_fedmq(pipe: Connection, endpoint: str, index: int) -> None:
    """Fetch the model once."""
    peer = Peer(endpoint, f"client/{index}")
    send_json(pipe, "ready")
    delivery = peer.get()
    delivery.read(0)
    peer.post(AGGREGATOR, {"at": time.monotonic()}, consumes=(delivery.seq,))
    peer.linger()


def aggregator_program(pipe: Connection, endpoint: str, config: str) -> None:
    """Run the real aggregator; report its peak memory in bytes."""
    from fedmq.nodes.aggregator.program import run_aggregator
    from fedmq.nodes.run.config import parse

    run_aggregator(endpoint, parse(config), RUN, allowed=OWN_CODE)
    send_json(pipe, memory("VmHWM"))


def worker_program(pipe: Connection, endpoint: str, client: int) -> None:
    """Run a real worker; report its peak memory in bytes."""
    from fedmq.nodes.worker.program import run_worker

    own = [(client, client)]
    run_worker(endpoint, f"worker-{client}", own, WORKER, RUN, allowed=OWN_CODE)
    send_json(pipe, memory("VmHWM"))
