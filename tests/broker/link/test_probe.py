"""What a probe finds at an endpoint, over real sockets on loopback."""

import contextlib
import http.server
import socket
import threading

import pytest
import zmq

from fedmq.broker.link.probe import Listener, probe
from fedmq.broker.wire.endpoints import parse_endpoint
from tests.broker.loops import serving

pytestmark = pytest.mark.end_to_end


@contextlib.contextmanager
def zmq_socket(kind, **options):
    with zmq.Context() as context, context.socket(kind) as listener:
        listener.linger = 0
        for name, value in options.items():
            setattr(listener, name, value)
        port = listener.bind_to_random_port("tcp://127.0.0.1")
        yield f"tcp://127.0.0.1:{port}"


@contextlib.contextmanager
def plain_server(answer):
    """A server that sends ``answer`` on each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1000)
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(1000):
                            pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def found(text, timeout_s=1.0):
    return probe(parse_endpoint(text), timeout_s)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(zmq.PUB, "PUB"), (zmq.REP, "REP"), (zmq.DEALER, "DEALER"), (zmq.PULL, "PULL")],
)
def test_another_zeromq_socket_is_named(kind, name):
    with zmq_socket(kind) as endpoint:
        listener, text = found(endpoint)
    assert listener is Listener.OTHER_SOCKET
    assert f"of type {name}" in text


def test_a_router_may_be_a_broker(tmp_path):
    with zmq_socket(zmq.ROUTER) as endpoint:
        assert found(endpoint).listener is Listener.SILENT
    with serving(tmp_path) as endpoint:
        assert found(endpoint).listener is Listener.SILENT


def test_a_socket_that_asks_for_keys_is_reported():
    _, secret = zmq.curve_keypair()
    with zmq_socket(zmq.ROUTER, curve_server=1, curve_secretkey=secret) as endpoint:
        listener, text = found(endpoint)
    assert listener is Listener.SECURED
    assert "requires keys" in text


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"", b"\xff", b"\xff" * 64],
    ids=["http", "ssh", "nothing", "a byte", "bytes"],
)
def test_a_server_without_zeromq_is_reported(answer):
    with plain_server(answer) as endpoint:
        listener, text = found(endpoint, 0.2)
    assert listener is Listener.NOT_ZEROMQ
    assert "does not speak ZeroMQ" in text
    assert ("HTTP" in text) == answer.startswith(b"HTTP")


def test_a_mute_server_is_reported():
    """Like a suspended broker: the kernel accepts connections for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        listener, text = found(f"tcp://127.0.0.1:{server.getsockname()[1]}", 0.1)
    assert listener is Listener.MUTE
    assert "sends nothing" in text


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_an_http_server_that_waits_for_the_end_of_a_line_is_reported():
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        listener, text = found(f"tcp://127.0.0.1:{server.server_port}", 0.1)
        thread.join()
    assert listener is Listener.NOT_ZEROMQ
    assert "it sent" in text


GREETING = (b"\xff" + bytes(8) + b"\x7f\x03\x01NULL").ljust(64, b"\0")


@pytest.mark.parametrize(
    "command",
    [b"\x04\x05READ", b"\x06" + b"\xff" * 8, b"\x04\x08\x05READY\xffx", b"\x00\x01x", b"\x04\x00"],
    ids=["cut", "huge", "cut inside", "no command", "empty"],
)
def test_a_greeting_with_nonsense_behind_it_is_another_socket(command):
    with plain_server(GREETING + command) as endpoint:
        assert found(endpoint, 0.3).listener is Listener.OTHER_SOCKET


def test_nothing_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    for text in (endpoint, f"ipc://{tmp_path}/none"):
        assert found(text).listener is Listener.REFUSED


def test_each_address_of_a_name_is_tried_and_named(monkeypatch):
    with zmq_socket(zmq.PUB) as endpoint:
        port = int(endpoint.rpartition(":")[2])
        addresses = [("127.0.0.2", port), ("127.0.0.1", port), ("127.0.0.3", port)]
        answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each) for each in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
        listener, text = found(f"tcp://broker.example:{port}")
    assert listener is Listener.OTHER_SOCKET
    assert text.endswith("; broker.example is 127.0.0.2, 127.0.0.1")


def test_a_name_without_an_address(monkeypatch):
    def getaddrinfo(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    listener, text = found("tcp://broker.example:7700")
    assert listener is Listener.UNRESOLVED
    assert "'broker.example' does not resolve" in text
