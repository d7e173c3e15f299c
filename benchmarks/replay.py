"""Measure how much faster than the run itself a replay is.

    python benchmarks/replay.py [--json FILE] [--repeats 3] [--set key=value]...

Runs the default cluster in its own processes, replays it with ``fedmq replay`` in another
process, and trains one worker's tasks again. The limit is for the run of ``make cluster``;
``--set`` changes that run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TIMES_FASTER = 20.0
_FOLD = """
import json, sys, time
from pathlib import Path
from fedmq.broker.inspection.trace import Trace
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.run.digests import model_digest
trace = Trace(Path(sys.argv[1]))
began = time.perf_counter()
replay = Replay(trace)
for _ in replay.steps():
    pass
seconds = time.perf_counter() - began
print(json.dumps([model_digest(replay.core.tensors()), seconds]))
"""
"""Replays a run folder; prints the model's digest and the seconds without imports."""
_FEDMQ = str(Path(sys.executable).with_name("fedmq"))
_LIMIT_S = 600.0


def run(*command: str) -> tuple[str, float]:
    """Run a command; return its output and its duration in seconds."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout, seconds


def measure(repeats: int, settings: list[str]) -> dict[str, float]:
    """Return the figures of one run and its replays."""
    with tempfile.TemporaryDirectory(prefix="fedmq-replay-") as temporary:
        folder = str(Path(temporary) / "run")
        sets = [each for setting in settings for each in ("--set", setting)]
        run(_FEDMQ, "cluster", "--run", folder, *sets)
        summary = json.loads((Path(folder) / "summary.json").read_text())
        folds, processes = [], []
        for _ in range(repeats):
            processes.append(run(_FEDMQ, "replay", folder)[1])
            digest, seconds = json.loads(run(sys.executable, "-P", "-c", _FOLD, folder)[0])
            if digest != summary["model_digest"]:
                raise SystemExit(f"expected model {summary['model_digest']}, got {digest}")
            folds.append(seconds)
        _, worker_s = run(_FEDMQ, "replay", folder, "--worker", "worker-0")
    run_s = summary["wall_s"]
    fold, process = statistics.median(folds), statistics.median(processes)
    return {
        "run_s": run_s,
        "replay_s": fold,
        "replay_times_faster": run_s / fold,
        "replay_process_s": process,
        "replay_process_times_faster": run_s / process,
        "worker_process_s": worker_s,
        "worker_tasks": float(summary["nodes"]["worker-0"]["tasks"]),
    }


def main() -> int:
    """Print the table; return 1 if the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    figures = measure(options.repeats, options.settings)
    table = Table("", "fedmq", "limit")
    for name, figure in figures.items():
        limit = f"at least {TIMES_FASTER:g}" if name == "replay_times_faster" else ""
        table.add_row(name, f"{figure:.2f}", limit)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(figures["replay_times_faster"] < TIMES_FASTER)


if __name__ == "__main__":
    sys.exit(main())
