"""``fedmq sweep``: many runs with one command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fedmq.nodes.cli.options import (
    WholeNumber,
    config_argument,
    exit_2_on_error,
    settings_option,
)
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.process import streams
from fedmq.nodes.process.signals import this_process


@click.command()
@config_argument
@settings_option
@click.option(
    "--over",
    "overs",
    metavar="KEY=A,B",
    multiple=True,
    help="Values of a key; with several --over, all combinations run.",
)
@click.option(
    "--seeds", type=WholeNumber(min=1), help="Run each combination with the seeds 0 to SEEDS-1."
)
@click.option("--simulate", "simulated", is_flag=True, help="Simulate, as fedmq simulate does.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of the sweep; runs that have finished in it are kept. Default: runs/sweep-ID.",
)
@click.option(
    "--jobs",
    type=WholeNumber(min=1),
    default=1,
    show_default=True,
    help="Number of runs at the same time.",
)
@click.option("--workers", type=WholeNumber(min=1), help="Number of worker processes of a run.")
@click.option(
    "--processes", type=WholeNumber(min=0), help="Number of processes that train a simulation."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, with a row for each run.")
def sweep(
    config: Path | None,
    settings: tuple[str, ...],
    overs: tuple[str, ...],
    seeds: int | None,
    simulated: bool,  # noqa: FBT001 - click's
    folder: Path | None,
    jobs: int,
    workers: int | None,
    processes: int | None,
    as_csv: bool,  # noqa: FBT001 - click's
) -> None:
    """Run a configuration with each combination of some values, and compare the results.

    CONFIG is a TOML file, or - for standard input; keys that it and --set leave out have their
    defaults. Each run has a folder of its own. The same command with the same --run repeats
    nothing that has finished, and resumes the rest (a simulation starts over). The table has means
    and standard deviations over the seeds; FOLDER/sweep.csv has each run.
    """
    from fedmq.nodes.api.given import Given
    from fedmq.nodes.api.sweep import Sweeper
    from fedmq.nodes.api.sweep_grid import SEED, parse_over

    streams.go_on_without_output()
    with exit_2_on_error():
        over = parse_over(overs)
        if seeds is not None:
            if SEED in over:
                raise ConfigError(f"--seeds: --over {SEED} gives the seeds already; leave out one")
            over[SEED] = list(range(seeds))
        if not over:
            raise ConfigError("sweep: expected --over KEY=A,B or --seeds N, what to compare")
        if simulated and workers is not None:
            raise ConfigError("--workers: a simulation has no workers; --processes trains it")
        if not simulated and processes is not None:
            raise ConfigError("--processes: expected it with --simulate; use --workers")
        sweeper = Sweeper(
            Given.of_command(config, settings).tables,
            over,
            "simulate" if simulated else "run",
            folder,
            jobs,
            workers,
            processes,
            show=lambda line: click.echo(line, err=True),
        )
        made = sweeper.sweep
        click.echo(f"{len(made)} runs in {made.folder}", err=True)
        with this_process.noting(sweeper.interrupt):
            sweeper.work()
        click.echo(made.to_csv() if as_csv else "\n".join(made.lines()), nl=not as_csv)
        this_process.hint = f"continue with the same command and --run {made.folder}"
        this_process.check()
    sys.exit(1 if made.failed else 0)
