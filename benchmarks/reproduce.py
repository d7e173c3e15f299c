"""Reproduce the papers' results on all of MNIST.

    python benchmarks/reproduce.py [--only NAME,...] [--all] [--hours] [--seed N]
                                   [--json FILE] [--set key=value]...

Each line is one cell of a paper's tables: a configuration that `fedmq cluster` or `fedmq simulate`
runs in its own processes. MNIST is looked up under FEDMQ_DATA. ``--set`` overrides a key of every
configuration, to try a cell out: ``--set run.versions=3``. By default the cells of FedAvg and
Caldas, and FedBuff beside other schedules, run in about 40 minutes; ``--all`` adds the other
papers, about an hour.

Exit codes: 0 every cell that ran meets its bar, 1 a bar is missed or a run failed, 2 an
argument is wrong or the data are missing.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # python -P leaves it out

from reproduction import (
    caldas,
    distillation,
    fedavg,
    fedbuff,
    fedgkt,
    fedrep,
    mocha,
    perfedavg,
    pfedhn,
)
from reproduction.runs import Cell, Outcome, RunError, Runs

from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.problems import load_problem
from fedmq.codecs.errors import CodecError
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import load

FIRST: Sequence[Cell] = (*fedavg.CELLS, *caldas.CELLS, fedbuff.IID)
CELLS: Sequence[Cell] = (
    *FIRST,
    *caldas.MORE,
    fedbuff.SHARDS,
    *fedgkt.CELLS,
    *distillation.CELLS,
    *fedrep.CELLS,
    *perfedavg.CELLS,
    *pfedhn.CELLS,
    *mocha.CELLS,
    *fedavg.HOURS,
)
_ROW = "{:<23} {:<41} {:<46} {:>4} {:>8}  {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cells; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run these cells: names with commas between")
    parser.add_argument("--all", action="store_true", help="run the cells of every paper")
    parser.add_argument("--hours", action="store_true", help="run also the cells that need hours")
    parser.add_argument("--seed", type=int, default=0, help="seed of every run (0)")
    parser.add_argument("--json", type=Path, help="write all figures to this file as one flat map")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a key of every configuration, repeatable",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the cells without running them")
    options = parser.parse_args(arguments)
    try:
        cells = choose(options.only, every=options.all or options.hours, hours=options.hours)
        if options.list:
            for cell in cells:
                print(f"{cell.name:<23} {cell.paper}")
            return 0
        check_data(options.overrides)
    except (ValueError, AlgorithmError, CodecError, ConfigError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # for cells in this process: two on a busy machine are far slower
    # On SIGTERM, too, the running cluster stops before this process exits.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    return reproduce(cells, Runs(options.seed, options.overrides), options.json)


def choose(only: str, *, every: bool, hours: bool) -> list[Cell]:
    """Return the chosen cells, in the order of `CELLS`.

    Args:
        only: names with commas between; if empty, `FIRST` or all cells.
        every: include the cells of all papers.
        hours: include the cells that need hours; those named in ``only`` always run.

    Raises:
        ValueError: ``only`` names an unknown cell.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in {cell.name for cell in CELLS}]
    if unknown:
        choices = ", ".join(cell.name for cell in CELLS)
        raise ValueError(f"unknown cell {unknown[0]!r}; choose from {choices}")
    if names:
        return [cell for cell in CELLS if cell.name in names]
    return [cell for cell in (CELLS if every else FIRST) if hours or not cell.hours]


def check_data(overrides: Sequence[str]) -> None:
    """Read the data once, so that a missing file is reported before the first run.

    Raises:
        AlgorithmError, CodecError, ConfigError: the data are missing, or an override is wrong.
    """
    keys = [f"problem.{key}={each}" for key, each in fedavg.CNN_IID.problem.items()]
    config = load(None, [*keys, *overrides])
    load_problem(config.problem, config.run.seed).test()


def reproduce(cells: Sequence[Cell], runs: Runs, file: Path | None) -> int:
    """Measure cells; print each one's line as soon as it is done; return the exit code."""
    print(_ROW.format("cell", "paper", "ours", "seed", "time", "bar"))
    figures: dict[str, float] = {}
    missed = 0
    began = time.monotonic()
    for cell in cells:
        started = time.monotonic()
        try:
            outcome = cell.measure(runs)
        except RunError as error:
            print(f"reproduce: {cell.name}: {error}", file=sys.stderr)
            outcome = Outcome("failed", met=False, figures={})
        took = time.monotonic() - started
        show(cell, outcome, runs.seed, took)
        missed += outcome.met is False
        figures |= {f"{cell.name}.{name}": each for name, each in outcome.figures.items()}
        figures[f"{cell.name}.time_s"] = took
        if outcome.met is not None:
            figures[f"{cell.name}.met"] = float(outcome.met)
        if file is not None:
            file.write_text(json.dumps(figures, indent=2) + "\n")
    bars = sum(f"{cell.name}.met" in figures for cell in cells)
    print(f"{bars - missed} of {bars} bars met, {_clock(time.monotonic() - began)}")
    return int(missed > 0)


def show(cell: Cell, outcome: Outcome, seed: int, took: float) -> None:
    """Print a cell's line and its details below."""
    verdict = {None: "", True: "met: ", False: "MISSED: "}[outcome.met]
    row = _ROW.format(
        cell.name, cell.paper, outcome.ours, seed, _clock(took), f"{verdict}{cell.bar}"
    ).rstrip()
    print(row, flush=True)
    if outcome.lines:
        print(textwrap.indent("\n".join(outcome.lines), "    "), flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
