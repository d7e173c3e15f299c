"""Measure ``fedmq simulate``: its cost beside the training, and its size without training.

*training*: clients with 100 examples each, drawn with replacement from mnist-mini; one task each
under FedBuff. The reference is a plain torch loop over the same clients, with the same batches'
sizes and steps, and nothing else: no messages, no codec, no ledger. Both count the CPU time of one
process, without the start of Python.

*study*: one million stand-in clients (``learner = "curve"``), 10,000 tasks in flight, 100,000
results, under FedBuff and under synchronous rounds: the whole command, with its start and summary.
The memory of a client is the difference between two short studies, of all clients and of 10,000.

    python benchmarks/simulate.py [--json FILE] [--only training,study] [--clients 10000]
                                  [--population 1000000] [--results 100000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.process import tune_process
from fedmq.nodes.population.population import Population
from fedmq.nodes.population.table import SimulationTable
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import Setup, set_up
from fedmq.nodes.simulation.population_run import PopulationRun
from fedmq.nodes.simulation.trainers import InlineTrainer

EXAMPLES, BATCH, LR = 100, 10, 0.05
MOST_RATIO = 1.15
MOST_WALL_S, MOST_MEMORY_MB = 300.0, 4000.0
IN_FLIGHT = 10_000
FEDBUFF: Mapping[str, Any] = {"name": "buffered", "concurrency": IN_FLIGHT, "size": 10}
ROUNDS: Mapping[str, Any] = {"name": "rounds"}


def training_setup(clients: int) -> Setup:
    """Return the run of *training*: all clients have one task before any has its second."""
    return set_up(
        build(
            {
                "run": {"id": "training", "versions": max(1, clients // 10), "evaluate_every": 0},
                "problem": {
                    "name": "mnist-mini",
                    "clients": clients,
                    "partition": f"bootstrap({EXAMPLES})",
                },
                "algorithm": {"name": "fedavg", "epochs": 1, "batch_size": BATCH, "lr": LR},
                "schedule": {"name": "buffered", "concurrency": clients, "size": 10},
                "simulation": {"compute": 1.0},
                "worker": {"device": "cpu"},
            }
        )
    )


def simulated(clients: int, folder: str) -> dict[str, float]:
    """Simulate the run in this process; return its CPU time and its number of results."""
    tune_process()  # as the command does
    setup = training_setup(clients)
    setup.problem.client(0)
    trainer = InlineTrainer(setup, "cpu")
    population = Population(SimulationTable(), clients, 0, lambda _: EXAMPLES)
    began = time.process_time()
    run = PopulationRun(setup, Path(folder) / "ledger", population, trainer)
    try:
        run.run_to_end()
        results = run.aggregator.core.state_snapshot()["counts"].used
    finally:
        run.close()
        trainer.close()
    return {"cpu_s": time.process_time() - began, "tasks": results}


def bare(clients: int, _: str) -> dict[str, float]:
    """Train every client once in a plain loop; return its CPU time."""
    problem = training_setup(clients).problem
    problem.client(0)
    model = problem.model()
    first = {name: each.clone() for name, each in model.state_dict().items()}
    shuffle = torch.Generator().manual_seed(0)
    began = time.process_time()
    for client in range(clients):
        data = problem.client(client)
        model.load_state_dict(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        order = torch.randperm(len(data), generator=shuffle)
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            problem.loss(model(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
    return {"cpu_s": time.process_time() - began, "tasks": clients}


def _child(pipe: Connection, measure: Callable[..., Any], clients: int, folder: str) -> None:
    torch.set_num_threads(1)
    pipe.send(measure(clients, folder))


def in_process(measure: Callable[..., dict[str, float]], clients: int) -> dict[str, float]:
    """Return what a function measures in a fresh process."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="fedmq-simulate-") as folder:
        process = context.Process(target=_child, args=(theirs, measure, clients, folder))
        process.start()
        theirs.close()
        try:
            found: dict[str, float] = ours.recv()
        except EOFError:
            raise SystemExit(f"{measure.__name__} ended without a figure") from None
        finally:
            process.join()
    return found


