"""``fedmq simulate`` and ``fedmq sweep``: a run in virtual time, and many runs."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from fedmq.nodes.cli.options import (
    WholeNumber,
    Word,
    config_argument,
    exit_2_on_error,
    settings_option,
)
from fedmq.nodes.cluster.console import output_console
from fedmq.nodes.errors import ConfigError, own_code
from fedmq.nodes.keys.trust import find_own_code
from fedmq.nodes.process import streams
from fedmq.nodes.process.signals import this_process

_SIMULATE_AGAIN = "To simulate it again, choose another folder with --run"


@click.command()
@config_argument
@settings_option
@click.option("--clients", type=WholeNumber(min=1), help="Number of clients: problem.clients.")
@click.option(
    "--processes",
    type=WholeNumber(),
    help="Number of training processes; 0 trains in the command itself. Default: all cores.",
)
@click.option("--on", "cluster", type=Word(["ray"]), help="Train on a Ray cluster.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of the run. Default: runs/ID.",
)
def simulate(
    config: Path | None,
    settings: tuple[str, ...],
    clients: int | None,
    processes: int | None,
    cluster: str | None,
    folder: Path | None,
) -> None:
    """Simulate a run of many clients in virtual time, with real training.

    CONFIG is a TOML file, or - for standard input; keys that it and --set leave out have their
    defaults. The table [simulation] has the speed, connection and availability of the clients'
    devices. The result is the folder of a run, as of fedmq cluster.
    """
    from fedmq.nodes.cluster.continuing import asking, check_simulated, show_ended
    from fedmq.nodes.cluster.forking import preloading
    from fedmq.nodes.population.table import STARTS_AT, SimulationTable

    settings = (*settings, *([f"problem.clients={clients}"] if clients else []))
    streams.go_on_without_output()
    console = output_console()
    with exit_2_on_error(), asking(config, settings, folder, STARTS_AT, simulated=True) as asked:
        if cluster is not None and processes is not None:
            raise ConfigError(f"--processes: not used with --on {cluster}, got {processes}")
        find_own_code(asked.config.allowed)
        if asked.recorded is not None:
            check_simulated(asked)
            show_ended(asked, console, _SIMULATE_AGAIN)
            sys.exit(1 if asked.recorded.failed else 0)
        if processes is None:
            table = asked.config.simulation or SimulationTable()
            trains_here = cluster is None and table.learner == "train"
            processes = len(os.sched_getaffinity(0)) if trains_here else 0
        # The server that forks the training processes imports torch at the same time.
        with preloading() if processes else contextlib.nullcontext():
            from fedmq.nodes.run.devices import choose_device
            from fedmq.nodes.run.setup import check_attainable, set_up
            from fedmq.nodes.simulation.clients import population_of
            from fedmq.nodes.simulation.command import SimulationCommand, trainer_of

            with own_code("problem.name"):
                setup = set_up(asked.config)
                # Without the data or the device, nothing is started.
                device = choose_device(setup.config.worker.device)
                check_attainable(setup)
                population = population_of(setup)
                setup.problem.test()
                setup.problem.client(0)
        make, trained_by = trainer_of(setup, device, processes, cluster)
        code = SimulationCommand(
            setup, asked.folder, STARTS_AT, console, population, make, trained_by
        ).run()
    sys.exit(code)


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
@click.option("--on", "cluster", type=Word(["ray"]), help="Train simulations on a Ray cluster.")
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
    cluster: str | None,
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
        for name, value in (("--processes", processes), ("--on", cluster)):
            if not simulated and value is not None:
                raise ConfigError(f"{name}: expected --simulate, too")
        sweeper = Sweeper(
            Given.of_command(config, settings).tables,
            over,
            "simulate" if simulated else "run",
            folder,
            jobs,
            {"workers": workers, "processes": processes, "on": cluster},
            show=lambda line: click.echo(line, err=True),
        )
        made = sweeper.sweep
        with this_process.noting(sweeper.interrupt):
            sweeper.work()
        click.echo(made.to_csv() if as_csv else "\n".join(made.lines()), nl=not as_csv)
        this_process.hint = f"continue with the same command and --run {made.folder}"
        this_process.check()
    sys.exit(1 if made.failed else 0)
