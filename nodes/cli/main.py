"""The command line: all commands of ``fedmq``."""

from __future__ import annotations

import math
import re
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import xxhash
from rich.console import Console

from fedmq.broker.file_modes import make_private_folder
from fedmq.broker.process import give_torch_huge_pages, tune_process
from fedmq.broker.wire.addresses import MAX_RANGES, name_fault
from fedmq.nodes.cli.codec import codec
from fedmq.nodes.cli.ledger import ledger
from fedmq.nodes.cli.options import (
    LONGEST_TEXT,
    Commands,
    Number,
    RenamedOptions,
    WholeNumber,
    Word,
    exit_2_on_error,
    parse_ranges,
    settings_option,
)
from fedmq.nodes.cli.personalise import personalise
from fedmq.nodes.cli.replay import replay
from fedmq.nodes.cli.trace import trace
from fedmq.nodes.cli.trust import allow_option, allowed_here, find_own_code
from fedmq.nodes.cluster.environment import check_surroundings
from fedmq.nodes.errors import ConfigError, own_code
from fedmq.nodes.process import logs, streams
from fedmq.nodes.process.ending import ending_well
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.process.signals import this_process
from fedmq.nodes.process.terminal import plain

if TYPE_CHECKING:
    from fedmq.nodes.run.config import Config

DEFAULT_ENDPOINT = "tcp://127.0.0.1:7700"


def _above_zero(
    context: click.Context, option: click.Parameter, seconds: float | None
) -> float | None:
    """Check that a time is finite and above 0."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise click.BadParameter(f"expected seconds above 0, got {seconds:g}", context, option)
    return seconds


_config = click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
_connect = click.option(
    "--connect",
    "endpoint",
    metavar="ADDRESS",
    default=DEFAULT_ENDPOINT,
    show_default=True,
    help="Address of the broker: tcp://HOST:PORT or ipc://PATH.",
)
_give_up = click.option(
    "--give-up",
    "give_up_s",
    metavar="SECONDS",
    type=Number(),
    callback=_above_zero,
    help="Exit with code 1 after this time without the broker or the run; default: never.",
)


class _Commands(Commands):
    """All commands; they handle signals and failing output in the same way."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command, see `ending_well`."""
        with ending_well():
            return super().main(*args, **extra)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedmq")
def main() -> None:
    """Asynchronous federated learning over a message queue."""
    with exit_2_on_error():
        check_surroundings()
    give_torch_huge_pages()


main.add_command(trace)


@main.command()
@_config
@settings_option
@click.option("--workers", type=WholeNumber(min=1), help="Number of worker processes.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of the run; if it holds a run, that run resumes. Default: runs/ID.",
)
def cluster(
    config: Path | None, settings: tuple[str, ...], workers: int | None, folder: Path | None
) -> None:
    """Train on this host: broker, aggregator, workers and evaluator as processes.

    CONFIG is a TOML file; keys that it and --set leave out have their defaults.
    """
    now = time.time()
    from fedmq.nodes.cluster.continuing import about, asking, continuation, show_ended
    from fedmq.nodes.cluster.forking import preloading
    from fedmq.nodes.cluster.supervisor import Cluster, resume_command, worker_names

    settings = (*settings, *([f"worker.count={workers}"] if workers else []))
    streams.go_on_without_output()
    console = Console()
    with exit_2_on_error(), asking(config, settings, folder, now) as asked:
        find_own_code(asked.config.allowed)
        # The configuration in the folder includes the changes of --set.
        resume_with = resume_command(asked.folder, None if settings else config)
        resumed = None
        if asked.recorded is not None:
            resumed = continuation(asked)
            if resumed is None:
                show_ended(asked, console)
                sys.exit(0)
            this_process.hint = f"resume with: {resume_with}"
            console.print(about(asked, resumed), highlight=False, soft_wrap=True, markup=False)
        with preloading():
            from fedmq.nodes.run.devices import choose_device
            from fedmq.nodes.run.setup import check_attainable, set_up

            with own_code("problem.name"):
                setup = set_up(asked.config)
                # Without the data or the device, nothing is started.
                choose_device(asked.config.worker.device)
                clients = setup.problem.clients
                check_attainable(setup, worker_names(setup.config, clients))
                setup.problem.test()
                setup.problem.client(0)
        code = Cluster(
            setup.config, clients, asked.folder, asked.begun, console, resumed, resume_with
        ).run()
    sys.exit(code)


