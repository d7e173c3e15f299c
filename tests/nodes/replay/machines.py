"""Runs that are recorded under one of torch's CPU capabilities, and replayed under others.

Torch reads ``ATEN_CPU_CAPABILITY`` once, so each capability has processes of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from torch import nn

from fedmq.broker.settings import BrokerSettings
from fedmq.nodes.cli.main import main
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.virtual_run import Simulation
from tests.algorithms.hyper import Local
from tests.golden.make_traces import CHANCES
from tests.nodes.replay.material import messages
from tests.own_code import ALLOW

ROOT = Path(__file__).parents[3]
UP = "hadamard | quantize(4)"


class Small(Local):
    """A matrix of 1,600 values, which the codec takes, and a BatchNorm."""

    def module(self):
        return nn.Sequential(
            nn.Linear(2, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 40), nn.Linear(40, 2)
        )


class Plain(Local):
    """Without a BatchNorm; layers of which Federated Dropout can leave units out."""

    def module(self):
        return nn.Sequential(
            nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2)
        )


class Wide(Local):
    """More than 70,000 parameters: they are added up by the compiled kernel."""

    def module(self):
        return nn.Sequential(
            nn.Linear(2, 290),
            nn.BatchNorm1d(290),
            nn.ReLU(),
            nn.Linear(290, 250),
            nn.Linear(250, 2),
        )


ROUNDS = {"name": "rounds", "fraction": 0.5}
ALL = {"name": "rounds", "fraction": 1.0}
BUFFERED = {"name": "buffered", "size": 2, "concurrency": 3}
STREAM = {"name": "stream", "concurrency": 3, "staleness": "polynomial(0.7)"}
OUTPUTS = {"logits": "logits(float16)", "features": "features(int8)"}
GAN = {"gan_steps": 2, "gan_batch": 4, "gan_widths": [4, 4, 4]}
GKT = {"edge": "tiny", "server": "tiny", "batch_size": 4, "max_samples": 50, "memory_mb": 0}
HYPER = {"hidden": 8, "layers": 1, "batches": 3, "batch_size": 4}
HERE = f"{__name__}:"
THERE = "tests.algorithms."
RUNS = {
    "rounds": (HERE + "Wide", {"name": "fedavg"}, ROUNDS, {"up": UP}),
    "buffered": (HERE + "Small", {"name": "fedavg", "server_lr": 0.7}, BUFFERED, {"up": UP}),
    "stream": (HERE + "Small", {"name": "fedavg"}, STREAM, {"up": UP}),
    # The others, each once.
    "fedsgd": (HERE + "Small", {"name": "fedsgd"}, BUFFERED, {}),
    "fedprox": (HERE + "Small", {"name": "fedprox"}, STREAM, {"up": UP}),
    "fedrep": (HERE + "Small", {"name": "fedrep"}, ROUNDS, {}),
    "fedper": (HERE + "Small", {"name": "fedper"}, BUFFERED, {}),
    "fedavg-ft": (HERE + "Small", {"name": "fedavg-ft"}, STREAM, {}),
    "local": (HERE + "Small", {"name": "local"}, ROUNDS, {}),
    "perfedavg": (HERE + "Plain", {"name": "perfedavg", "batch_size": 2}, ROUNDS, {}),
    "personalised-fedavg": (
        HERE + "Small",
        {"name": "personalised-fedavg", "switch": 2},
        ROUNDS,
        {},
    ),
    "feddropout": (HERE + "Plain", {"name": "feddropout"}, ROUNDS, {}),
    "fd": (THERE + "augmenting:Skewed", {"name": "fd", "models": ["mlp", "fd-cnn"]}, ALL, OUTPUTS),
    "codistillation": (
        THERE + "distillation.test_codistillation:Shared",
        {"name": "codistillation"},
        BUFFERED,
        OUTPUTS,
    ),
    "faug": (THERE + "augmenting:Skewed", {"name": "faug", **GAN}, ALL, OUTPUTS),
    "mocha": (THERE + "multitask:Points", {"name": "mocha"}, ROUNDS, {}),
    "fedgkt": (THERE + "bars:Bars", {"name": "fedgkt", **GKT}, ALL, OUTPUTS),
    "pfedhn": (THERE + "hyper:Tracked", {"name": "pfedhn", **HYPER}, ROUNDS, {}),
}
MAIN = ("rounds", "buffered", "stream")


BEYOND = {("fedgkt", seed) for seed in (0, 1, 2, 3)}
"""Runs for which the guarantee does not hold (docs/guarantees.md, "What is not guaranteed"): the
moments of the server's optimizer differ by up to 0.007 of their size on another kind of CPU."""


def record(folder, name):
    """Record a run in virtual time, in which a worker crashes."""
    problem, algorithm, schedule, codec = RUNS[name]
    config = build(
        {
            "run": {"versions": 6, "evaluate_every": 6, "checkpoint_s": 2.0},
            "problem": {"name": problem, "clients": 6 if problem.startswith(HERE) else 4},
            "algorithm": algorithm,
            "schedule": schedule,
            "codec": codec,
        }
    )
    torch.set_num_threads(config.worker.threads)
    setup = set_up(config)
    for seed in range(20):
        if (name, seed) in BEYOND:
            continue
        place = folder / f"seed-{seed}"
        simulation = Simulation(setup, 2, place, seed, CHANCES, BrokerSettings(3.0, 0.5))
        ended = simulation.run(30.0, 400.0)
        simulation.close()
        joined = [each.body["node"] for _, each in messages(place, kind="joined")]
        if ended and any(joined.count(f"worker-{index}") > 1 for index in (0, 1)):
            place.rename(folder / "ledger")
            return
    raise AssertionError(f"{name}: no run of 20 ends, with a worker that crashed")


def record_all(folder, names):
    """Record runs."""
    for name in names:
        record(Path(folder) / name, name)


def replay_all(folders):
    """Return exit code and output of ``fedmq replay``, by folder."""
    found = {}
    for folder in folders:
        result = CliRunner().invoke(main, ["replay", *ALLOW, folder])
        found[folder] = result.exit_code, result.output
    return found


def elsewhere(wanted, call):
    """Call a function of this file, given as text, under a capability; return what it returns."""
    code = f"import json; from {__name__} import *; print('\\n' + json.dumps({call}))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": wanted, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    return json.loads(done.stdout.strip().rpartition("\n")[2])
