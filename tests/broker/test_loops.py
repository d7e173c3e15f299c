"""A few tests of the two loops over real sockets on loopback; each is over in a moment."""

import contextlib
import errno
import os
import threading
import time

import msgpack
import pytest
import zmq

from fedmq.broker.dealer import NodeLink
from fedmq.broker.errors import BrokerError, LedgerError, LinkClosed, Rejected
from fedmq.broker.ledger import Accepted, read_entries
from fedmq.broker.router import BrokerServer
from fedmq.broker.state import BrokerSettings
from fedmq.broker.wire import (
    CHUNK_BYTES,
    PROTOCOL,
    Beat,
    Blob,
    Hello,
    Message,
    Reject,
    Stranger,
    Want,
    Welcome,
    decode_frame,
    digest,
    encode_frame,
)

ANY = "tcp://127.0.0.1:0"
AGGREGATOR = Hello(
    node="agg", role="aggregator", session="s1", run="r", config="[run]", total_clients=10
)
WORKER = Hello(node="w1", role="worker", session="s1", clients=((0, 9),))


@contextlib.contextmanager
def serving(folder, settings=None):
    """A broker on a thread of its own; what it raises is raised here at the end."""
    server = BrokerServer(ANY, folder, settings)
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
    link = NodeLink(endpoint, hello)
    try:
        link.welcome()
        yield link
    finally:
        link.close()


