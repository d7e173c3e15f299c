"""What the tests of the two loops have in common: real sockets on loopback."""

import contextlib
import threading
from collections import deque

import zmq

from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.router import BrokerServer
from fedmq.broker.wire.encoding import decode_frame, split_header
from fedmq.broker.wire.schema import (
    Blob,
    Hello,
    Message,
)

ANY = "tcp://127.0.0.1:0"
AGGREGATOR = Hello(
    node="agg",
    role="aggregator",
    session="s1",
    key="ka",
    run="r",
    config="[run]",
    total_clients=10,
)
WORKER = Hello(node="w1", role="worker", session="s1", key="kw", clients=((0, 9),))


@contextlib.contextmanager
def serving(folder, settings=None, endpoint=ANY, **more):
    """Run a broker on a thread; its exception is raised here at the end."""
    server = BrokerServer(endpoint, folder, settings, **more)
    errors = []

    def serve():
        try:
            server.serve()
        except Exception as error:  # noqa: BLE001 - handed to the test below
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.endpoint
    finally:
        if not errors:
            server.stop()
        thread.join(10)
        assert not thread.is_alive()
        if errors:
            raise errors[0]


@contextlib.contextmanager
def linked(endpoint, hello):
    link = NodeLink.connect(endpoint, hello)
    try:
        link.welcome()
        yield link
    finally:
        link.close()


class Raw:
    """A DEALER that sends arbitrary bytes, and receives frame by frame."""

    def __init__(self, context, endpoint):
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 2000
        self.socket.connect(endpoint)
        self._heard = deque()

    def send(self, *parts):
        self.socket.send_multipart(parts)

    def answer(self):
        """Return the next frame from the broker."""
        if not self._heard:
            header, *_ = self.socket.recv_multipart()
            self._heard += [decode_frame(each) for each, _ in split_header(header)]
        return self._heard.popleft()


@contextlib.contextmanager
def raw_dealer(endpoint):
    """One `Raw`, for a while."""
    with zmq.Context() as context:
        raw = Raw(context, endpoint)
        with raw.socket:
            yield raw


def message(sender, to, *blobs, number=0, **body):
    names = tuple(Blob.of(each) for each in blobs)
    fields = {"kind": "note", "run": "r", "sender": sender, "to": to}
    return Message(id=f"{sender}/{number}", body=body, blobs=names, **fields)


def get(link, kind="note"):
    while True:
        delivery = link.get()
        if delivery.message.kind == kind:
            return delivery


def kinds(folder):
    return [each.read().kind for each in read_entries(folder) if isinstance(each, Accepted)]
