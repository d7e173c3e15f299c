"""Real sockets: IPv6, socket files, and reports about an unreachable broker."""

import contextlib
import socket
import threading
import time

import msgpack
import pytest
import structlog
import zmq

from fedmq.broker.errors import BrokerError, GaveUp, LinkClosed, Rejected, RunOver
from fedmq.broker.link import contact, dealer
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.transport.dealer_socket import DealerSocket
from fedmq.broker.wire.schema import Hello
from tests.broker.loops import AGGREGATOR, WORKER, get, linked, message, serving

pytestmark = pytest.mark.end_to_end


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def make_round_trip(endpoint):
    with linked(endpoint, AGGREGATOR) as agg, linked(endpoint, WORKER) as worker:
        agg.post(message("agg", "client/3"))
        assert get(worker).message.sender == "agg"


@needs_ipv6
def test_a_broker_on_ipv6(tmp_path):
    with serving(tmp_path, endpoint="tcp://[::1]:0") as endpoint:
        assert endpoint.startswith("tcp://[::1]:")
        make_round_trip(endpoint)


@needs_ipv6
def test_a_broker_on_all_addresses_is_reached_over_both_families(tmp_path):
    with serving(tmp_path, endpoint="tcp://*:0", insecure=True) as endpoint:
        port = endpoint.rpartition(":")[2]
        with linked(f"tcp://[::1]:{port}", AGGREGATOR) as agg:
            with linked(f"tcp://127.0.0.1:{port}", WORKER):
                assert get(agg, "joined").message.body["node"] == "w1"
            with linked(f"tcp://localhost:{port}", WORKER):
                pass


def test_a_broker_on_a_name(tmp_path):
    with serving(tmp_path, endpoint="tcp://localhost:0") as endpoint:
        make_round_trip(f"tcp://localhost:{endpoint.rpartition(':')[2]}")


def test_a_broker_on_a_socket_file(tmp_path):
    with serving(tmp_path / "a", endpoint=f"ipc://{tmp_path}/socket") as endpoint:
        make_round_trip(endpoint)
        with pytest.raises(BrokerError, match=r"cannot listen on ipc://.*: address already in use"):
            BrokerServer(endpoint, tmp_path / "b")
        make_round_trip(endpoint)


def test_an_address_of_another_host_is_reported(tmp_path):
    with pytest.raises(BrokerError, match=r"192\.0\.2\.1:7700: this host has no such address"):
        BrokerServer("tcp://192.0.2.1:7700", tmp_path, insecure=True)


def test_a_wrong_endpoint_and_a_name_without_address_are_reported_before_any_wait():
    with pytest.raises(LinkClosed, match=r"cannot connect to 127\.0\.0\.1:7700: expected tcp:"):
        NodeLink.connect("127.0.0.1:7700", WORKER)
    with pytest.raises(LinkClosed, match=r"'no\.such\.host\.invalid' does not resolve"):
        NodeLink.connect("tcp://no.such.host.invalid:7700", WORKER)


def test_both_address_families_of_a_name_are_tried(tmp_path, monkeypatch):
    """libzmq alone would try the first family for ever."""
    families = [socket.AF_INET6, socket.AF_INET]
    monkeypatch.setattr(dealer, "resolve", lambda _: families)
    connected = []
    real = DealerSocket._connect

    def connect(link):
        connected.append(link._families[0])
        if link._families[0] == socket.AF_INET:  # on IPv6, nobody listens
            real(link)

    monkeypatch.setattr(DealerSocket, "_connect", connect)
    with serving(tmp_path) as endpoint:
        port = endpoint.rpartition(":")[2]
        with linked(f"tcp://localhost:{port}", AGGREGATOR):
            assert connected == families


# ---- what is in the node's log


@pytest.fixture
def quick(monkeypatch):
    """Reports come after tenths of a second, and are collected."""
    monkeypatch.setattr(contact, "_FIRST_REPORTS_S", (0.2, 0.6))
    monkeypatch.setattr(contact, "_EACH_S", 0.5)
    with structlog.testing.capture_logs() as logs:
        yield logs


