"""fedmq's side of the broker's benchmark: a broker and its nodes, each in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import clocked, distinct, is_small, memory, pace, pings, say

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.errors import LinkClosed
from fedmq.broker.link.events import Delivery
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, WORKER
from fedmq.broker.wire.schema import Blob, Buffer, Hello, Message

RUN = "benchmark"
OWN_CODE = Allowed(modules=frozenset({"rounds"}))
CLIENTS = 1024


def broker(pipe: Connection, folder: str, share_files: bool = True) -> None:  # noqa: FBT001, FBT002 - a process's arguments
    """Serve, and say where."""
    keeping = LedgerSettings(share_files=share_files)
    server = BrokerServer("tcp://127.0.0.1:0", Path(folder), BrokerSettings(), keeping)
    say(pipe, [server.endpoint, server.endpoint])
    server.serve()


class Party:
    """A node with one address, which is an aggregator's or a client's."""

    def __init__(self, endpoint: str, address: str) -> None:
        self.name = address.replace("client/", "worker-")
        session = f"{os.getpid()}-{time.time_ns()}"
        if address == AGGREGATOR:
            hello = Hello(
                node=self.name, role=AGGREGATOR, session=session, run=RUN, total_clients=CLIENTS
            )
        else:
            client = int(address.removeprefix("client/"))
            hello = Hello(node=self.name, role=WORKER, session=session, clients=((client, client),))
        self.link = NodeLink(endpoint, hello)
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
        """Return the next message from another node: who joins and leaves does not matter."""
        while (delivery := self.link.get()).message.sender == BROKER:
            self.link.done([delivery.seq])
        return delivery

    def linger(self) -> None:
        """Wait until the run is over, and say goodbye."""
        with contextlib.suppress(LinkClosed):
            while True:
                self.get()
        self.link.close()


def send_fedmq(
    _pipe: Connection, endpoint: str, to: list[str], size: int, few: int | None = None
) -> None:
    """Send a stream; ``to`` is the receiver's address and the sender's own.

    Large messages are all new bytes; or there are a ``few`` of them, sent again and again.
    """
    receiver, own = to
    party = Party(endpoint, own)
    window, batch, _ = pace(size)
    buffers = distinct(size, few or window + 1)
    fixed = {"x": bytes(next(buffers))}
    payloads: Iterator[tuple[Blob, Buffer]] = ((Blob.of(data), data) for data in buffers)
    if few:
        payloads = itertools.cycle(list(itertools.islice(payloads, few)))
    credit = window
    while True:
        while credit < batch:
            delivery = party.get()
            credit += delivery.message.body["taken"]
            party.link.done([delivery.seq])
        for _ in range(batch):
            if is_small(size):
                party.post(receiver, fixed)
            else:
                party.post(receiver, {}, [next(payloads)])
        credit -= batch


def receive_fedmq(
    pipe: Connection, endpoint: str, own: str, sender: str, size: int, seconds: float
) -> None:
    """Receive a stream, and time it."""
    party = Party(endpoint, own)
    _, _, acknowledgement = pace(size)
    taken: list[int] = []

    def take() -> None:
        delivery = party.get()
        if is_small(size):
            length = len(delivery.message.body["x"])
        else:
            length = memoryview(party.link.read(delivery, 0)).nbytes
        if length != size:
            raise SystemExit(f"expected {size} bytes, got {length}")
        taken.append(delivery.seq)
        if len(taken) == acknowledgement:
            party.link.done(taken)
            party.post(sender, {"taken": len(taken)})
            taken.clear()

    clocked(pipe, take, seconds)
    while True:
        take()


def ping_fedmq(pipe: Connection, endpoint: str, seconds: float) -> None:
    """Measure round trips to the aggregator."""
    party = Party(endpoint, "client/0")

    def exchange() -> None:
        party.post(AGGREGATOR, {})
        party.link.done([party.get().seq])

    pings(pipe, exchange, seconds)


def echo_fedmq(_pipe: Connection, endpoint: str) -> None:
    """Answer every message of client 0."""
    party = Party(endpoint, AGGREGATOR)
    while True:
        party.post("client/0", {}, consumes=(party.get().seq,))


def fan_out_fedmq(pipe: Connection, endpoint: str, workers: int, size: int) -> None:
    """Post one model for all workers; say how long all but one took to have it."""
    party = Party(endpoint, AGGREGATOR)
    model = os.urandom(size)
    say(pipe, "here")
    pipe.recv_bytes()
    began = time.monotonic()
    data = [(Blob.of(model), model)]
    for index in range(workers):
        party.post(f"client/{index}", {}, data)
    last = began
    for _ in range(workers - 1):
        delivery = party.get()
        last = max(last, delivery.message.body["at"])
        party.link.done([delivery.seq])
    say(pipe, last - began)
    pipe.recv_bytes()
    party.link.over("everyone has it")
    party.linger()
    say(pipe, "over")


def collect_fedmq(pipe: Connection, endpoint: str, index: int) -> None:
    """Fetch the model once."""
    party = Party(endpoint, f"client/{index}")
    say(pipe, "here")
    delivery = party.get()
    party.link.read(delivery, 0)
    party.post(AGGREGATOR, {"at": time.monotonic()}, consumes=(delivery.seq,))
    party.linger()


def aggregator_program(pipe: Connection, endpoint: str, config: str) -> None:
    """Run the real aggregator; say the most memory that it took."""
    from fedmq.nodes.aggregator.program import run_aggregator
    from fedmq.nodes.run.config import parse

    run_aggregator(endpoint, parse(config), RUN, allowed=OWN_CODE)
    say(pipe, memory("VmHWM"))


def worker_program(pipe: Connection, endpoint: str, client: int) -> None:
    """Run a real worker; say the most memory that it took."""
    from fedmq.nodes.worker.program import run_worker

    own = [(client, client)]
    run_worker(endpoint, f"worker-{client}", own, WORKER, RUN, allowed=OWN_CODE)
    say(pipe, memory("VmHWM"))
