"""How much faster than it ran a run is replayed.

    python benchmarks/replay.py [--json FILE] [--repeats 3] [--set key=value]...

Runs the default cluster in processes of its own, replays it with ``fedmq replay`` in a
process of its own, and trains one worker's tasks again. Without ``--set`` the limits hold
for what ``make cluster`` runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TIMES_FASTER = 20.0
_FEDMQ = Path(sys.executable).with_name("fedmq")
_LIMIT_S = 600.0


def fedmq(*arguments: str) -> tuple[str, float]:
    """Run a command; return its output, and how long it took in seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [str(_FEDMQ), *arguments], capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    took = time.monotonic() - began
    if done.returncode:
        raise SystemExit(f"fedmq {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout, took


def measure(repeats: int, settings: list[str]) -> dict[str, float]:
    """Return the figures of one run and its replays."""
    with tempfile.TemporaryDirectory(prefix="fedmq-replay-") as temporary:
        folder = str(Path(temporary) / "run")
        sets = [each for setting in settings for each in ("--set", setting)]
        fedmq("cluster", "--run", folder, *sets)
        summary = json.loads((Path(folder) / "summary.json").read_text())
        folds, processes = [], []
        for _ in range(repeats):
            said, took = fedmq("replay", folder)
            if summary["model_digest"] not in said:
                raise SystemExit(f"another model than {summary['model_digest']}:\n{said}")
            match = re.search(r"s of the run in ([\d.]+) s", said)
            folds.append(float(match[1]) if match else took)
            processes.append(took)
        said, took = fedmq("replay", folder, "--worker", "worker-0")
    ran = summary["wall_s"]
    fold, process = statistics.median(folds), statistics.median(processes)
    return {
        "run_s": ran,
        "replay_s": fold,
        "replay_times_faster": ran / fold,
        "replay_process_s": process,
        "replay_process_times_faster": ran / process,
        "worker_process_s": took,
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
