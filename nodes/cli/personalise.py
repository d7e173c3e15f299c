"""``fedmq personalise``: adapt a finished run to clients that never took part."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmq.broker.errors import LedgerError
from fedmq.broker.file_modes import write_private
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.wire.addresses import CHECKPOINT
from fedmq.nodes.cli.options import (
    allow_option,
    exit_2_on_error,
    folder_argument,
    parse_ranges,
    run_id_option,
)
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.keys.trust import allowed_here, find_own_code
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.process.terminal import plain, table
from fedmq.nodes.run_folder.strict_json import to_strict_json
from fedmq.nodes.run_folder.summary import spread

if TYPE_CHECKING:
    from fedmq.broker.inspection.trace import Trace
    from fedmq.nodes.run.setup import Setup

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class StartingState:
    """The state in a run's last checkpoint, its version, and whether the run has ended."""

    state: Any
    version: int
    finished: bool


@click.command()
@folder_argument
@run_id_option
@click.option("--clients", "ranges", help="Only these clients, for example 100-104; default: all.")
@click.option("--device", help="Device to train on; default: that of the run's workers.")
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the table to this file, as JSON.",
)
@allow_option
def personalise(
    folder: Path,
    run_id: str,
    ranges: str | None,
    device: str | None,
    file: Path | None,
    allow: tuple[str, ...],
) -> None:
    """Adapt a finished run to each client that never took part, and evaluate it there.

    DIR is the folder of the run. A run has such clients if it was started with
    problem.held_out=N; their numbers follow those of the other clients.
    """
    with exit_2_on_error():
        from fedmq.broker.inspection.trace import Trace
        from fedmq.nodes.replay.fold import recorded_setup

        chosen = parse_ranges(ranges) if ranges is not None else None
        trace = Trace(folder, run_id)
        allowed = allowed_here(allow)
        find_own_code(allowed)
        setup = recorded_setup(trace, allowed=allowed)
        numbers = new_clients(setup, chosen)
        start = last_state(trace, setup)
        if not start.finished:
            click.echo(
                f"the run has not ended: using its newest checkpoint, version {start.version}",
                err=True,
            )
        found = dict(measure(setup, start, numbers, device))
        click.echo("\n".join(lines(found)))
        if file is not None:
            about = {"run": trace.run, "version": start.version, "finished": start.finished}
            _write(file, {**about, "spread": spread(_column(found, "accuracy")), "clients": found})


def new_clients(setup: Setup, ranges: Sequence[tuple[int, int]] | None = None) -> list[int]:
    """Return the numbers of clients that never train: those in ``ranges``, or all.

    Raises:
        ConfigError: there are none; a range contains others; or the algorithm does not
            personalise.
    """
    from fedmq.algorithms.base import Algorithm

    kind, problem = type(setup.algorithm), setup.problem
    if (
        kind.personalise is Algorithm.personalise
        and kind.evaluate_client is Algorithm.evaluate_client
    ):
        raise ConfigError(
            f"algorithm.name: expected an algorithm with a model for each client, "
            f"got {setup.algorithm.name}, which has one model for all of them"
        )
    first, end = problem.clients, problem.clients + problem.held_out
    if first == end:
        raise ConfigError(
            "expected clients that never took part, this run has none: start one with "
            "problem.held_out=N"
        )
    if ranges is None:
        return list(range(first, end))
    for low, high in ranges:
        if not first <= low <= high < end:
            raise ConfigError(
                f"--clients: expected clients that never took part, {first} to {end - 1}, "
                f"got {low if low == high else f'{low}-{high}'}"
            )
    return sorted({each for low, high in ranges for each in range(low, high + 1)})


def last_state(trace: Trace, setup: Setup) -> StartingState:
    """Return the state in a run's last checkpoint.

    Raises:
        LedgerError: there is no checkpoint, or the ledger is damaged.
        NodeError: the checkpoint does not match the run's configuration.
    """
    from fedmq.nodes.aggregator.checkpoint import unpack_checkpoint
    from fedmq.nodes.replay.fold import recorded_delivery

    last: Accepted | None = None
    for entry in trace.entries():
        if isinstance(entry, Accepted) and entry.read().to == CHECKPOINT:
            last = entry
    if last is None:
        raise LedgerError("expected a checkpoint, the run has none yet: wait for the first one")
    state, fold = unpack_checkpoint(setup.algorithm, setup.problem, recorded_delivery(trace, last))
    return StartingState(state, fold.version, fold.ended)


def measure(
    setup: Setup, start: StartingState, clients: Sequence[int], device: str | None = None
) -> Iterator[tuple[int, Metrics]]:
    """Yield each client and its metrics; equal for the same run and device.

    Raises:
        AlgorithmError: a client's data are missing.
        ConfigError: there is no such device.
        NodeError: the algorithm returned invalid metrics.
    """
    from fedmq.algorithms.base import Client
    from fedmq.algorithms.rng import derive_seed, seeded
    from fedmq.algorithms.values import metrics_of
    from fedmq.nodes.run.devices import choose_device

    place = (
        choose_device(setup.config.worker.device)
        if device is None
        else choose_device(device, "--device")
    )
    for index in clients:
        seed = derive_seed(setup.config.run.seed, "personalise", start.version, index)
        with seeded(seed, place):
            data = setup.problem.client(index)
            client = Client(index, setup.problem, data, None, seed, place)
            found = setup.algorithm.personalise(start.state, start.version, client)
            metrics = metrics_of(found, f"{type(setup.algorithm).__name__}.personalise")
        if "accuracy" not in metrics:
            raise NodeError(f"client {index}: expected accuracy among the metrics, it is missing")
        yield index, {"examples": len(data), **metrics}


def lines(found: Mapping[int, Metrics]) -> list[str]:
    """Return the lines of the table: each client, then mean, worst tenth and spread."""
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    rows = [
        [str(index), *(_text(name, each.get(name)) for name in names)]
        for index, each in found.items()
    ]
    columns = [_column(found, name) for name in names]
    rows.append(["mean", *(_text("", _mean(each)) for each in columns)])
    worst = spread(_column(found, "accuracy"))["worst_decile"]
    rows.append(["worst tenth", *(_text("", worst if n == "accuracy" else None) for n in names)])
    rows.append(["spread", *(_text("", _std(each)) for each in columns)])
    return table(["client", *map(plain, names)], rows)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def _std(values: Sequence[float]) -> float:
    return statistics.pstdev(values) if all(map(math.isfinite, values)) else math.nan


def _column(found: Mapping[int, Metrics], name: str) -> list[float]:
    return [each[name] for each in found.values() if name in each]


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if name == "examples" else f"{value:.4f}"


def _write(file: Path, content: Mapping[str, Any]) -> None:
    try:
        write_private(file, to_strict_json(content).encode())
    except OSError as error:
        raise ConfigError(f"--json: cannot write {file}: {reason_of(error)}") from None