@main.command(cls=RenamedOptions, renamed={"--offer-parked": "--redeliver-dead-letters"})
@click.option(
    "--bind",
    default=DEFAULT_ENDPOINT,
    show_default=True,
    help="Listen here, such as tcp://*:7700.",
)
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
@click.option(
    "--lease",
    "lease_s",
    metavar="SECONDS",
    type=Number(),
    callback=_above_zero,
    default=10.0,
    show_default=True,
    help="Count a node as gone after this time of silence.",
)
@click.option(
    "--durability",
    type=Word(["process", "power"]),
    default="process",
    show_default=True,
    help="What acknowledged messages survive: the broker's death, or also a power failure.",
)
@click.option(
    "--retain",
    default="everything",
    show_default=True,
    help="Payloads to keep: everything, unfinished, headers, or a number of bytes.",
)
@click.option(
    "--share-files/--no-share-files",
    default=True,
    help="Let nodes on this host read blobs from the ledger's files.",
)
@click.option("--redeliver-dead-letters", is_flag=True, help="Deliver dead letters again.")
@click.option("--once", is_flag=True, help="Exit at the end of the run, and write its summary.")
def broker(
    bind: str,
    folder: Path,
    lease_s: float,
    durability: str,
    retain: str,
    share_files: bool,  # noqa: FBT001 - click's
    redeliver_dead_letters: bool,  # noqa: FBT001 - click's
    once: bool,  # noqa: FBT001 - click's
) -> None:
    """Run the broker; it resumes from the ledger in its folder."""
    from fedmq.broker.ledger.reader import read_entries
    from fedmq.broker.router import BrokerServer
    from fedmq.nodes.history.run import runs_of
    from fedmq.nodes.run.config import build, setting_value
    from fedmq.nodes.run_folder.folder import LEDGER, begun_at, state_of
    from fedmq.nodes.run_folder.summary_file import SUMMARY_FILE, remove_summary, write_summary

    streams.go_on_without_output()
    logs.configure(None, node="broker")
    tune_process()
    with exit_2_on_error():
        given = {
            "lease_s": lease_s,
            "durability": durability,
            "retain": setting_value(retain),
            "share_files": share_files,
        }
        table = build({"broker": given}).broker
        ledger_settings = replace(
            table.ledger_settings(), redeliver_dead_letters=redeliver_dead_letters
        )
        server = BrokerServer(bind, folder / LEDGER, table.settings(), ledger_settings)
        found = state_of(runs_of(read_entries(folder / LEDGER)).values(), once=once)
        where = f"listening on {server.endpoint}, ledger in {folder / LEDGER}"
        click.echo(f"{where}; {found}", err=True)
        if once:
            remove_summary(folder)
        with this_process.noting(server.stop):
            server.serve(until_idle=once)
            if once:
                write_summary(folder, begun_at(folder))
                click.echo(f"summary in {folder / SUMMARY_FILE}", err=True)
        this_process.check()


@main.command()
@_connect
@_config
@settings_option
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder for the final model; with the same folder, a restarted node resumes at once.",
)
@_give_up
def aggregator(
    endpoint: str,
    config: Path | None,
    settings: tuple[str, ...],
    folder: Path | None,
    give_up_s: float | None,
) -> None:
    """Run the aggregator; this starts the run.

    CONFIG is a TOML file; keys that it and --set leave out have their defaults.
    """
    from fedmq.nodes.aggregator.program import run_aggregator
    from fedmq.nodes.run.config import load

    streams.go_on_without_output()
    with exit_2_on_error():
        chosen = _named(load(config, settings))
        find_own_code(chosen.allowed)
        logs.configure(None, node="aggregator", run=chosen.run.id)
        if folder is not None:
            _make(folder)
        tune_process()
        run = chosen.run.id
        end = run_aggregator(endpoint, chosen, run, folder, give_up_s=give_up_s)
        click.echo(plain(f"the run ended: {end}", LONGEST_TEXT))


