"""Measure the broker's throughput, latency and memory against bare ZeroMQ and TCP.

Real processes on loopback, with the ledger on disk. The references give none of the
guarantees: no ledger, acknowledgments, sessions or digests. They are ZeroMQ's own proxy in C,
a relay in Python that copies, and two TCP connections with a relay between them.

    python benchmarks/broker.py [--json FILE] [--only small,1mb,7mb,100mb,fanout,latency,recording,
                                power,curve] [--large]

small, 1mb, 7mb, 100mb: a stream from one node to another; each large message has new bytes.
fanout: one model sent to many workers, one of which stops half-way: the relay's memory over
    idle, the time until all others have the model, and how often the aggregator sent it.
latency: round trips of small messages while large ones stream through the same broker.
recording: streams of new and of repeated payloads, against a broker without a ledger.
power: streams under durability `power`, against `process`; the device's syncs set the ratio.
curve: streams encrypted with CURVE, against plain ones; blobs over the sockets, and with local_7mb
    from the ledger's files.
3gb: a 3 GB model through the real aggregator and workers, with --large only: the peak memory
    of each in model sizes, of the broker over idle, and the time including start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from fedmq.broker.access.curve import KeyPair, NodeKeys
from fedmq.broker.ledger.entries import Ended
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.wire.addresses import AGGREGATOR

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out; it also holds rounds:Echo

import broker_without_ledger
import zmq_relays
from harness import WAIT_S, ProcessGroup, Report, is_small
from peers import (
    RUN,
    aggregator_program,
    broker,
    collect_fedmq,
    echo_fedmq,
    fan_out_fedmq,
    ping_fedmq,
    receive_fedmq,
    send_fedmq,
    worker_program,
)

MB = 1_000_000
STREAMS = {"small": (100, 0.3), "1mb": (MB, 0.7), "7mb": (7 * MB, 0.7), "100mb": (100 * MB, 1.0)}
"""By case: bytes of a message, and the limit: the smallest accepted ratio to the proxy's rate."""
MODEL_BYTES = 100 * MB
FANOUT_PEAK_MB = 150.0
FANOUT_CROSSINGS = 1.05
LATENCY_P99_MS = 20.0
REPEATED_PAYLOADS = 4
"""Number of different payloads in a stream of repeated ones."""
RECORDING = {
    "fresh_1mb": (MB, False, 0.70),
    "fresh_7mb": (7 * MB, False, 0.70),
    "repeated_7mb": (7 * MB, True, 0.95),
}
"""By case: bytes of a message, whether payloads repeat, and the smallest accepted ratio."""
LARGE_NODE_MODELS = 2.2
LARGE_BROKER_MB = 200.0
SPARE_BYTES = 1_500 * MB
POWER = {"small": 100, "1mb": MB}
"""By case: bytes of a message."""
CURVE = {name: (size, False) for name, (size, _) in STREAMS.items()} | {"local_7mb": (7 * MB, True)}
"""By case: bytes of a message, and whether nodes read blobs from the ledger's files."""
CASES = (*STREAMS, "fanout", "latency", "recording", "power", "curve", "3gb")
Program = Callable[..., None]


