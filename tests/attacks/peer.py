"""A raw peer: speaks to a broker with msgpack, xxhash and pyzmq alone, and sends whatever it likes.

It imports nothing of fedmq, so that no check of ours stands between an attack and the broker.
"""

import collections
import itertools
import secrets
import socket
import time

import msgpack
import xxhash
import zmq

VERSION = [1, 3]
NUMBERED = ("post", "postall", "done", "over")


def digest(data):
    return xxhash.xxh3_128_digest(data)


def session_id(number=None):
    """Return the id of a session that starts now, or that claims to."""
    return f"{time.time_ns() if number is None else number:016x}-{secrets.token_hex(4)}"


class Peer:
    """One connection, and what it has heard.

    Args:
        wire: carries messages as lists of parts: ``send(parts)`` and ``receive(timeout_s)``.

    Attributes:
        heard: all frames so far, each as (header, buffers).
        deliveries: messages that were delivered, by ledger number.
        n: number of the next numbered frame.
        taken: every delivery below this number has arrived.
    """

    def __init__(self, wire):
        self.wire = wire
        self.heard = []
        self.deliveries = {}
        self.n = self.taken = 0
        self.node = self.run = self.session = ""
        self._queue = collections.deque()
        self._ids = itertools.count()

    # ---- frames

    def raw(self, *parts):
        """Send a message of any parts."""
        self.wire.send(list(parts))

    def frame(self, kind, **fields):
        """Return the header of a frame; numbered ones get the next number unless it is given."""
        if kind in NUMBERED and "n" not in fields:
            fields["n"], self.n = self.n, self.n + 1
        return msgpack.packb({"v": VERSION, "kind": kind, **fields})

    def send(self, kind, *buffers, **fields):
        """Send a frame."""
        self.raw(self.frame(kind, **fields), *buffers)

    def hello(self, node, role="worker", run="r", **fields):
        """Say who this claims to be; a session of its own unless one is given."""
        self.node, self.run = node, run
        self.session = fields.setdefault("session", self.session or session_id())
        self.send("hello", node=node, role=role, run=run, **fields)

    def message(self, kind, to, body=None, buffers=(), **fields):
        """Return the bytes of a message; ``fields`` replaces or adds any of its fields."""
        blobs = [{"digest": digest(each), "size": len(each)} for each in buffers]
        about = {"kind": kind, "run": self.run, "sender": self.node, "to": to}
        about |= {"id": f"{self.session}/{next(self._ids)}", "body": body or {}, "blobs": blobs}
        return msgpack.packb({**about, **fields})

    def post(self, kind, to, body=None, buffers=(), consumes=(), **fields):
        """Post a message, with its blobs beside it; return the message's id."""
        message = self.message(kind, to, body, buffers, **fields)
        inline = list(range(len(buffers)))
        self.send("post", *buffers, message=message, inline=inline, consumes=list(consumes))
        return msgpack.unpackb(message, strict_map_key=False)["id"]

    def want(self, owner, name, start=0, size=1):
        """Request bytes of a blob."""
        self.send("want", owner=owner, digest=name, start=start, size=size)

    # ---- what comes back

    def listen(self, timeout_s=0.0):
        """Return the frames of the next message; none if nothing comes in time."""
        parts = self.wire.receive(timeout_s)
        if parts is None:
            return []
        header = msgpack.unpackb(parts[0], strict_map_key=False)
        if isinstance(header, dict):
            frames = [(header, parts[1:])]
        else:
            frames, start = [], 1
            for data, count in header:
                frames.append(
                    (msgpack.unpackb(data, strict_map_key=False), parts[start : start + count])
                )
                start += count
        for frame, buffers in frames:
            self._note(frame, buffers)
        return frames

    def _note(self, frame, buffers):
        self.heard.append((frame, buffers))
        if frame["kind"] == "deliver":
            message = msgpack.unpackb(frame["message"], strict_map_key=False)
            self.deliveries[frame["seq"]] = message
            self.taken = max(self.taken, frame["seq"] + 1)

    def drain(self, quiet_s=0.0):
        """Listen until nothing comes for a while; return what came, in order."""
        found = []
        while frames := self.listen(quiet_s):
            found += frames
        return found

    def wait(self, *kinds, timeout_s=5.0):
        """Return the next frame of one of these kinds, as (header, buffers); None without one."""
        until = time.monotonic() + timeout_s
        while not self._queue:
            left = until - time.monotonic()
            frames = self.listen(max(0.0, left))
            self._queue += [each for each in frames if each[0]["kind"] in kinds]
            if not frames and left <= 0:
                return None
        return self._queue.popleft()

    def delivered(self, *kinds):
        """Return the deliveries of these kinds of messages, as (number, message)."""
        return [(seq, each) for seq, each in self.deliveries.items() if each["kind"] in kinds]


class Dealer:
    """A DEALER socket: the wire of a `Peer` that speaks ZeroMQ.

    Args:
        endpoint: of the broker.
        keys: (own public, own secret, broker's public) in Z85; None without CURVE.
        routing_id: that the peer claims; b"" for none.
        metadata: further properties of the handshake, such as ``X-User-Id:name``.
    """

    def __init__(self, endpoint, keys=None, routing_id=b"", metadata=()):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        if keys is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = map(str.encode, keys[:2])
            self.socket.curve_serverkey = keys[2].encode()
        if routing_id:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        for each in metadata:
            self.socket.setsockopt(zmq.METADATA, each)
        self.watch = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED
        )
        self.watch.rcvhwm = 0
        self.socket.connect(endpoint)

    def send(self, parts):
        self.socket.send_multipart(parts, zmq.NOBLOCK)

    def receive(self, timeout_s):
        if not self.socket.poll(round(timeout_s * 1000)):
            return None
        return self.socket.recv_multipart()

    def handshake(self, timeout_s=5.0):
        """Return the first event of the handshake: an `zmq.Event`; None if none comes in time."""
        if not self.watch.poll(round(timeout_s * 1000)):
            return None
        return zmq.Event(int.from_bytes(self.watch.recv_multipart()[0][:2], "little"))

    def close(self):
        self.socket.disable_monitor()
        self.watch.close()
        self.context.destroy(linger=0)


def tcp(endpoint):
    """Return a plain TCP connection to a broker: no ZeroMQ at all."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01NULL".ljust(64, b"\x00")
"""A ZMTP 3.1 greeting of a client with the NULL mechanism."""


def shake_hands(raw, **properties):
    """Do the handshake of a NULL client by hand; properties may be any, such as ``User_Id``.

    Raises:
        OSError: the broker has closed the connection.
    """
    raw.sendall(GREETING)
    _read(raw, len(GREETING))
    raw.sendall(ready(Socket_Type=b"DEALER", Identity=b"", **properties))
    _, size = _read(raw, 2)
    _read(raw, size)


def say(raw, header):
    """Send a message of one short part."""
    raw.sendall(bytes([0, len(header)]) + header)


def _read(raw, size):
    data = b""
    while len(data) < size:
        more = raw.recv(size - len(data))
        if not more:
            raise ConnectionResetError("the broker has closed the connection")
        data += more
    return data


def ready(**properties):
    """Return a READY command with any properties, also ones that libzmq would not send."""
    body = b"\x05READY"
    for name, value in properties.items():
        key = name.replace("_", "-").encode()
        body += bytes([len(key)]) + key + len(value).to_bytes(4, "big") + value
    return b"\x04" + bytes([len(body)]) + body
