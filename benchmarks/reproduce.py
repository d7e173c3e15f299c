"""The papers' figures beside ours, on all of MNIST.

    python benchmarks/reproduce.py [--only NAME,...] [--all] [--hours] [--seed N]
                                   [--json FILE] [--set key=value]...

Each line is one cell of a paper's tables: a configuration that `fedmq cluster` runs in
processes of its own. MNIST is looked for under FEDMQ_DATA. ``--set`` goes over every
configuration, to try a cell out: ``--set run.versions=3``. By default the cells of FedAvg and
of Caldas run, in about half an hour; ``--all`` adds those of the other papers, about an hour.

Exits with 0 if every bar of the cells that ran is met, with 1 if one is missed or a run
failed, and with 2 if there was nothing to run.
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

FIRST: Sequence[Cell] = (*fedavg.CELLS, *caldas.CELLS)
CELLS: Sequence[Cell] = (
    *FIRST,
    *caldas.MORE,
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
    """Run the cells that are asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cells to run, by name, with commas between")
    parser.add_argument("--all", action="store_true", help="the cells of every paper")
    parser.add_argument("--hours", action="store_true", help="all, and those that need hours")
    parser.add_argument("--seed", type=int, default=0, help="of every run (0)")
    parser.add_argument("--json", type=Path, help="write all figures as one flat map")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--list", action="store_true", help="name the cells and run none")
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
    torch.set_num_threads(1)  # of the cell that runs here: two on a busy machine are far slower
    # A run that is told to stop ends its cluster first.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    return reproduce(cells, Runs(options.seed, options.overrides), options.json)


def choose(only: str, *, every: bool, hours: bool) -> list[Cell]:
    """Return the cells that are asked for, in their order; naming one is asking for it.

    Raises:
        ValueError: there is no such cell.
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
    """Read the data once, so that a missing file ends in one sentence and not in a run's log.

    Raises:
        AlgorithmError, CodecError, ConfigError: it says what is missing, and where it is
            looked for; or what is wrong with the overrides.
    """
    keys = [f"problem.{key}={each}" for key, each in fedavg.CNN_IID.problem.items()]
    config = load(None, [*keys, *overrides])
    load_problem(config.problem, config.run.seed).test()


def reproduce(cells: Sequence[Cell], runs: Runs, file: Path | None) -> int:
    """Measure cells and print a line as soon as each is done; return the exit code."""
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
    barred = sum(f"{cell.name}.met" in figures for cell in cells)
    print(f"{barred - missed} of {barred} bars met, {_clock(time.monotonic() - began)}")
    return int(missed > 0)


def show(cell: Cell, outcome: Outcome, seed: int, took: float) -> None:
    """Print a cell's line, and what is below it."""
    word = {None: "", True: "met: ", False: "MISSED: "}[outcome.met]
    row = _ROW.format(
        cell.name, cell.paper, outcome.ours, seed, _clock(took), f"{word}{cell.bar}"
    ).rstrip()
    print(row, flush=True)
    if outcome.lines:
        print(textwrap.indent("\n".join(outcome.lines), "    "), flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