def stream(kind: str, size: int, seconds: float, distinct: int | None = None) -> float:
    """Return the messages per second of one stream through a broker, the proxy or TCP."""
    with ProcessGroup() as group:
        timeout = WAIT_S + 2 * seconds
        if kind in ("fedmq", "recorded", "without_ledger", "power", "curve", "curve_files"):
            server = broker_without_ledger.broker if kind == "without_ledger" else broker
            # Without a ledger there are no files to read blobs from: both sides use sockets only.
            named: dict[str, Any] = {"share_files": kind not in ("recorded", "curve")}
            if kind == "power":
                named["durability"] = "power"
            source = sink = None
            if kind.startswith("curve"):
                named["own"] = own = KeyPair.new()
                source, sink = (NodeKeys(KeyPair.new(), own.public) for _ in range(2))
                named["admitted"] = [source.own.public, sink.own.public]
            if server is broker_without_ledger.broker:
                named = {}
            ledger = str(group.folder / "ledger")
            endpoint, _ = group.start(server, ledger, **named).receive()
            group.start(send_fedmq, endpoint, ["client/0", AGGREGATOR], size, distinct, keys=source)
            receiver = group.start(
                receive_fedmq, endpoint, "client/0", AGGREGATOR, size, seconds, keys=sink
            )
        elif kind == "proxy":
            front, back = group.start(zmq_relays.proxy).receive()
            group.start(zmq_relays.send_zmq, front, [], size)
            receiver = group.start(zmq_relays.receive_zmq, back, size, seconds)
        else:
            port, _ = group.start(zmq_relays.tcp_relay).receive()
            group.start(zmq_relays.send_tcp, port, size)
            receiver = group.start(zmq_relays.receive_tcp, port, size, seconds)
        receiver.receive(timeout)  # the warm-up is over
        return float(receiver.receive(timeout))


def streams(report: Report, case: str, options: argparse.Namespace) -> None:
    """Compare streams; repetitions alternate, so that a slow period affects all alike."""
    size, share = STREAMS[case]
    rates: dict[str, list[float]] = {"fedmq": [], "proxy": [], "tcp": []}
    for _ in range(options.repeats):
        for kind, found in rates.items():
            found.append(stream(kind, size, options.seconds))
    scale = 1 if is_small(size) else size / MB
    fedmq, proxy, tcp = (statistics.median(found) * scale for found in rates.values())
    unit = "messages/s" if is_small(size) else "MB/s"
    report.add(case, fedmq, unit, reference=proxy, tcp=tcp, ratio=share)


def recording(report: Report, options: argparse.Namespace) -> None:
    """Compare brokers with and without a ledger; repetitions alternate, as in `streams`."""
    for name, (size, repeat, share) in RECORDING.items():
        rates: dict[str, list[float]] = {"recorded": [], "without_ledger": []}
        distinct = REPEATED_PAYLOADS if repeat else None
        for _ in range(options.repeats):
            for kind, found in rates.items():
                found.append(stream(kind, size, options.seconds, distinct))
        ours, bare = (statistics.median(found) for found in rates.values())
        report.add(f"recording.{name}", ours, "messages/s", reference=bare, ratio=share)


def power(report: Report, options: argparse.Namespace) -> None:
    """Compare durability `power` with `process`; repetitions alternate, as in `streams`."""
    for name, size in POWER.items():
        rates: dict[str, list[float]] = {"power": [], "fedmq": []}
        for _ in range(options.repeats):
            for kind, found in rates.items():
                found.append(stream(kind, size, options.seconds))
        scale = 1 if is_small(size) else size / MB
        synced, unsynced = (statistics.median(found) * scale for found in rates.values())
        unit = "messages/s" if is_small(size) else "MB/s"
        report.add(f"power.{name}", synced, unit, reference=unsynced)


def curve(report: Report, options: argparse.Namespace) -> None:
    """Compare encrypted streams with plain ones; repetitions alternate, as in `streams`."""
    for name, (size, files) in CURVE.items():
        kinds = ("curve_files", "fedmq") if files else ("curve", "recorded")
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind, found in rates.items():
                found.append(stream(kind, size, options.seconds))
        scale = 1 if is_small(size) else size / MB
        encrypted, plain = (statistics.median(found) * scale for found in rates.values())
        unit = "messages/s" if is_small(size) else "MB/s"
        report.add(f"curve.{name}", encrypted, unit, reference=plain)


@dataclass
class FanOut:
    """Result of a fan-out.

    seconds: until all workers but the stopped one have the model.
    peak, peak_anonymous: bytes of the relay's memory above idle.
    received: bytes that the broker received from the aggregator.
    """

    seconds: float
    peak: int
    peak_anonymous: int
    received: int = 0


