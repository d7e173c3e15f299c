"""Short tests of the two loops over real sockets on loopback."""

import contextlib
import os
import threading
import time

import msgpack
import pytest

from fedmq.broker.errors import BrokerError, LinkClosed, Rejected
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.schema import (
    CHUNK_BYTES,
    PROTOCOL,
    ChunkRequest,
    Heartbeat,
    Hello,
    Reject,
    UnknownSession,
    Welcome,
    digest,
)
from tests.broker.loops import (
    AGGREGATOR,
    WORKER,
    get,
    kinds,
    linked,
    message,
    raw_dealer,
    serving,
)

pytestmark = pytest.mark.end_to_end


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
            assert bytes(task.read(0)) == weights
            assert bytes(task.read(1)) == b"small"
        back = weights[::-1]
        worker.post(message("w1", "aggregator", back), [back], consumes=(task.seq,))
        with worker.away():
            result = get(agg)
            assert bytes(result.read(0)) == back
        agg.over("done")
        for link in (agg, worker):
            with pytest.raises(LinkClosed, match="done"):
                get(link, "a kind that never comes")
    assert kinds(tmp_path)[-2:] == ["note", "note"]
    assert list(read_entries(tmp_path))[-1].reason == "done"


def test_a_port_in_use_is_one_sentence(tmp_path):
    with serving(tmp_path / "one") as endpoint, pytest.raises(BrokerError) as caught:
        BrokerServer(endpoint, tmp_path / "two")
    assert str(caught.value) == f"cannot listen on {endpoint}: address already in use"


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1:99999", "tcp://no.such.host.:1"])
def test_an_invalid_endpoint_is_one_sentence(tmp_path, endpoint):
    with pytest.raises(BrokerError, match=f"cannot listen on {endpoint}") as caught:
        BrokerServer(endpoint, tmp_path)
    assert "\n" not in str(caught.value)
    if endpoint == "nonsense":
        with pytest.raises(LinkClosed, match="cannot connect to nonsense"):
            NodeLink.connect(endpoint, WORKER)


def test_another_protocol_major_is_rejected_with_both_versions(tmp_path):
    with serving(tmp_path) as endpoint, raw_dealer(endpoint) as raw:
        fields = {"kind": "hello", "v": [2, 0], "node": "w1", "role": "worker", "session": "s"}
        raw.send(msgpack.packb(fields))
        reject = raw.answer()
        assert isinstance(reject, Reject)
        assert (reject.code, reject.protocol) == ("version", PROTOCOL)
        assert "expected protocol 1.x, got 2.0" in reject.reason


def test_garbage_on_the_socket_does_not_hurt_the_broker(tmp_path):
    garbage = [
        [b""],
        [b"", b""],
        [b"\xff" * 1000],
        [b"\x81", b"x"],
        [bytes(70_000)],
        [encode_frame(Heartbeat())] + [b"x"] * 100,
        [encode_frame(Heartbeat())[:-1]],
        [msgpack.packb({"kind": "post", "n": 0, "message": b""}), b"x"],
        [b"\x91" * 60_000],
    ]
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        with raw_dealer(endpoint) as raw:
            for parts in garbage:
                raw.send(*parts)
                assert isinstance(raw.answer(), Reject | UnknownSession)
            raw.send(b"x", *[bytes(100)] * 3)
            raw.answer()
            raw.send(encode_frame(WORKER))
            assert isinstance(raw.answer(), Welcome)
        assert get(agg, "joined").message.body["node"] == "w1"


def test_an_admitted_node_that_asks_for_too_much_does_not_hurt_the_broker(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        agg.post(message("agg", "client/0", b"0123456789"), [b"0123456789"])
        with raw_dealer(endpoint) as raw:
            raw.send(encode_frame(WORKER))
            assert isinstance(raw.answer(), Welcome)
            raw.answer()
            want = ChunkRequest(
                owner="agg", digest=digest(b"0123456789"), start=5, size=CHUNK_BYTES
            )
            raw.send(encode_frame(want))
            raw.send(encode_frame(Heartbeat()))
            raw.answer()
            assert isinstance(raw.answer(), Heartbeat)


def test_a_node_under_a_live_name_is_rejected_with_the_reason(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR):
        second = NodeLink.connect(
            endpoint, Hello(node="agg", role="aggregator", session="s2", run="r")
        )
        with pytest.raises(Rejected, match="a node named 'agg' is already connected"):
            second.welcome()
        second.close()


def test_a_stopped_link_interrupts_waiting_methods(tmp_path):
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
def test_heartbeats_continue_while_the_main_thread_computes(tmp_path, said):
    """Without `away`, the link's thread takes over after a quarter of a second."""
    settings = BrokerSettings(lease_s=0.3 if said else 0.6, beat_s=0.05)
    with serving(tmp_path, settings) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        with agg.away() if said else contextlib.nullcontext():
            compute(1.0)
        with linked(endpoint, WORKER):
            get(agg, "joined")
        assert kinds(tmp_path)[:2] == ["joined", "joined"]


SOON = {"token": "soon", "after_s": 0.05}


def test_a_tick_comes_over_the_socket(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        agg.post(message("agg", "timer", **SOON))
        began = time.monotonic()
        assert get(agg, "tick").message.body == {"token": "soon"}
        assert time.monotonic() - began < 1.5


def test_flush_waits_until_the_broker_has_the_posts(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        for number in range(20):
            agg.post(message("agg", "record", number=number))
        agg.flush(10)
        assert kinds(tmp_path).count("note") >= 10
        agg.flush()
        assert kinds(tmp_path).count("note") == 20