@main.command()
@_connect
@click.option("--clients", "ranges", help="Clients to host, for example 0-9 or 0-3,7.")
@click.option("--evaluator", is_flag=True, help="Evaluate models instead of training them.")
@click.option("--name", help="Name of the node; default: made from the host and the clients.")
@click.option("--run-id", default="", help="The run to join, if the broker serves several.")
@click.option(
    "--state",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder for the node's key and its clients' local states, which a restart needs.",
)
@click.option(
    "--client-states",
    "states",
    type=click.Path(path_type=Path),
    help="Folder for clients' local states that several workers share, to take over clients.",
)
@allow_option
@_give_up
def worker(
    endpoint: str,
    ranges: str | None,
    evaluator: bool,  # noqa: FBT001 - click's
    name: str | None,
    run_id: str,
    folder: Path | None,
    states: Path | None,
    allow: tuple[str, ...],
    give_up_s: float | None,
) -> None:
    """Run a worker: train the tasks of some clients, or evaluate, until the run ends."""
    from fedmq.broker.wire.addresses import EVALUATOR, WORKER
    from fedmq.nodes.worker.program import run_worker

    streams.go_on_without_output()
    with exit_2_on_error():
        if evaluator == bool(ranges):
            raise ConfigError("expected either --clients or --evaluator")
        role = EVALUATOR if evaluator else WORKER
        clients = parse_ranges(ranges) if ranges else []
        if len(clients) > MAX_RANGES:
            raise ConfigError(
                f"--clients: expected at most {MAX_RANGES} ranges, got {len(clients)}: use "
                "consecutive clients, or start several workers"
            )
        node = default_name(socket.gethostname(), clients) if name is None else name
        allowed = allowed_here(allow)
        find_own_code(allowed)
        logs.configure(None, node=node)
        tune_process()
        end = run_worker(endpoint, node, clients, role, run_id, folder, states, allowed, give_up_s)
        click.echo(plain(f"the run ended: {end}", LONGEST_TEXT))


@main.command("list")
@click.argument("what", type=Word(["algorithms", "codecs", "problems", "schedules"]))
def list_(what: str) -> None:
    """List the available algorithms, codecs, problems or schedules.

    Algorithms and schedules are listed with their configuration keys and defaults, problems with
    the numbers of training + test examples and the default model.
    """
    from fedmq.nodes.cli.catalogue import lines

    for line in lines(what, shutil.get_terminal_size().columns):
        click.echo(line)


main.add_command(codec)
main.add_command(ledger)
main.add_command(personalise)
main.add_command(replay)


def default_name(host: str, clients: Sequence[tuple[int, int]]) -> str:
    """Return a node's default name, made from its host and its clients.

    It is valid and unique for every host name and list of ranges.
    """
    hosted = "_".join(str(a) if a == b else f"{a}-{b}" for a, b in clients) or "evaluator"
    name = f"{host}.{hosted}"
    if not name_fault(name):
        return name
    # The digest makes it unique; the rest is for people.
    readable = re.sub(r"[^A-Za-z0-9-]+", "-", f"{host}-{hosted}").lstrip("-") or "node"
    return f"{readable[:60]}.x{xxhash.xxh3_128_hexdigest(name.encode(errors='surrogateescape'))}"


def _named(config: Config) -> Config:
    """Return the configuration with a run id, drawn if it has none."""
    from fedmq.nodes.cluster.continuing import called, draw_id

    return config if config.run.id else called(config, draw_id())


def _make(folder: Path) -> None:
    try:
        make_private_folder(folder)
    except OSError as error:
        raise ConfigError(f"--run: cannot make {folder}: {reason_of(error)}") from None