def until(logs, words, link, within_s=5.0):
    """Run a link until its log contains the words; return that line."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(StopIteration):
            return next(each for each in logs if words in each["event"])
        link.pause(0.05)
    raise AssertionError(logs)


def test_a_lost_broker_and_its_return_are_logged_with_the_time(tmp_path, quick):
    settings = BrokerSettings(lease_s=1.0, beat_s=0.1)
    with serving(tmp_path, settings) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        agg.pause(0.5)
        assert not [each for each in quick if "broker" in each["event"]]
    agg = NodeLink.connect(endpoint, AGGREGATOR)
    try:
        line = until(quick, f"waiting for the broker at {endpoint}", agg)
        assert line["found"] == "refused"
        with serving(tmp_path, settings, endpoint=endpoint):
            agg.welcome()
            agg.pause(0.3)
        until(quick, f"no answer from the broker at {endpoint}", agg)
        with serving(tmp_path, settings, endpoint=endpoint):
            line = until(quick, "back in touch with the broker after", agg)
    finally:
        agg.close()


def test_a_node_that_gives_up_says_what_it_has_found(quick):
    link = NodeLink.connect(f"tcp://127.0.0.1:{free_port()}", WORKER)
    link.give_up_after(1.5)
    with pytest.raises(GaveUp, match=r"for [12] s; nothing listens there .connection refused.$"):
        link.welcome()
    link.close()


def test_a_broker_without_the_run_says_what_it_serves(tmp_path, quick):
    with serving(tmp_path) as endpoint:
        other = NodeLink.connect(endpoint, Hello(node="w9", role="worker", session="s", run="q"))
        until(quick, "has no run for this node yet; waiting for run q", other)
        with linked(endpoint, AGGREGATOR):
            until(quick, f"the broker at {endpoint} serves run r; waiting for run q", other)
            other.give_up_after(0.3)
            with pytest.raises(
                GaveUp, match=r"gave up: .*serves run r; waiting for run q for \d s$"
            ):
                other.welcome()
        other.close()


@contextlib.contextmanager
def router_that_says(reply):
    """A ROUTER that answers each message with these bytes."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        stop = threading.Event()

        def serve():
            while not stop.is_set():
                if router.poll(50):
                    router.send_multipart([router.recv_multipart()[0], reply])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{port}"
        finally:
            stop.set()
            thread.join()


def test_a_broker_of_another_major_is_reported_at_once():
    reply = msgpack.packb({"kind": "welcome", "v": [2, 0], "anything": 1})
    with router_that_says(reply) as endpoint:
        link = NodeLink.connect(endpoint, WORKER)
        with pytest.raises(
            Rejected, match=r"another protocol version: expected protocol 1\.x"
        ) as caught:
            link.welcome()
        assert caught.value.code == "version"
        link.close()


def test_each_kind_of_answer_of_another_router_is_logged_once(quick):
    with router_that_says(b"hello") as endpoint:
        link = NodeLink.connect(endpoint, WORKER)
        link.give_up_after(2.5)
        with pytest.raises(GaveUp):
            link.welcome()
        link.close()
    told = [each for each in quick if "is not in fedmq's protocol" in each["event"]]
    assert len(told) == 1
    assert [each for each in quick if "waiting for the broker" in each["event"]]


def test_hellos_do_not_accumulate_without_a_broker(tmp_path):
    port = free_port()
    link = NodeLink.connect(f"tcp://127.0.0.1:{port}", AGGREGATOR)
    link.pause(3.3)
    assert len(link._port._outgoing._headers) + len(link._port._outgoing._messages) == 1
    with serving(tmp_path, endpoint=f"tcp://127.0.0.1:{port}"):
        link.welcome()
        link.close()


# ---- the end of a run


def test_a_node_that_was_away_when_its_run_ended_learns_it_from_a_broker_that_started_again(
    tmp_path,
):
    with serving(tmp_path) as endpoint:
        worker = NodeLink.connect(endpoint, WORKER)
        with linked(endpoint, AGGREGATOR) as agg:
            worker.welcome()
            worker.stop()
            agg.over("reached 3 versions")
            with pytest.raises(RunOver):
                get(agg, "never")
    worker.close()
    again = NodeLink.connect(endpoint, WORKER)
    with serving(tmp_path, endpoint=endpoint), pytest.raises(RunOver, match="reached 3 versions"):
        again.welcome()
    again.close()


def test_a_broker_that_ends_with_its_runs_waits_for_goodbyes_but_not_beyond_a_lease(tmp_path):
    server = BrokerServer("tcp://127.0.0.1:0", tmp_path, BrokerSettings(lease_s=1.0, beat_s=0.1))
    thread = threading.Thread(target=server.serve, kwargs={"until_idle": True})
    thread.start()
    with contextlib.ExitStack() as stack:
        agg = stack.enter_context(linked(server.endpoint, AGGREGATOR))
        worker = stack.enter_context(linked(server.endpoint, WORKER))
        # Its connection stands, but it says nothing: a process that is stopped.
        stack.enter_context(worker._lock)
        agg.over("done")
        with pytest.raises(RunOver):
            get(agg, "never")
        began = time.monotonic()
        thread.join(10.0)
        assert 0.5 < time.monotonic() - began < 5.0
