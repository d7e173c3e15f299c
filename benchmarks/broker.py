"""What the broker carries, how fast, and in how much memory, beside bare ZeroMQ.

Real processes on loopback, ledger on disk. The references give none of the guarantees: no
ledger, no receipts, no sessions, no digests. They are ZeroMQ's own proxy in C, a relay in
Python that copies, and two TCP connections with a relay between.

    python benchmarks/broker.py [--json FILE] [--only small,1mb,7mb,100mb,fanout,latency,recording]
                                [--large]

small, 1mb, 7mb, 100mb: a stream from one node to another; each large message is new bytes.
fanout: one model for many workers, one of which is stopped half-way: the relay's memory over
    idle, the time until all others have it, and how often it left the aggregator.
latency: round trips of small messages while a stream of large ones crosses the same broker.
recording: streams of payloads that never repeat, and that do, beside a broker without a record.
3gb: a model of 3 GB through the programs of aggregator and workers, with --large only: the
    peak memory of each in models, of the broker over idle, and the time with start-up.
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

import psutil
from rich.console import Console

from fedmq.broker.ledger.entries import Ended
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.wire.addresses import AGGREGATOR

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out; rounds:Echo is there, too

import relays
import unrecorded
from harness import WAIT_S, Crew, Report, is_small
from parties import (
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
STREAMS = {"small": (100, 0.05), "1mb": (MB, 0.7), "7mb": (7 * MB, 0.7), "100mb": (100 * MB, 1.0)}
"""By case: bytes of a message, and the least share of the proxy's rate."""
MODEL_BYTES = 100 * MB
FANOUT_PEAK_MB = 150.0
FANOUT_CROSSINGS = 1.05
LATENCY_P99_MS = 20.0
REPEATED = 4
"""Different payloads, where they repeat."""
RECORDING = {
    "fresh_1mb": (MB, False, 0.70),
    "fresh_7mb": (7 * MB, False, 0.70),
    "repeated_7mb": (7 * MB, True, 0.95),
}
"""By case: bytes of a message, whether payloads repeat, and the least share of the rate."""
LARGE_NODE_MODELS = 2.2
LARGE_BROKER_MB = 200.0
SPARE_BYTES = 1_500 * MB
CASES = (*STREAMS, "fanout", "latency", "recording", "3gb")
Program = Callable[..., None]


def stream(kind: str, size: int, seconds: float, few: int | None = None) -> float:
    """Return the messages a second of one stream through a broker, the proxy or TCP."""
    with Crew() as crew:
        patience = WAIT_S + 2 * seconds
        if kind in ("fedmq", "recorded", "unrecorded"):
            server = unrecorded.broker if kind == "unrecorded" else broker
            # What is not recorded cannot be read from files: its counterpart sends all, too.
            apart = (False,) if kind == "recorded" else ()
            place, _ = crew.start(server, str(crew.folder / "ledger"), *apart).hear()
            crew.start(send_fedmq, place, ["client/0", AGGREGATOR], size, few)
            receiver = crew.start(receive_fedmq, place, "client/0", AGGREGATOR, size, seconds)
        elif kind == "proxy":
            front, back = crew.start(relays.proxy).hear()
            crew.start(relays.send_zmq, front, [], size)
            receiver = crew.start(relays.receive_zmq, back, size, seconds)
        else:
            port, _ = crew.start(relays.tcp_relay).hear()
            crew.start(relays.send_tcp, port, size)
            receiver = crew.start(relays.receive_tcp, port, size, seconds)
        receiver.hear(patience)  # warm
        return float(receiver.hear(patience))


def streams(report: Report, case: str, options: argparse.Namespace) -> None:
    """Compare streams; repetitions alternate, so that a slow spell hits all alike."""
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
    """Compare brokers with a ledger and without; repetitions alternate, as in `streams`."""
    for name, (size, repeat, share) in RECORDING.items():
        rates: dict[str, list[float]] = {"recorded": [], "unrecorded": []}
        few = REPEATED if repeat else None
        for _ in range(options.repeats):
            for kind, found in rates.items():
                found.append(stream(kind, size, options.seconds, few))
        ours, bare = (statistics.median(found) for found in rates.values())
        report.add(f"recording.{name}", ours, "messages/s", reference=bare, ratio=share)


@dataclass
class FanOut:
    """What a fan-out took: seconds, and bytes of the relay's memory above idle."""

    seconds: float
    peak: int
    peak_anonymous: int
    received: int = 0


