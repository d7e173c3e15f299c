"""The references of the broker benchmark: ZeroMQ's proxy in C, a copying relay, and TCP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket as sockets
import time
from multiprocessing.connection import Connection

import zmq
from harness import distinct, is_small, pace, send_json, time_receiver, time_round_trips

from fedmq.broker.process import allow_many_files

_TCP_BLOCK = 256 * 1024


# ---- ZeroMQ: a sender and a receiver by name, with frames of any size


def proxy(pipe: Connection) -> None:
    """Relay in C, from one ROUTER to one DEALER, which sends to its peers in turn."""
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    endpoints = []
    for each in (front, back):
        each.bind("tcp://127.0.0.1:*")
        endpoints.append(each.getsockopt_string(zmq.LAST_ENDPOINT))
    send_json(pipe, endpoints)
    zmq.proxy(front, back)


def relay(pipe: Connection, *, copy: bool) -> None:
    """Relay in Python, by name; ``copy`` copies each frame on the way in and on the way out."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind("tcp://127.0.0.1:*")
    send_json(pipe, [socket.getsockopt_string(zmq.LAST_ENDPOINT)] * 2)
    while True:
        sender, to, *rest = socket.recv_multipart(copy=copy)
        socket.send_multipart([to, sender, *rest], copy=copy)


def answering_router(pipe: Connection, beat_s: float, lease_s: float) -> None:
    """Echo every frame to any number of peers, with as many pings as a broker's socket sends."""
    allow_many_files()
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.setsockopt(zmq.HEARTBEAT_IVL, round(beat_s * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(lease_s * 1000))
    socket.bind("tcp://127.0.0.1:*")
    send_json(pipe, [socket.getsockopt_string(zmq.LAST_ENDPOINT)] * 2)
    while True:
        socket.send_multipart(socket.recv_multipart())


def dealer(endpoint: str, name: str) -> zmq.Socket[bytes]:
    """Return a socket that the relay knows by this name."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt_string(zmq.IDENTITY, name)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    return socket


def _introduce(socket: zmq.Socket[bytes], to: str, word: bytes) -> None:
    """Send a word until an answer arrives: the relay may not know the other peer yet."""
    while not socket.poll(100):
        socket.send_multipart([to.encode(), word])


def wait_for_echo(socket: zmq.Socket[bytes], to: str) -> None:
    """Wait until the relay knows a peer that echoes; receive its answers."""
    _introduce(socket, to, b"ready")
    while socket.poll(200):
        socket.recv_multipart()


def send_zmq(_pipe: Connection, endpoint: str, to: list[str], size: int) -> None:
    """Send a stream to the receiver; ``to`` is empty for a relay that does not route by name."""
    socket = dealer(endpoint, "sender")
    window, batch, _ = pace(size)
    buffers = distinct(size, window + 1)
    prefix = [name.encode() for name in to]
    fixed = bytes(next(buffers))
    socket.recv_multipart()
    credit = window
    while True:
        while credit < batch:
            word = socket.recv_multipart()[-1]
            credit += 0 if word == b"ready" else int(word)
        for _ in range(batch):
            if is_small(size):
                socket.send_multipart([*prefix, fixed]) if prefix else socket.send(fixed)
            else:
                socket.send_multipart([*prefix, next(buffers)], copy=False)
        credit -= batch


def receive_zmq(pipe: Connection, endpoint: str, size: int, seconds: float) -> None:
    """Receive and time a stream."""
    socket = dealer(endpoint, "receiver")
    _, _, credit = pace(size)
    taken = 0

    def take() -> None:
        nonlocal taken
        socket.recv()  # the sender's name
        length = len(socket.recv() if is_small(size) else socket.recv(copy=False))
        if length != size:
            raise SystemExit(f"expected {size} bytes, got {length}")
        taken += 1
        if taken == credit:
            socket.send_multipart([b"sender", b"%d" % taken])
            taken = 0

    _introduce(socket, "sender", b"ready")
    time_receiver(pipe, take, seconds)
    while True:
        take()


def ping_zmq(pipe: Connection, endpoint: str, seconds: float) -> None:
    """Measure round trips to the node that echoes."""
    socket = dealer(endpoint, "ping")
    wait_for_echo(socket, "echo")

    def exchange() -> None:
        socket.send_multipart([b"echo", b"ping"])
        socket.recv_multipart()

    time_round_trips(pipe, exchange, seconds)


def echo_zmq(_pipe: Connection, endpoint: str, name: str, *, copy: bool) -> None:
    """Send every message back."""
    socket = dealer(endpoint, name)
    while True:
        socket.send_multipart(socket.recv_multipart(copy=copy), copy=copy)


def fan_out_zmq(pipe: Connection, endpoint: str, workers: int, size: int) -> None:
    """Send one model to all workers; report the seconds until all but one have it."""
    socket = dealer(endpoint, "sender")
    model = os.urandom(size)
    ready: set[bytes] = set()
    while len(ready) < workers:
        ready.add(socket.recv_multipart()[-1])
    send_json(pipe, "ready")
    pipe.recv_bytes()
    began = time.monotonic()
    for _ in range(workers):
        socket.send(model, copy=False)
    last, got = began, 0
    while got < workers - 1:
        word, _, at = socket.recv_multipart()[-1].partition(b" ")
        if word == b"got":
            last, got = max(last, float(at)), got + 1
    send_json(pipe, last - began)
    signal.pause()


def collect_zmq(pipe: Connection, endpoint: str, index: int) -> None:
    """Receive the model once."""
    socket = dealer(endpoint, f"worker-{index}")
    send_json(pipe, "ready")
    _introduce(socket, "sender", b"ready-%d" % index)
    model = socket.recv_multipart(copy=False)
    socket.send_multipart([b"sender", b"got %f" % time.monotonic()])
    signal.pause()
    del model


# ---- TCP


def tcp_relay(pipe: Connection) -> None:
    """Copy bytes from one connection to another."""
    with sockets.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        send_json(pipe, [port, port])
        ends: dict[bytes, sockets.socket] = {}
        while len(ends) < 2:
            connection, _ = server.accept()
            connection.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
            ends[connection.recv(1)] = connection
        block = memoryview(bytearray(_TCP_BLOCK))
        while length := ends[b"S"].recv_into(block):
            ends[b"R"].sendall(block[:length])


def _connected(port: int, word: bytes) -> sockets.socket:
    connection = sockets.create_connection(("127.0.0.1", port))
    connection.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
    connection.sendall(word)
    return connection


def send_tcp(_pipe: Connection, port: int, size: int) -> None:
    """Send a stream of bytes, one message at a time."""
    connection = _connected(port, b"S")
    with contextlib.suppress(ConnectionError):
        for buffer in distinct(size, 4):
            connection.sendall(buffer)


def receive_tcp(pipe: Connection, port: int, size: int, seconds: float) -> None:
    """Receive and time a stream of bytes."""
    connection = _connected(port, b"R")
    buffered = connection.makefile("rb", buffering=_TCP_BLOCK)
    block = memoryview(bytearray(size))

    def take() -> None:
        if is_small(size):
            length = len(buffered.read(size))
        else:
            length = connection.recv_into(block, size, sockets.MSG_WAITALL)
        if length != size:
            raise SystemExit(f"expected {size} bytes, got {length}")

    time_receiver(pipe, take, seconds)
    signal.pause()
