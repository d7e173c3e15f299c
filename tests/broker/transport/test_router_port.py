"""What a broker's sockets prove about a connection, whom they let in, and which they close."""

import contextlib
import socket
import subprocess
import sys
import time

import pytest
import zmq

from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.rights import Access, Origin, Rights
from fedmq.broker.core.events import ReceivedFrom, Unreadable
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.router import RouterPort
from fedmq.broker.settings import BrokerSettings, Limits
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.schema import Heartbeat, Hello
from tests.broker.loops import ANY

pytestmark = pytest.mark.end_to_end
OWN, ONE, TWO = KeyPair.new(), KeyPair.new(), KeyPair.new()
BEAT = encode_frame(Heartbeat())
HELLO = encode_frame(Hello(node="one", role="worker", session="1"))


class Room:
    """A port and raw peers; the test runs the turns of the port's loop."""

    def __init__(self, *endpoints, own=OWN, admitted=(ONE, TWO), limits=None):
        self.context = zmq.Context()
        settings = BrokerSettings(limits=limits or Limits())
        self.port = RouterPort(endpoints, settings, own)
        rights = {each.public: Rights(name="x", key=each.public) for each in admitted}
        self.port.admit(Access(keys=rights))
        self.poller = zmq.Poller()
        self.port.register(self.poller)
        self.peers = []

    def turn(self, timeout_ms=20):
        """Run one turn; return the frames."""
        self.port.watch(dict(self.poller.poll(timeout_ms)))
        events = list(self.port.drain())
        self.port.tidy()
        return events

    def until(self, done, within_s=5.0):
        """Run turns until the condition holds for the frames that have come; return these."""
        events, deadline = [], time.monotonic() + within_s
        while not done(events):
            assert time.monotonic() < deadline, events
            events += self.turn()
        return events

    def dealer(self, own=None, routing_id=b"", endpoint=None):
        dealer = self.context.socket(zmq.DEALER)
        dealer.linger = 0
        if own is not None:
            dealer.curve_serverkey = OWN.public.encode()
            dealer.curve_publickey = own.public.encode()
            dealer.curve_secretkey = own.secret.encode()
        if routing_id:
            dealer.routing_id = routing_id
        dealer.connect(endpoint or self.port.endpoints[0])
        self.peers.append(dealer)
        return dealer

    def plain(self):
        """A TCP connection that says nothing."""
        port = int(self.port.endpoints[0].rpartition(":")[2])
        self.peers.append(socket.create_connection(("127.0.0.1", port)))
        return self.peers[-1]

    def close(self):
        for each in self.peers:
            each.close()
        self.context.term()
        self.port.close()


