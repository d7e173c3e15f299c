"""Record the golden traces of a release: ``python -m tests.golden.make_traces RELEASE``.

Runs in virtual time, over a network that loses and repeats frames, with nodes that crash
and come back. Once a release is out, its traces never change.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.network import Faults
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.run.config import build
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from tests.own_code import OWN_CODE

TRACES = Path(__file__).parent / "traces"
EXPECTED = TRACES / "expected.json"
RUNS = {
    "fedavg-rounds": ({"name": "fedavg"}, {"name": "rounds", "fraction": 0.5}, "raw"),
    "fedavg-buffered": (
        {"name": "fedavg", "server_lr": 0.7},
        {"name": "buffered", "size": 3, "concurrency": 5, "max_staleness": 1},
        "cast(float16)",
    ),
    "fedprox-stream": (
        {"name": "fedprox"},
        {"name": "stream", "concurrency": 4, "staleness": "hinge(1.0, 1.0)"},
        "raw",
    ),
    "fedsgd-late": (
        {"name": "fedsgd", "lr": 0.5},
        {"name": "rounds", "fraction": 1.0, "deadline_s": 1.0, "late": "discount"},
        "raw",
    ),
    "fedavg-quantized": (
        {"name": "fedavg", "server_lr": 0.7},
        {"name": "buffered", "size": 3, "concurrency": 5},
        "limit(0) | hadamard(8) | quantize(4)",
    ),
}
CHANCES = Chances(
    faults=Faults(loss=0.02, duplicate=0.05, reorder=0.05, reorder_s=0.2, delay_s=0.01),
    crash=0.08,
    doom=0.05,
    cut=0.05,
    partition=0.02,
    train_s=1.0,
)


def record(folder, name, seed):
    """Record a run with the first seed from this one on that makes one worth keeping."""
    for each in range(seed, 20 * len(RUNS), len(RUNS)):
        crashed = attempt(folder, name, each)
        if crashed and holds_what_tests_need(folder, name):
            return crashed
        shutil.rmtree(folder)
    raise SystemExit(f"{name}: no seed makes a run that ends and holds what the tests need")


def holds_what_tests_need(folder, name):
    """Tell whether late results were used, and one refused where the schedule refuses them."""
    versions = [
        message.body
        for entry in Trace(folder).entries()
        if isinstance(entry, Accepted)
        for message in [entry.read()]
        if message.kind == "version"
    ]
    late = any(each["max_staleness"] for each in versions)
    return late and (name != "fedavg-buffered" or versions[-1]["stale"] > 0)


def attempt(folder, name, seed):
    """Record a run; return how many nodes crashed in it, 0 if it did not end."""
    algorithm, schedule, up = RUNS[name]
    config = build(
        {
            "run": {"id": name, "versions": 12, "evaluate_every": 3, "checkpoint_s": 2.0},
            "problem": {"name": "tests.golden.points:Points"},
            "algorithm": algorithm,
            "schedule": schedule,
            "codec": {"up": up},
        }
    )
    torch.set_num_threads(config.worker.threads)
    settings = BrokerSettings(lease_s=3.0, beat_s=0.5)
    simulation = Simulation(set_up(config), 2, folder / "ledger", seed, CHANCES, settings)
    ended = simulation.run(30.0, 400.0)
    simulation.close()
    (folder / "ledger" / "lock").unlink()
    return len(simulation.sessions) - 4 if ended else 0


def outcome(folder):
    """What a replay must come to."""
    trace = Trace(folder)
    replay = Replay(trace, allowed=OWN_CODE)
    for _ in replay.steps():
        pass
    return {
        "entries": sum(1 for _ in trace.entries()),
        "messages": replay.messages,
        "actions": replay.record.compared,
        "version": replay.core.version,
        "model": model_digest(replay.core.tensors()),
    }


def main(release):
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    folder = TRACES / release
    if folder.exists():
        raise SystemExit(f"{folder} is there already: golden traces never change")
    try:
        for seed, name in enumerate(RUNS):
            crashed = record(folder / name, name, seed)
            size = sum(each.stat().st_size for each in (folder / name).rglob("*.log"))
            sys.stdout.write(f"{name}: {size} bytes, {crashed} crashes\n")
            expected[f"{release}/{name}"] = outcome(folder / name)
    except BaseException:
        shutil.rmtree(folder)
        raise
    EXPECTED.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
