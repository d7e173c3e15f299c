"""Measure the cost of many idle nodes for the broker.

Each node is a connection of its own over loopback and sends one heartbeat per second. The
reference is a bare ROUTER that answers every message, with the same ZeroMQ pings.

    python benchmarks/many_nodes.py [--json FILE] [--nodes 100,1000,4000] [--seconds 5]

joined: seconds until every node has its Welcome.
cpu: of the broker's process while all nodes send heartbeats, in cores; and the part of it
    used by ZeroMQ's thread, which pings the connections.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import psutil
import zmq
from rich.console import Console
from rich.table import Table

from fedmq.broker.process import allow_many_files
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.addresses import AGGREGATOR, WORKER
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.schema import Heartbeat, Hello

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

import zmq_relays
from harness import WAIT_S, ProcessGroup
from peers import RUN, broker

SETTINGS = BrokerSettings()


def threads_s(process: psutil.Process) -> tuple[float, float]:
    """Return the CPU seconds of a process so far: of all threads, and of all but the main one."""
    times = {each.id: each.user_time + each.system_time for each in process.threads()}
    return sum(times.values()), sum(times.values()) - times[process.pid]


def many_nodes(kind: str, nodes: int, seconds: float) -> dict[str, float]:
    """Let nodes join, then send heartbeats for some seconds; return the figures."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, nodes + 1)
    with ProcessGroup() as group, context:
        ours = kind == "fedmq"
        server = (
            group.start(broker, str(group.folder))
            if ours
            else group.start(zmq_relays.answering_router, SETTINGS.beat_s, SETTINGS.lease_s)
        )
        endpoint, _ = server.receive()

        def join(hello: Hello) -> zmq.Socket[bytes]:
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            socket.send(encode_frame(hello))
            return socket

        began = time.monotonic()
        first = Hello(node="a", role=AGGREGATOR, session="s", run=RUN, total_clients=nodes)
        sockets = [join(first)]
        sockets[0].poll(WAIT_S * 1000)
        for number in range(nodes - 1):
            hello = Hello(node=f"w{number}", role=WORKER, session="s", clients=((number, number),))
            sockets.append(join(hello))
        joining = set(sockets[1:])
        poller = zmq.Poller()
        for socket in joining:
            poller.register(socket, zmq.POLLIN)
        while joining and time.monotonic() < began + WAIT_S:
            for socket, _ in poller.poll(1000):
                poller.unregister(socket)
                joining.discard(socket)
        if joining:
            raise SystemExit(
                f"{kind}: {len(joining)} of {nodes} nodes did not join in {WAIT_S:g} s"
            )
        joined = time.monotonic() - began

        process = psutil.Process(server.pid)
        before, began = threads_s(process), time.monotonic()
        heartbeat = encode_frame(Heartbeat())
        for number in range(int(nodes * seconds)):
            # Evenly spaced, as real nodes send: a broker reads a burst in few turns of its loop.
            time.sleep(max(0.0, began + number * SETTINGS.beat_s / nodes - time.monotonic()))
            sockets[number % nodes].send(heartbeat)
        elapsed = time.monotonic() - began
        total, others = (b - a for a, b in zip(before, threads_s(process), strict=True))
        for socket in sockets:
            socket.close()
    return {"joined": joined, "cpu": total / elapsed, "cpu of ZeroMQ's": others / elapsed}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--nodes", default="100,1000,4000")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    allow_many_files()
    table = Table("nodes", "", "joined (s)", "CPU (cores)", "of it ZeroMQ's thread")
    figures = {}
    for nodes in [int(each) for each in options.nodes.split(",")]:
        for kind in ("fedmq", "bare ROUTER"):
            found = many_nodes(kind, nodes, options.seconds)
            table.add_row(f"{nodes:,}", kind, *(f"{value:.2f}" for value in found.values()))
            figures |= {f"many_nodes.{nodes}.{kind}.{name}": value for name, value in found.items()}
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