def study(schedule: Mapping[str, Any], population: int, results: int) -> dict[str, float]:
    """Run the command for a scheduling study; return its wall, CPU, memory and events."""
    in_flight = min(IN_FLIGHT, population)
    if schedule["name"] == "rounds":
        options = {"fraction": in_flight / population}
        versions = max(1, results // in_flight)
    else:
        options = {"concurrency": in_flight}
        versions = max(1, results // schedule["size"])
    given = {**schedule, **options}
    settings = [
        f"run.versions={versions}",
        "run.evaluate_every=100" if schedule["name"] != "rounds" else "run.evaluate_every=1",
        *(f"schedule.{key}={value}" for key, value in given.items()),
        "simulation.learner=curve",
        "simulation.compute=lognormal(60, 1)",
        "simulation.latency=0.05",
        "broker.retain=unfinished",
    ]
    with tempfile.TemporaryDirectory(prefix="fedmq-simulate-") as folder:
        run = Path(folder) / "run"
        command = [
            *(sys.executable, "-P", "-m", "fedmq.nodes", "simulate", "--run", str(run)),
            *("--clients", str(population), "--processes", "0"),
            *(part for each in settings for part in ("--set", each)),
        ]
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            _, errors = child.communicate()
            wall_s = time.monotonic() - began
        if child.returncode:
            raise SystemExit(f"fedmq simulate failed: {errors.decode()[-2000:]}")
        usage = json.loads((run / "summary.json").read_text())
        entries = sum(1 for _ in read_entries(run / "ledger"))
    return {
        "wall_s": wall_s,
        "results": usage["results"]["used"],
        "entries": entries,
        "virtual_s": usage["wall_s"],
    }


def measured_study(
    pipe: Connection, schedule: Mapping[str, Any], population: int, results: int
) -> None:
    """Run a study as the only child of this process, and add its memory and CPU time."""
    import resource

    found = study(schedule, population, results)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    found |= {"rss_bytes": usage.ru_maxrss * 1024, "cpu_s": usage.ru_utime + usage.ru_stime}
    pipe.send(found)


def study_in_process(schedule: Mapping[str, Any], population: int, results: int) -> dict[str, Any]:
    """Return the figures of `measured_study` in a fresh process."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measured_study, args=(theirs, schedule, population, results))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise SystemExit("the study ended without figures") from None
    finally:
        process.join()
    return found


def main() -> int:
    """Print the tables; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="training,study")
    parser.add_argument("--clients", type=int, default=10_000, help="clients of training")
    parser.add_argument("--population", type=int, default=1_000_000, help="clients of study")
    parser.add_argument("--results", type=int, default=100_000, help="results of study")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - {"training", "study"}:
        parser.error(f"--only: expected training or study, got {', '.join(sorted(unknown))}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console, figures, missed = Console(), {}, False
    if "training" in chosen:
        found, reference = (in_process(each, options.clients) for each in (simulated, bare))
        ours, plain = (each["cpu_s"] / each["tasks"] * 1000 for each in (found, reference))
        ratio = ours / plain
        missed |= ratio > MOST_RATIO
        table = Table("tasks", "fedmq ms CPU", "plain loop ms CPU", "ratio", "limit")
        table.add_row(
            f"{found['tasks']:,.0f}", f"{ours:.2f}", f"{plain:.2f}", f"{ratio:.3f}",
            f"{MOST_RATIO}",
        )  # fmt: skip
        console.print(table)
        figures |= {
            "simulate.training.tasks": found["tasks"],
            "simulate.training.fedmq_ms": ours,
            "simulate.training.plain_ms": plain,
            "simulate.training.ratio": ratio,
        }
    if "study" in chosen:
        table = Table("study", "wall s", "CPU s", "results", "events/s", "MB", "bytes/client")
        for schedule in (FEDBUFF, ROUNDS):
            name = "FedBuff" if schedule is FEDBUFF else "rounds"
            whole = study_in_process(schedule, options.population, options.results)
            few = min(IN_FLIGHT, options.population)
            short = max(1, options.results // 100)
            many, small = (
                study_in_process(schedule, each, short)["rss_bytes"]
                for each in (options.population, few)
            )
            per_client = (many - small) / max(1, options.population - few)
            rate, megabytes = whole["entries"] / whole["wall_s"], whole["rss_bytes"] / 1e6
            missed |= whole["wall_s"] > MOST_WALL_S or megabytes > MOST_MEMORY_MB
            table.add_row(
                name, f"{whole['wall_s']:.0f}", f"{whole['cpu_s']:.0f}",
                f"{whole['results']:,.0f}", f"{rate:,.0f}", f"{megabytes:.0f}",
                f"{per_client:.0f}",
            )  # fmt: skip
            figures |= {f"simulate.study.{name}.{key}": value for key, value in whole.items()}
            figures[f"simulate.study.{name}.bytes_per_client"] = per_client
        console.print(table)
        console.print(f"limits: {MOST_WALL_S:.0f} s, {MOST_MEMORY_MB:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
