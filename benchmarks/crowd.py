"""What very many nodes cost a broker that have nothing to say but that they are there.

Each node is a connection of its own over loopback, and says a beat each second. Beside it,
a bare ROUTER that answers whatever comes, with the same pings of ZeroMQ's own.

    python benchmarks/crowd.py [--json FILE] [--nodes 100,1000,4000] [--seconds 5]

joined: until every node has its Welcome, in seconds.
cpu: of the broker's process while all of them beat, in cores; and what of it is the thread
    of ZeroMQ's that pings the connections.
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

import relays
from harness import WAIT_S, Crew
from parties import RUN, broker

SETTINGS = BrokerSettings()


def threads_s(process: psutil.Process) -> tuple[float, float]:
    """Return the CPU time of a process so far: of all threads, and of all but the main one."""
    times = {each.id: each.user_time + each.system_time for each in process.threads()}
    return sum(times.values()), sum(times.values()) - times[process.pid]


def crowd(kind: str, nodes: int, seconds: float) -> dict[str, float]:
    """Let nodes join, then beat for some seconds; return the figures."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, nodes + 1)
    with Crew() as crew, context:
        ours = kind == "fedmq"
        server = (
            crew.start(broker, str(crew.folder))
            if ours
            else crew.start(relays.answering_router, SETTINGS.beat_s, SETTINGS.lease_s)
        )
        place, _ = server.hear()

        def join(hello: Hello) -> zmq.Socket[bytes]:
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(place)
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
            raise SystemExit(f"{len(joining)} of {nodes} nodes could not join {kind}")
        joined = time.monotonic() - began

        process = psutil.Process(server.pid)
        before, began = threads_s(process), time.monotonic()
        beat = encode_frame(Heartbeat())
        for number in range(int(nodes * seconds)):
            # Each at its time, as nodes are: in one burst a broker takes many at a turn.
            time.sleep(max(0.0, began + number * SETTINGS.beat_s / nodes - time.monotonic()))
            sockets[number % nodes].send(beat)
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
    table = Table("nodes", "", "joined (s)", "CPU (cores)", "ZeroMQ's thread of it")
    figures = {}
    for nodes in [int(each) for each in options.nodes.split(",")]:
        for kind in ("fedmq", "bare ROUTER"):
            found = crowd(kind, nodes, options.seconds)
            table.add_row(f"{nodes:,}", kind, *(f"{value:.2f}" for value in found.values()))
            figures |= {f"crowd.{nodes}.{kind}.{name}": value for name, value in found.items()}
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