def fan_out(start: Program, sender: Program, worker: Program, workers: int) -> FanOut:
    """Send one model to many workers, and stop one worker when it has half of it."""
    with ProcessGroup() as group:
        ledger = group.folder / "ledger"
        relay = group.start(start, *([str(ledger)] if start is broker else []))
        front, back = relay.receive()
        source = group.start(sender, front, workers, MODEL_BYTES)
        receivers = [group.start(worker, back, index) for index in range(workers)]
        for process in (*receivers, source):
            process.receive()
        time.sleep(1.0)  # memory that start-up still frees is not idle memory
        idle, idle_anonymous = relay.memory("VmRSS"), relay.memory("RssAnon")
        slow = receivers[0]
        half = slow.memory("VmRSS") + MODEL_BYTES // 2
        peak, stopped, until = 0, False, time.monotonic() + WAIT_S
        source.send("go")
        # The worker's memory shows how much it has received.
        while not source.has_message(0.001 if not stopped else 0.02):
            peak = max(peak, relay.memory("RssAnon"))
            if not stopped and slow.memory("VmRSS") >= half:
                os.kill(slow.pid, signal.SIGSTOP)
                stopped = True
            if time.monotonic() > until:
                raise SystemExit(f"{sender.__name__}: not finished after {WAIT_S:g} s")
        if not stopped:
            raise SystemExit("cannot measure the fan-out: a worker finished before it was stopped")
        peak_rss = relay.memory("VmHWM") - idle
        found = FanOut(source.receive(), peak_rss, max(0, peak - idle_anonymous))
        if start is broker:
            source.send("end")
            source.receive()
            ended = [entry for entry in read_entries(ledger) if isinstance(entry, Ended)]
            found.received = ended[-1].nodes[AGGREGATOR]["received_bytes"]
        return found


def fanout(report: Report, options: argparse.Namespace) -> None:
    """Compare time and memory of sending one model to many workers."""
    workers = options.workers
    ours = fan_out(broker, fan_out_fedmq, collect_fedmq, workers)
    bare = fan_out(zmq_relays.proxy, zmq_relays.fan_out_zmq, zmq_relays.collect_zmq, workers)
    report.add(
        "fanout.peak_rss", ours.peak / MB, "MB", reference=bare.peak / MB,
        at_most=FANOUT_PEAK_MB,
    )  # fmt: skip
    report.add(
        "fanout.peak_anon", ours.peak_anonymous / MB, "MB",
        reference=bare.peak_anonymous / MB,
    )  # fmt: skip
    report.add("fanout.time", ours.seconds, "s", reference=bare.seconds)
    crossings = ours.received / MODEL_BYTES
    report.add(
        "fanout.crossings", crossings, "models", reference=float(workers),
        at_most=FANOUT_CROSSINGS,
    )  # fmt: skip


def round_trips(kind: str, seconds: float) -> list[float]:
    """Return the round trips of small messages, in ms, while large ones stream."""
    with ProcessGroup() as group:
        if kind == "fedmq":
            endpoint, _ = group.start(broker, str(group.folder / "ledger")).receive()
            group.start(echo_fedmq, endpoint)
            pinger = group.start(ping_fedmq, endpoint, seconds)
            group.start(send_fedmq, endpoint, ["client/2", "client/1"], MODEL_BYTES)
            load = group.start(receive_fedmq, endpoint, "client/2", "client/1", MODEL_BYTES, 1e9)
        else:
            endpoint, _ = group.start(zmq_relays.relay, copy=True).receive()
            group.start(zmq_relays.echo_zmq, endpoint, "echo", copy=True)
            pinger = group.start(zmq_relays.ping_zmq, endpoint, seconds)
            group.start(zmq_relays.send_zmq, endpoint, ["receiver"], MODEL_BYTES)
            load = group.start(zmq_relays.receive_zmq, endpoint, MODEL_BYTES, 1e9)
        pinger.receive()
        load.receive()
        pinger.send("go")
        return [float(each) for each in pinger.receive(WAIT_S + 2 * seconds)]