@pytest.fixture
def new_room():
    """Make a `Room`; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*endpoints, **more):
            room = Room(*(endpoints or (ANY,)), **more)
            stack.callback(room.close)
            return room

        yield make


def is_closed(connection, within_s=0.01):
    connection.settimeout(within_s)
    try:
        while connection.recv(100):
            pass  # libzmq's greeting
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_each_frame_has_the_key_and_the_address_of_its_peer(new_room, tmp_path):
    room = new_room(ANY, f"ipc://{tmp_path}/s")
    room.dealer(ONE).send(BEAT)
    room.dealer(TWO).send(b"garbage")
    room.dealer(endpoint=room.port.endpoints[1]).send(BEAT)
    events = room.until(lambda events: len(events) == 3)
    origins = {type(each): each.origin for each in events if each.origin.key}
    assert origins == {
        ReceivedFrom: Origin(ONE.public, "127.0.0.1"),
        Unreadable: Origin(TWO.public, "127.0.0.1"),
    }
    assert Origin("", "") in [each.origin for each in events]


def zmtp(sock, **properties):
    """Say what a DEALER without security says, with these properties."""
    sock.sendall((b"\xff" + bytes(8) + b"\x7f\x03\x01NULL").ljust(64, b"\0"))
    body = b"\x05READY"
    for name, value in {"Socket_Type": b"DEALER", **properties}.items():
        key = name.replace("_", "-").encode()
        body += bytes([len(key)]) + key + len(value).to_bytes(4, "big") + value
    sock.sendall(bytes([4, len(body)]) + body)


@pytest.mark.parametrize("own", [OWN, None])
def test_a_peer_without_a_key_cannot_claim_one(new_room, tmp_path, own):
    """libzmq itself takes the user id that a raw peer writes into its READY."""
    room = new_room(f"ipc://{tmp_path}/s", own=own)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(f"{tmp_path}/s")
        zmtp(raw, User_Id=ONE.public.encode(), Identity=b"agg")
        answer = b""
        raw.settimeout(0.01)
        while b"READY" not in answer:
            room.turn()
            with contextlib.suppress(TimeoutError):
                answer += raw.recv(1000)
        raw.sendall(bytes([0, len(BEAT)]) + BEAT)
        (event,) = room.until(lambda events: events)
    assert (event.peer, event.origin) == (b"agg", Origin())


def test_a_routing_id_is_never_handed_to_another_key(new_room):
    room = new_room()
    first = room.dealer(ONE, b"agg")
    first.send(BEAT)
    room.until(lambda events: events)
    second = room.dealer(TWO, b"agg")
    second.send(BEAT)
    room.until(lambda _: len(room.port._connections._by_fd) == 2)
    assert [*room.turn(50), *room.turn(50)] == []  # libzmq reads nothing of a second claimant
    first.send(BEAT)
    (event,) = room.until(lambda events: events)
    assert event.origin.key == ONE.public
    first.close()
    second.close()
    room.until(lambda _: not room.port._connections._by_fd)
    assert not room.port._connections._by_peer
    third = room.dealer(TWO, b"agg")
    third.send(BEAT)
    (event,) = room.until(lambda events: events)
    assert event.origin.key == TWO.public


def test_one_connection_is_closed_and_the_others_stay(new_room):
    room = new_room()
    monitors = []
    for name, own in ((b"one", ONE), (b"two", TWO)):
        dealer = room.dealer(own, name)
        monitors.append(dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED))
        room.peers.append(monitors[-1])
        dealer.send(BEAT)
    room.until(lambda events: len(events) == 2)
    room.port.disconnect(b"one")
    room.port.disconnect(b"nobody")
    room.until(lambda _: monitors[0].poll(0))
    assert not monitors[1].poll(50)


def test_a_connection_that_says_nothing_is_closed_after_the_handshake_time(new_room):
    room = new_room(limits=Limits(handshake_s=0.2))
    began, plain = time.monotonic(), room.plain()
    room.until(lambda _: is_closed(plain))
    assert 0.15 < time.monotonic() - began < 2.0


def test_the_oldest_silent_connections_make_room_for_new_ones(new_room):
    room = new_room(limits=Limits(waiting=3))
    node = room.dealer(ONE)
    node.send(HELLO)
    room.until(lambda events: events)
    plain = []
    for number in range(6):
        plain.append(room.plain())
        room.until(lambda _, n=number: len(room.port._connections._by_fd) >= min(n, 3) + 2)
    room.until(lambda _: all(is_closed(each) for each in plain[:3]))
    assert not [each for each in plain[3:] if is_closed(each)]
    node.send(BEAT)
    room.until(lambda events: events)


def test_two_thousand_connections_do_not_stop_one_that_works(new_room):
    """A monitor that nobody reads stops libzmq's I/O thread after some hundred."""
    room = new_room()
    node = room.dealer(ONE)
    for _ in range(20):
        for _ in range(100):
            room.plain().close()
            room.peers.pop()
        node.send(BEAT)
        room.until(lambda events: events)
    room.until(lambda _: len(room.port._connections._by_fd) == 1)


BROKER = """
import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings, Limits
settings = BrokerSettings(limits=Limits(handshake_s=60.0))
server = BrokerServer("tcp://127.0.0.1:0", pathlib.Path(sys.argv[1]), settings)
print(server.endpoint, flush=True)
server.serve()
"""


def test_silent_connections_do_not_keep_a_node_out_where_few_files_are_allowed(tmp_path):
    command = (sys.executable, "-P", "-c", BROKER, str(tmp_path))
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as broker,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(broker.kill)
        assert broker.stdout is not None
        endpoint = broker.stdout.readline().strip()
        address = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        for _ in range(100):
            stack.enter_context(socket.create_connection(address))
        began = time.monotonic()
        for number in range(3):
            hello = Hello(node=f"agg{number}", role="aggregator", session="s", run=f"r{number}")
            link = NodeLink.connect(endpoint, hello)
            stack.callback(link.close, silent=True)
            link.give_up_after(10.0)
            link.welcome()
        # The silent ones were closed for it: none has reached the end of its handshake yet.
        assert time.monotonic() - began < 30.0
