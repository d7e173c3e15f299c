"""Measure the duration of a synchronous round without training: fedmq's own cost.

Real processes on loopback: a broker with its ledger on disk, an aggregator, and four workers
with one client each that return the model they receive. Each round's model differs from the
last, so every byte moves: the model goes to the broker once and to four workers, and four
results come back. The reference is the same exchange over bare ZeroMQ through a relay, with
none of the guarantees: no ledger, acknowledgments, sessions or digests.

    python benchmarks/rounds.py [--json FILE] [--sizes 21840,1663370,25000000] [--rounds N]
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedmq.algorithms.base import Client, Payload, Task, TrainResult
from fedmq.algorithms.fedavg import Accumulator, FedAvg, ModelState
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.nodes.cluster.forking import preloading
from fedmq.nodes.cluster.supervisor import Cluster
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up

CLIENTS = 4
LIMITS_MS = {21_840: 5.0, 1_663_370: 120.0, 25_000_000: 2000.0}


@dataclass(frozen=True)
class Vector(Problem):
    """A model that is one vector, and one dummy example per client."""

    dim: int
    seed: int
    clients: int = CLIENTS

    def model(self) -> nn.Module:
        module = nn.Module()
        generator = torch.Generator().manual_seed(self.seed)
        module.vector = nn.Parameter(torch.randn(self.dim, generator=generator))
        return module

    def client(self, index: int) -> Examples:
        return Examples(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))

    def test(self) -> Examples:
        return self.client(0)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        return outputs.sum()

    def metrics(self, outputs: Tensor, y: Tensor) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class Echo(FedAvg):
    """Clients return the model that they receive; the server scales the mean a little."""

    def commit(self, state: ModelState, accumulator: Accumulator, divisor: float) -> ModelState:
        mean = accumulator.total.mul_(1.0001 / divisor)
        return ModelState(state.layout, mean, accumulator.counters)

    def train(self, task: Task, client: Client) -> TrainResult:
        return TrainResult(Payload(task.payload.weights, task.payload.exact), 1)

    def evaluate(self, task: Task, problem: Problem, device: str) -> Mapping[str, float]:
        return {"accuracy": 0.0}


def fedmq_rounds(dim: int, rounds: int, folder: Path) -> list[float]:
    """Return the duration of each round of a real run, in ms."""
    config = build(
        {
            "run": {"id": f"rounds-{dim}", "versions": rounds + 1, "evaluate_every": 0},
            "problem": {"name": "rounds:Vector", "dim": dim},
            "algorithm": {"name": "rounds:Echo"},
            "schedule": {"name": "rounds", "fraction": 1.0},
            "worker": {"count": CLIENTS, "device": "cpu"},
        }
    )
    config = set_up(config).config
    quiet = Console(file=io.StringIO())
    run = folder / f"run-{dim}"
    run.mkdir()
    code = Cluster(config, CLIENTS, run, time.time(), quiet).run()
    if code:
        raise SystemExit(f"the run failed with exit code {code}; see {run}")
    times = [
        entry.at
        for entry in read_entries(run / "ledger")
        if isinstance(entry, Accepted) and entry.read().kind == "version"
    ]
    shutil.rmtree(run)
    return [(b - a) * 1000 for a, b in itertools.pairwise(times)]


def bare_rounds(dim: int, rounds: int) -> list[float]:
    """Return the duration of each round of the same exchange over a bare relay, in ms."""
    # Only here: the nodes of `fedmq_rounds` import this module, too.
    import zmq_relays
    from harness import ProcessGroup

    clients = [f"client{index}" for index in range(CLIENTS)]
    with ProcessGroup() as group:
        endpoint, _ = group.start(zmq_relays.relay, copy=False).receive()
        for client in clients:
            group.start(zmq_relays.echo_zmq, endpoint, client, copy=False)
        with zmq_relays.dealer(endpoint, "aggregator") as socket:
            for client in clients:
                zmq_relays.wait_for_echo(socket, client)
            model = torch.randn(dim)
            durations = []
            for _ in range(rounds):
                began = time.perf_counter()
                data = model.numpy().data
                for client in clients:
                    socket.send_multipart([client.encode(), data], copy=False)
                total = torch.zeros(dim)
                for _ in clients:
                    _, frame = socket.recv_multipart(copy=False)
                    received = torch.frombuffer(bytearray(frame.buffer), dtype=torch.float32)
                    total.add_(received, alpha=1.0)
                model = total.mul_(1.0001 / CLIENTS)
                durations.append((time.perf_counter() - began) * 1000)
    return durations


def main() -> int:
    """Print the table; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", default=",".join(map(str, LIMITS_MS)))
    parser.add_argument("--rounds", type=int, help="rounds per size (default: a few seconds)")
    options = parser.parse_args()
    here = str(Path(__file__).parent)
    sys.path.append(here)  # this process and the workers import rounds:Echo from here
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    with preloading():
        pass

    table = Table("parameters", "rounds", "fedmq ms", "p90", "bare relay ms", "ratio", "limit ms")
    figures: dict[str, float] = {}
    missed = False
    folder = Path(tempfile.mkdtemp(prefix="fedmq-rounds-"))
    try:
        for dim in map(int, options.sizes.split(",")):
            rounds = options.rounds or max(8, min(200, 100_000_000 // dim))
            ours = fedmq_rounds(dim, rounds, folder)
            bare = bare_rounds(dim, rounds)
            median, reference = statistics.median(ours), statistics.median(bare)
            p90 = statistics.quantiles(ours, n=10)[-1]
            limit = LIMITS_MS.get(dim)
            missed |= limit is not None and median > limit
            table.add_row(
                f"{dim:,}",
                str(rounds),
                f"{median:.2f}",
                f"{p90:.2f}",
                f"{reference:.2f}",
                f"{median / reference:.2f}",
                f"{limit or '-'}",
            )
            figures |= {
                f"rounds.{dim}.fedmq_ms": median,
                f"rounds.{dim}.fedmq_p90_ms": p90,
                f"rounds.{dim}.bare_ms": reference,
                f"rounds.{dim}.ratio": median / reference,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