@contextlib.contextmanager
def raw_dealer(endpoint):
    """A DEALER that says whatever it likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = 2000
        socket.connect(endpoint)
        yield socket


def answer(socket):
    return decode_frame(socket.recv_multipart()[0])


def message(sender, to, *blobs, number=0):
    names = tuple(Blob.of(each) for each in blobs)
    return Message(kind="note", id=f"{sender}/{number}", run="r", sender=sender, to=to, blobs=names)


def get(link, kind="note"):
    while True:
        delivery = link.get()
        if delivery.message.kind == kind:
            return delivery


def kinds(folder):
    return [each.read().kind for each in read_entries(folder) if isinstance(each, Accepted)]


def test_a_message_and_a_large_blob_make_the_round_trip(tmp_path):
    weights = os.urandom(3 * CHUNK_BYTES + 11)
    with (
        serving(tmp_path) as endpoint,
        linked(endpoint, AGGREGATOR) as agg,
        linked(endpoint, WORKER) as worker,
    ):
        assert worker.welcome().config == "[run]"
        agg.post(message("agg", "client/3", weights, b"small"), [weights, b"small"])
        with agg.away():  # its link's thread serves the chunks
            task = get(worker)
            assert bytes(worker.read(task, 0)) == weights
            assert bytes(worker.read(task, 1)) == b"small"
        back = weights[::-1]
        worker.post(message("w1", "aggregator", back), [back], consumes=(task.seq,))
        with worker.away():
            result = get(agg)
            assert bytes(agg.read(result, 0)) == back
        agg.over("done")
        for link in (agg, worker):
            with pytest.raises(LinkClosed, match="done"):
                get(link, "a kind that never comes")
    assert kinds(tmp_path)[-2:] == ["note", "note"]
    assert list(read_entries(tmp_path))[-1].reason == "done"


def test_a_port_in_use_is_told_in_one_sentence(tmp_path):
    with serving(tmp_path / "one") as endpoint, pytest.raises(BrokerError) as caught:
        BrokerServer(endpoint, tmp_path / "two")
    assert str(caught.value) == f"cannot listen on {endpoint}: address already in use"


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1:99999", "tcp://no.such.host.:1"])
def test_an_endpoint_that_is_no_address_is_told_in_one_sentence(tmp_path, endpoint):
    with pytest.raises(BrokerError, match=f"cannot listen on {endpoint}") as caught:
        BrokerServer(endpoint, tmp_path)
    assert "\n" not in str(caught.value)
    if endpoint == "nonsense":
        with pytest.raises(LinkClosed, match="cannot connect to nonsense"):
            NodeLink(endpoint, WORKER)


def test_a_folder_that_holds_a_ledger_is_not_overwritten(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR):
        pass
    with pytest.raises(BrokerError, match="expected an empty folder"):
        BrokerServer(ANY, tmp_path)


def test_another_protocol_major_is_rejected_with_both_versions(tmp_path):
    with serving(tmp_path) as endpoint, raw_dealer(endpoint) as socket:
        fields = {"kind": "hello", "v": [2, 0], "node": "w1", "role": "worker", "session": "s"}
        socket.send(msgpack.packb(fields))
        reject = answer(socket)
        assert isinstance(reject, Reject)
        assert (reject.code, reject.protocol) == ("version", PROTOCOL)
        assert "protocol 2.0 cannot talk to protocol 1.0" in reject.reason


def test_garbage_on_the_socket_does_not_hurt_the_broker(tmp_path):
    garbage = [
        [b""],
        [b"", b""],
        [b"\xff" * 1000],
        [b"\x81", b"x"],
        [bytes(70_000)],
        [encode_frame(Beat())] + [b"x"] * 100,
        [encode_frame(Beat())[:-1]],
        [msgpack.packb({"kind": "post", "n": 0, "message": b""}), b"x"],
        [b"\x91" * 60_000],
    ]
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        with raw_dealer(endpoint) as socket:
            for parts in garbage:
                socket.send_multipart(parts)
                assert isinstance(answer(socket), Reject | Stranger)
            socket.send_multipart([b"x", *[bytes(100)] * 3])
            answer(socket)
            socket.send(encode_frame(WORKER))
            assert isinstance(answer(socket), Welcome)
        assert get(agg, "joined").message.body["node"] == "w1"


def test_an_admitted_node_that_asks_for_too_much_does_not_hurt_the_broker(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        agg.post(message("agg", "client/0", b"0123456789"), [b"0123456789"])
        with raw_dealer(endpoint) as socket:
            socket.send(encode_frame(WORKER))
            assert isinstance(answer(socket), Welcome)
            answer(socket)
            want = Want(owner="agg", digest=digest(b"0123456789"), start=5, size=CHUNK_BYTES)
            socket.send(encode_frame(want))
            socket.send(encode_frame(Beat()))
            answer(socket)
            assert isinstance(answer(socket), Beat)


def test_a_node_under_a_live_name_is_rejected_with_the_reason(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR):
        second = NodeLink(endpoint, Hello(node="agg", role="aggregator", session="s2", run="r"))
        with pytest.raises(Rejected, match="a node named 'agg' is already connected"):
            second.welcome()
        second.close()


def test_a_link_that_is_stopped_lets_go_of_what_waits(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        timer = threading.Timer(0.05, agg.stop)
        timer.start()
        with pytest.raises(LinkClosed, match="the node was stopped"):
            agg.get()
        timer.join()


def compute(seconds):
    """Hold the GIL as a training loop in pure Python does."""
    until, total = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        total += sum(range(100))
    return total


@pytest.mark.parametrize("said", [True, False], ids=["away said", "away not said"])
def test_beats_go_on_while_the_main_thread_computes(tmp_path, said):
    """Without a word, the link's thread takes over by itself after a quarter of a second."""
    settings = BrokerSettings(lease_s=0.3 if said else 0.6, beat_s=0.05)
    with serving(tmp_path, settings) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        with agg.away() if said else contextlib.nullcontext():
            compute(1.0)
        with linked(endpoint, WORKER):
            get(agg, "joined")
        assert kinds(tmp_path)[:2] == ["joined", "joined"]


def test_a_tick_comes_over_the_socket(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        agg.tick("soon", 0.05)
        began = time.monotonic()
        assert get(agg, "tick").message.body == {"token": "soon"}
        assert time.monotonic() - began < 1.5


def test_a_full_disk_ends_the_broker_with_the_reason_and_frees_its_port(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    server = BrokerServer(ANY, tmp_path / "full")
    node = NodeLink(server.endpoint, AGGREGATOR)
    monkeypatch.setattr(os, "writev", refuse)
    with pytest.raises(LedgerError, match="cannot write: No space left on device"):
        server.serve()
    monkeypatch.undo()
    node.stop()
    node.close()
    try:
        BrokerServer(server.endpoint, tmp_path / "new").close()
    finally:
        server._context.destroy(linger=0)
        server._wake_reader.close()
        server._wake_writer.close()
