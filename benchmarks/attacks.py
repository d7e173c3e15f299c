"""Measure what a hostile peer costs an honest run: its speed, and the broker's memory.

An honest run of three workers goes on at one broker. A raw peer, with pyzmq and msgpack alone,
floods that broker, and in turn another broker on this machine, which is the control: it takes as
much of the CPUs. Real processes on loopback, without keys.

    python benchmarks/attacks.py [--json FILE] [--only KIND,...] [--seconds 4] [--repeats 2]

attack, control: versions per second of the honest run; the ratio must be at least a half.
memory: of the broker over idle, at its peak; at most 64 MB more than the limits that the kind
    reaches, see docs/configuration.md.
ledger: megabytes per second by which the ledger grows during the attack, with the honest run's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import msgpack
import xxhash
import zmq
from rich.console import Console
from rich.table import Table

from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import LedgerTail
from fedmq.broker.settings import Limits
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out; it also holds rounds:Echo

from harness import ChildProcess, ProcessGroup, send_json
from peers import RUN, aggregator_program, broker, worker_program

WORKERS = 3
DIM = 21_840
LEAST_RATIO = 0.5
MOST_MB = 64.0
MB = 1_000_000
LIMITS = Limits()
_START_S = 60.0
"""Time that the honest run has to begin, in seconds."""
QUIET_S = 0.5
"""Time after a flood that belongs to neither side: what it left is still being handled."""

Flood = Callable[["RawPeer", float], int]


# ---- the attacker


class RawPeer:
    """A DEALER that sends any frame, and reads nothing unless asked to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.context, self.endpoint = context, endpoint
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, 200)
        self.socket.setsockopt(zmq.RCVHWM, 1)
        self.socket.connect(endpoint)
        self._n = 0

    def send(self, kind: str, *buffers: bytes, **fields: object) -> bool:
        """Send a frame; return False if the broker does not take it for a while."""
        return self.send_raw(msgpack.packb({"v": [1, 3], "kind": kind, **fields}), *buffers)

    def send_raw(self, *parts: bytes) -> bool:
        """Send any bytes."""
        try:
            self.socket.send_multipart(parts)
        except zmq.Again:
            return False
        return True

    def hello(self, run: str, role: str = "aggregator", **fields: object) -> bool:
        """Introduce itself as a node of a run, by default of one that it opens."""
        name, session = f"x{secrets.token_hex(4)}", f"{time.time_ns():x}-{secrets.token_hex(4)}"
        self.name, self.run = name, run
        given = {"config": "", "total_clients": 8, **fields}
        return self.send("hello", node=name, role=role, session=session, run=run, **given)

    def post(self, to: str, *buffers: bytes, body: object = None, blobs: object = ()) -> bool:
        """Post a message; ``blobs``: (digest, size) of those that do not come with it."""
        named = [(xxhash.xxh3_128_digest(each), len(each)) for each in buffers]
        message = {
            "kind": "note",
            "id": f"{self.name}/{self._n}",
            "run": self.run,
            "sender": self.name,
            "to": to,
            "body": body or {},
            "blobs": [{"digest": digest, "size": size} for digest, size in (*named, *blobs)],
        }
        sent = self.send(
            "post", *buffers, n=self._n, message=msgpack.packb(message), inline=[*range(len(named))]
        )
        self._n += sent
        return sent

    def open_run(self) -> None:
        """Open a run of its own, in which it may post."""
        self.hello(f"x{secrets.token_hex(6)}")
        self.socket.poll(2000)


def until(seconds: float) -> Iterator[int]:
    """Count until the time is over."""
    ends = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < ends, itertools.count())


def small_messages(peer: RawPeer, seconds: float) -> int:
    """Post small messages to itself, and read none."""
    peer.open_run()
    return sum(peer.post("aggregator", body={"x": 1}) for _ in until(seconds))


def heartbeats(peer: RawPeer, seconds: float) -> int:
    """Send heartbeats, and do not read the answers."""
    peer.open_run()
    return sum(peer.send("beat", taken=0) for _ in until(seconds))


def rejected_posts(peer: RawPeer, seconds: float) -> int:
    """Post to an address that does not exist."""
    peer.open_run()
    return sum(peer.post("client/99") for _ in until(seconds))