def latency(report: Report, options: argparse.Namespace) -> None:
    """Compare round trips under load."""
    found: dict[str, list[float]] = {"fedmq": [], "relay": []}
    for _ in range(options.repeats):
        for kind, durations in found.items():
            durations += round_trips(kind, options.seconds)
    ours, bare = (statistics.quantiles(found[kind], n=100) for kind in ("fedmq", "relay"))
    report.add("latency.p50", ours[49], "ms", reference=bare[49])
    report.add("latency.p99", ours[98], "ms", reference=bare[98], at_most=LATENCY_P99_MS)


def large(report: Report, options: argparse.Namespace) -> None:
    """Send a very large model to two workers and back through the real programs.

    There is no evaluator: it would hold one more model.
    """
    from fedmq.nodes.run.config import build

    model = options.large_bytes // 4 * 4
    config = build(
        {
            "run": {"id": RUN, "versions": 1, "evaluate_every": 0},
            "problem": {"name": "rounds:Vector", "dim": model // 4, "clients": 2},
            "algorithm": {"name": "rounds:Echo"},
            "schedule": {"name": "rounds", "fraction": 1.0},
            "worker": {"count": 2, "device": "cpu"},
        }
    ).to_toml()
    until = time.monotonic() + WAIT_S + model / 5e6
    with ProcessGroup() as group:
        relay = group.start(broker, str(group.folder / "ledger"))
        endpoint, _ = relay.receive()
        idle = relay.memory("VmRSS")
        began = time.monotonic()
        source = group.start(aggregator_program, endpoint, config)
        workers = [group.start(worker_program, endpoint, client) for client in range(2)]
        # A process that takes too much memory must not make the whole machine swap.
        while not source.has_message(0.05) and time.monotonic() < until:
            if psutil.virtual_memory().available < SPARE_BYTES:
                sizes = [each.memory("VmRSS") / model for each in (source, *workers)]
                held = ", ".join(f"{each:.2f}" for each in sizes)
                raise SystemExit(f"3gb: out of memory; the nodes hold {held} model sizes")
        peaks = [float(each.receive(10.0)) / model for each in (source, *workers)]
        seconds = time.monotonic() - began
        peak = relay.memory("VmHWM") - idle
    limit = LARGE_NODE_MODELS
    report.add("3gb.aggregator_peak_rss", peaks[0], "models", at_most=limit)
    report.add("3gb.worker_peak_rss", max(peaks[1:]), "models", at_most=limit)
    report.add("3gb.broker_peak_rss", peak / MB, "MB", at_most=LARGE_BROKER_MB)
    report.add("3gb.time", seconds, "s")


def main() -> int:
    """Print the table; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=f"cases from {','.join(CASES)} (default: all but 3gb)")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=32, help="number of workers in fanout")
    parser.add_argument("--large", action="store_true", help="run 3gb, too; needs 16 GB of memory")
    parser.add_argument("--large-bytes", type=int, default=3_000 * MB, help="model size of 3gb")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else CASES[:-1]
    if unknown := set(chosen) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    if options.large and "3gb" not in chosen:
        chosen = (*chosen, "3gb")
    others = {
        "fanout": fanout,
        "latency": latency,
        "recording": recording,
        "power": power,
        "curve": curve,
        "3gb": large,
    }
    report = Report()
    try:
        for case in chosen:
            if case in STREAMS:
                streams(report, case, options)
            else:
                others[case](report, options)
    finally:  # a case that fails must not lose the figures of the others
        Console(width=max(100, Console().width)).print(report.table)
        if options.json:
            options.json.write_text(json.dumps(report.figures, indent=2) + "\n")
    return int(report.missed)


if __name__ == "__main__":
    sys.exit(main())