def fan_out(start: Program, sender: Program, worker: Program, workers: int) -> FanOut:
    """Send one model to many workers, and stop one when it has half of it."""
    with Crew() as crew:
        ledger = crew.folder / "ledger"
        relay = crew.start(start, *([str(ledger)] if start is broker else []))
        front, back = relay.hear()
        source = crew.start(sender, front, workers, MODEL_BYTES)
        members = [crew.start(worker, back, index) for index in range(workers)]
        for member in (*members, source):
            member.hear()
        time.sleep(1.0)  # what start-up has left behind is not idle memory
        idle, idle_anonymous = relay.memory("VmRSS"), relay.memory("RssAnon")
        slow = members[0]
        half = slow.memory("VmRSS") + MODEL_BYTES // 2
        peak, stopped, until = 0, False, time.monotonic() + WAIT_S
        source.tell("go")
        # What a worker has received is seen by its memory: it waits for nothing else.
        while not source.has_spoken(0.001 if not stopped else 0.02):
            peak = max(peak, relay.memory("RssAnon"))
            if not stopped and slow.memory("VmRSS") >= half:
                os.kill(slow.pid, signal.SIGSTOP)
                stopped = True
            if time.monotonic() > until:
                raise SystemExit(f"{sender.__name__}: not done after {WAIT_S:g} s")
        if not stopped:
            raise SystemExit("the worker to be stopped was done too soon")
        found = FanOut(source.hear(), relay.memory("VmHWM") - idle, max(0, peak - idle_anonymous))
        if start is broker:
            source.tell("end")
            source.hear()
            ended = [entry for entry in read_entries(ledger) if isinstance(entry, Ended)]
            found.received = ended[-1].nodes[AGGREGATOR]["received_bytes"]
        return found


def fanout(report: Report, options: argparse.Namespace) -> None:
    """Compare what one model for many workers takes."""
    workers = options.workers
    ours = fan_out(broker, fan_out_fedmq, collect_fedmq, workers)
    bare = fan_out(relays.proxy, relays.fan_out_zmq, relays.collect_zmq, workers)
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
    """Return round trips in ms of small messages while large ones stream past them."""
    with Crew() as crew:
        if kind == "fedmq":
            place, _ = crew.start(broker, str(crew.folder / "ledger")).hear()
            crew.start(echo_fedmq, place)
            pinger = crew.start(ping_fedmq, place, seconds)
            crew.start(send_fedmq, place, ["client/2", "client/1"], MODEL_BYTES)
            load = crew.start(receive_fedmq, place, "client/2", "client/1", MODEL_BYTES, 1e9)
        else:
            place, _ = crew.start(relays.copying_relay).hear()
            crew.start(relays.echo_zmq, place)
            pinger = crew.start(relays.ping_zmq, place, seconds)
            crew.start(relays.send_zmq, place, ["receiver"], MODEL_BYTES)
            load = crew.start(relays.receive_zmq, place, MODEL_BYTES, 1e9)
        pinger.hear()
        load.hear()
        pinger.tell("go")
        return [float(each) for each in pinger.hear(WAIT_S + 2 * seconds)]


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

    Without an evaluator, which would hold one more model.
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
    with Crew() as crew:
        relay = crew.start(broker, str(crew.folder / "ledger"))
        place, _ = relay.hear()
        idle = relay.memory("VmRSS")
        began = time.monotonic()
        source = crew.start(aggregator_program, place, config)
        workers = [crew.start(worker_program, place, client) for client in range(2)]
        # Whatever takes too much must not take the whole machine with it.
        while not source.has_spoken(0.05) and time.monotonic() < until:
            if psutil.virtual_memory().available < SPARE_BYTES:
                sizes = [each.memory("VmRSS") / model for each in (source, *workers)]
                taken = ", ".join(f"{each:.2f}" for each in sizes)
                raise SystemExit(f"3gb: out of memory with {taken} models at the nodes")
        peaks = [float(each.hear(10.0)) / model for each in (source, *workers)]
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
    parser.add_argument("--only", help=f"cases, of {','.join(CASES)}; all but 3gb by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=32, help="of fanout")
    parser.add_argument("--large", action="store_true", help="3gb as well; needs 16 GB of memory")
    parser.add_argument("--large-bytes", type=int, default=3_000 * MB, help="size of its model")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else CASES[:-1]
    if unknown := set(chosen) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}")
    if options.large and "3gb" not in chosen:
        chosen = (*chosen, "3gb")
    others = {"fanout": fanout, "latency": latency, "recording": recording, "3gb": large}
    report = Report()
    try:
        for case in chosen:
            if case in STREAMS:
                streams(report, case, options)
            else:
                others[case](report, options)
    finally:  # a case that fails does not take the figures of the others with it
        Console(width=max(100, Console().width)).print(report.table)
        if options.json:
            options.json.write_text(json.dumps(report.figures, indent=2) + "\n")
    return int(report.missed)


if __name__ == "__main__":
    sys.exit(main())