def wants_never_read(peer: RawPeer, seconds: float) -> int:
    """Request its own blob of 1 MB over and over, and read nothing."""
    peer.open_run()
    data = os.urandom(MB)
    peer.post("record", data)
    digest = xxhash.xxh3_128_digest(data)

    def want(number: int) -> bool:
        size = MB - number % 1000
        return peer.send("want", owner=peer.name, digest=digest, start=0, size=size)

    return sum(want(number) for number in until(seconds))


def held_posts(peer: RawPeer, seconds: float) -> int:
    """Name a blob that never comes, and post messages of 46 kB behind it."""
    peer.open_run()
    peer.post("record", blobs=[(os.urandom(16), 1 << 30)])
    body = {"x": [None] * 46_000}
    return sum(peer.post("record", body=body) for _ in until(seconds))


def garbage(peer: RawPeer, seconds: float) -> int:
    """Send bytes that are no frames."""
    return sum(peer.send_raw(os.urandom(100)) for _ in until(seconds))


def large_hellos(peer: RawPeer, seconds: float) -> int:
    """Say hello to a run that does not exist, with 60 kB."""
    config = "x" * 60_000
    return sum(peer.hello("none", "worker", config=config) for _ in until(seconds))


def client_lists(peer: RawPeer, seconds: float) -> int:
    """Say hello with very many clients."""
    lists = [[0, 1 << 20]], [[n, n] for n in range(10_000)]
    return sum(peer.hello(RUN, "worker", clients=lists[n % 2]) for n in until(seconds))


def new_runs(peer: RawPeer, seconds: float) -> int:
    """Open runs."""
    return sum(peer.hello(f"x{secrets.token_hex(6)}") for _ in until(seconds))


def absent_client(peer: RawPeer, seconds: float) -> int:
    """Post blobs of 1 MB to a client that nobody hosts."""
    peer.open_run()
    data = bytearray(os.urandom(MB))

    def post(number: int) -> bool:
        data[:8] = number.to_bytes(8)
        return peer.post("client/7", bytes(data))

    return sum(post(number) for number in until(seconds))


def silent_connections(peer: RawPeer, seconds: float) -> int:
    """Keep 300 TCP connections open that say nothing, and open new ones for those closed."""
    host, _, port = peer.endpoint.removeprefix("tcp://").rpartition(":")
    held: list[socket.socket] = []
    for _ in until(seconds):
        with suppress(OSError):
            held.append(socket.create_connection((host, int(port)), timeout=1.0))
        if len(held) > 300:
            held.pop(0).close()
        time.sleep(0.001)
    return len(held)


KINDS: dict[str, tuple[Flood, int]] = {
    "small": (small_messages, LIMITS.held_bytes + LIMITS.queued_bytes),
    "heartbeats": (heartbeats, LIMITS.held_bytes + LIMITS.queued_bytes),
    "rejected": (rejected_posts, LIMITS.held_bytes + LIMITS.queued_bytes),
    "wants": (wants_never_read, LIMITS.held_bytes + LIMITS.queued_bytes),
    "held": (held_posts, 2 * LIMITS.held_bytes),
    "garbage": (garbage, LIMITS.held_bytes),
    "hellos": (large_hellos, LIMITS.held_bytes),
    "clients": (client_lists, LIMITS.held_bytes),
    "runs": (new_runs, LIMITS.held_bytes),
    "blobs": (absent_client, LIMITS.held_bytes),
    "silent": (silent_connections, 0),
}
"""By name: the flood, and the bytes of the limits that one connection can reach with it."""


def attacker(pipe: Connection) -> None:
    """Flood on demand: receives (kind, endpoint, seconds), reports the number of frames sent."""
    while True:
        kind, endpoint, seconds = json.loads(pipe.recv_bytes())
        with zmq.Context() as context:
            peer = RawPeer(context, endpoint)
            flood, _ = KINDS[kind]
            sent = flood(peer, seconds)
            context.destroy(linger=0)
        send_json(pipe, sent)


# ---- the honest run


class HonestRun:
    """A broker, an aggregator and workers, which go on until the group ends."""

    def __init__(self, group: ProcessGroup) -> None:
        self._ledger = group.folder / "honest"
        self.broker = group.start(broker, str(self._ledger), share_files=True)
        self.endpoint, _ = self.broker.receive()
        given = {
            "run": {"id": RUN, "versions": 10_000_000, "evaluate_every": 0},
            "problem": {"name": "rounds:Vector", "dim": DIM, "clients": WORKERS},
            "algorithm": {"name": "rounds:Echo"},
            "schedule": {"name": "rounds", "fraction": 1.0},
            "worker": {"device": "cpu"},
        }
        config = set_up(build(given)).config.to_toml()
        group.start(aggregator_program, self.endpoint, config)
        for client in range(WORKERS):
            group.start(worker_program, self.endpoint, client)
        self._tail: LedgerTail | None = None
        self._times: list[float] = []

    def versions(self, begin: float, end: float) -> int:
        """Return the number of versions between two times, in seconds since 1970."""
        if self._tail is None and self._ledger.exists():
            self._tail = LedgerTail(self._ledger)
        for entry in self._tail.poll() if self._tail else ():
            if isinstance(entry, Accepted):
                message = entry.read()
                if message.run == RUN and message.kind == "version":
                    self._times.append(entry.at)
        return sum(begin <= at < end for at in self._times)

    def ledger_bytes(self) -> int:
        """Return the size of the ledger."""
        return sum(path.stat().st_size for path in self._ledger.iterdir())


def flood_for(
    run: HonestRun, raider: ChildProcess, kind: str, endpoint: str, seconds: float
) -> tuple[float, int, float]:
    """Flood a broker; return (versions/s of the honest run, frames sent, peak memory in bytes)."""
    begin, peak = time.time(), 0
    raider.send([kind, endpoint, seconds])
    while not raider.has_message(0.02):
        peak = max(peak, run.broker.memory("VmRSS"))
    sent = raider.receive()
    rate = run.versions(begin, begin + seconds) / seconds
    time.sleep(QUIET_S)
    return rate, sent, peak


def main() -> int:
    """Print the table; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of floods")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each flood")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    kinds = options.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown kind {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    here = str(Path(__file__).parent)
    sys.path.append(here)  # this process and the nodes import rounds:Echo from here
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    table = Table(
        *("flood", "attack", "control", "ratio", "memory", "limit", "sent", "ledger"),
        caption="attack, control: versions/s; memory, limit: MB; sent: frames; ledger: MB/s",
    )
    figures: dict[str, float] = {}
    missed = False
    for kind in kinds:
        allowed = MOST_MB + KINDS[kind][1] / MB
        with ProcessGroup() as group:
            run = HonestRun(group)
            other, _ = group.start(broker, str(group.folder / "other")).receive()
            raider = group.start(attacker)
            began = time.time()
            while run.versions(began, time.time()) < 20:
                if time.time() > began + _START_S:
                    sys.exit(f"{kind}: the honest run made no 20 versions in {_START_S:g} s")
                time.sleep(0.1)
            time.sleep(1.0)  # its memory and its speed settle
            idle = run.broker.memory("VmRSS")
            rates: dict[str, list[float]] = {"attack": [], "control": []}
            sent, peak, grown = 0, 0.0, 0
            for _ in range(options.repeats):
                rate, *_ = flood_for(run, raider, kind, other, options.seconds)
                rates["control"].append(rate)
                before = run.ledger_bytes()
                rate, count, most = flood_for(run, raider, kind, run.endpoint, options.seconds)
                rates["attack"].append(rate)
                sent, peak, grown = sent + count, max(peak, most), run.ledger_bytes() - before
        attack, control = (statistics.median(found) for found in rates.values())
        ratio, over = attack / max(control, 1e-9), (peak - idle) / MB
        missed |= ratio < LEAST_RATIO or over > allowed
        table.add_row(
            kind,
            f"{attack:.1f}",
            f"{control:.1f}",
            f"{ratio:.2f}",
            f"{over:.0f}",
            f"{allowed:.0f}",
            f"{sent:,}",
            f"{grown / options.seconds / MB:,.1f}",
        )
        figures |= {f"attacks.{kind}.ratio": ratio, f"attacks.{kind}.memory_mb": over}
    Console(width=max(80, Console().width)).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
