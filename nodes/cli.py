"""The command line: ``fedmq cluster``, ``trace``, ``replay``, and each node by itself."""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import xxhash
from rich.console import Console

from fedmq.broker.names import name_fault
from fedmq.broker.process import give_torch_huge_pages, tune_process
from fedmq.nodes import logs
from fedmq.nodes.codec_cli import codec
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.personalise import personalise
from fedmq.nodes.replay.cli import replay
from fedmq.nodes.trace.cli import trace
from fedmq.nodes.trace.text import plain
from fedmq.nodes.trust import allow_option, allowed_here, find_own_code
from fedmq.nodes.usage import Commands

if TYPE_CHECKING:
    from fedmq.nodes.config import Config

DEFAULT_ENDPOINT = "tcp://127.0.0.1:7700"
_LONGEST = 2000
"""Of a sentence from elsewhere that is shown."""


def _above_zero(
    context: click.Context, option: click.Parameter, seconds: float | None
) -> float | None:
    """Check a time that was given: NaN and infinity are none."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise click.BadParameter(f"expected seconds above 0, got {seconds:g}", context, option)
    return seconds


_settings = click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Override a key, repeatable."
)
_config = click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
_connect = click.option(
    "--connect",
    "endpoint",
    metavar="ADDRESS",
    default=DEFAULT_ENDPOINT,
    show_default=True,
    help="Of the broker: tcp://HOST:PORT or ipc://PATH.",
)
_give_up = click.option(
    "--give-up",
    "give_up_s",
    metavar="SECONDS",
    type=float,
    callback=_above_zero,
    help="End (exit code 1) after so long without the broker or the run; by default never.",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedmq")
def main() -> None:
    """Asynchronous federated learning over a message queue."""
    give_torch_huge_pages()


main.add_command(trace)


@main.command()
@_config
@_settings
@click.option("--workers", type=click.IntRange(min=1), help="Number of worker processes.")
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), help="Folder of the run; new or empty."
)
def cluster(
    config: Path | None, settings: tuple[str, ...], workers: int | None, folder: Path | None
) -> None:
    """Train on this host: broker, aggregator, workers and evaluator as processes."""
    started_at = time.time()
    from fedmq.nodes.cluster import Cluster, preloading
    from fedmq.nodes.config import load

    with exit_2_on_error():
        chosen = load(config, (*settings, *([f"worker.count={workers}"] if workers else [])))
        chosen = _named(chosen)
        find_own_code(chosen.allowed)
        folder = folder or Path("runs") / chosen.run.id
        _check_new(folder)
        with preloading():
            from fedmq.nodes.setup import choose_device, set_up

            setup = set_up(chosen)
            # Data and device are there, or nothing is started.
            choose_device(chosen.worker.device)
            setup.problem.test()
            setup.problem.client(0)
            _make(folder)
        console = Console()
        complete = setup.config
        code = Cluster(complete, setup.problem.clients, folder, started_at, console).run()
    sys.exit(code)


@main.command()
@click.option(
    "--bind", default=DEFAULT_ENDPOINT, show_default=True, help="Where to listen; tcp://*:7700."
)
@click.option("--run", "folder", type=click.Path(path_type=Path), required=True, help="Its folder.")
@click.option("--lease", "lease_s", type=float, default=10.0, show_default=True, help="Seconds.")
@click.option(
    "--durability",
    type=click.Choice(["process", "power"]),
    default="process",
    show_default=True,
    help="What a receipt promises to survive: the broker's death, or a failure of power.",
)
@click.option(
    "--retain",
    default="everything",
    show_default=True,
    help="Payloads to keep: everything, unfinished, or a number of bytes.",
)
@click.option(
    "--share-files/--no-share-files",
    default=True,
    help="Let nodes on this host read blobs from the ledger's files.",
)
@click.option("--offer-parked", is_flag=True, help="Offer parked messages again.")
@click.option("--once", is_flag=True, help="End with the run, and write its summary.")
def broker(
    bind: str,
    folder: Path,
    lease_s: float,
    durability: str,
    retain: str,
    share_files: bool,  # noqa: FBT001 - click's
    offer_parked: bool,  # noqa: FBT001 - click's
    once: bool,  # noqa: FBT001 - click's
) -> None:
    """Route messages and keep the ledger; goes on from the ledger that is in its folder."""
    from fedmq.broker.router import BrokerServer
    from fedmq.nodes.config import build
    from fedmq.nodes.programs import Stopped, stop_on_signals
    from fedmq.nodes.summary import SUMMARY_FILE, write_summary

    logs.configure(None, node="broker")
    tune_process()
    with exit_2_on_error():
        given = {
            "lease_s": lease_s,
            "durability": durability,
            "retain": retain,
            "share_files": share_files,
        }
        table = build({"broker": given}).broker
        keeping = replace(table.keeping(), offer_parked=offer_parked)
        server = BrokerServer(bind, folder / "ledger", table.settings(), keeping)
        click.echo(f"listening on {server.endpoint}, ledger in {folder / 'ledger'}", err=True)
        if once:
            # What is here is of a run before this one, or is written again at the end.
            (folder / SUMMARY_FILE).unlink(missing_ok=True)
        with contextlib.suppress(Stopped), stop_on_signals(signal.SIGINT, signal.SIGTERM):
            server.serve(until_idle=once)
        if once:
            write_summary(folder)


@main.command()
@_connect
@_config
@_settings
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="Where to leave the final model; with the same one, a restarted node goes on at once.",
)
@_give_up
def aggregator(
    endpoint: str,
    config: Path | None,
    settings: tuple[str, ...],
    folder: Path | None,
    give_up_s: float | None,
) -> None:
    """Run the aggregator of one run, and the run with it."""
    from fedmq.nodes.aggregator_program import run_aggregator
    from fedmq.nodes.config import load

    with exit_2_on_error(), _stoppable():
        chosen = _named(load(config, settings))
        find_own_code(chosen.allowed)
        logs.configure(None, node="aggregator", run=chosen.run.id)
        if folder is not None:
            _make(folder)
        tune_process()
        run = chosen.run.id
        end = run_aggregator(endpoint, chosen, run, folder, give_up_s=give_up_s)
        click.echo(plain(f"the run ended: {end}", _LONGEST))


@main.command()
@_connect
@click.option("--clients", "ranges", help="Clients to host, for example 0-9 or 0-3,7.")
@click.option("--evaluator", is_flag=True, help="Evaluate models instead of training them.")
@click.option("--name", help="Name of the node; drawn from the host and the clients by default.")
@click.option("--run-id", default="", help="The run to join, if the broker serves several.")
@click.option(
    "--state",
    "folder",
    type=click.Path(path_type=Path),
    help="Where the node's key, and its clients' local states, survive a restart.",
)
@click.option(
    "--client-states",
    "states",
    type=click.Path(path_type=Path),
    help="Where clients' local states are, if workers that may take over each other's share it.",
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
    """Train the tasks of some clients (or evaluate) until the run is over."""
    from fedmq.broker.state import EVALUATOR, WORKER
    from fedmq.nodes.worker_program import run_worker

    with exit_2_on_error(), _stoppable():
        if evaluator == bool(ranges):
            raise ConfigError("expected either --clients or --evaluator")
        role = EVALUATOR if evaluator else WORKER
        clients = parse_ranges(ranges) if ranges else []
        node = default_name(socket.gethostname(), clients) if name is None else name
        allowed = allowed_here(allow)
        find_own_code(allowed)
        logs.configure(None, node=node)
        tune_process()
        end = run_worker(endpoint, node, clients, role, run_id, folder, states, allowed, give_up_s)
        click.echo(plain(f"the run ended: {end}", _LONGEST))


@main.command("list")
@click.argument("what", type=click.Choice(["algorithms", "codecs", "problems", "schedules"]))
def list_(what: str) -> None:
    """List the available algorithms, codecs, problems or schedules."""
    from fedmq.nodes.catalogue import lines

    for line in lines(what, shutil.get_terminal_size().columns):
        click.echo(line)


main.add_command(codec)
main.add_command(personalise)
main.add_command(replay)


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """Read client ranges such as ``0-9,12``, both ends included.

    Raises:
        ConfigError: the text is not of that form.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match:
            raise ConfigError(f"--clients: expected ranges such as 0-9,12, got {text!r}")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise ConfigError(f"--clients: expected low-high, got {part.strip()!r}")
        ranges.append((low, high))
    return ranges


def default_name(host: str, clients: Sequence[tuple[int, int]]) -> str:
    """Return the name of a node that was given none: of its host and what it hosts there.

    Every host's name and every list of ranges makes a valid one, and no two the same.
    """
    hosted = "_".join(str(a) if a == b else f"{a}-{b}" for a, b in clients) or "evaluator"
    name = f"{host}.{hosted}"
    if not name_fault(name):
        return name
    # What tells it from others is in the digest; the rest is for people.
    readable = re.sub(r"[^A-Za-z0-9-]+", "-", f"{host}-{hosted}").lstrip("-") or "node"
    return f"{readable[:60]}.x{xxhash.xxh3_128_hexdigest(name.encode(errors='surrogateescape'))}"


def _named(config: Config) -> Config:
    """Return the configuration with an id for the run."""
    if config.run.id:
        return config
    drawn = time.strftime("%Y%m%d-%H%M%S") + "-" + secrets.token_hex(2)
    return config.model_copy(update={"run": config.run.model_copy(update={"id": drawn})})


def _check_new(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"--run: expected a new or empty folder, {folder} is neither")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run: cannot make {folder}: {error.strerror}") from None


@contextlib.contextmanager
def exit_2_on_error() -> Iterator[None]:
    """Turn the project's own errors into one sentence, and exit code 2 (1 for giving up)."""
    from fedmq.algorithms.errors import AlgorithmError
    from fedmq.broker.errors import BrokerError, GaveUp
    from fedmq.codecs.errors import CodecError

    try:
        yield
    except (NodeError, BrokerError, AlgorithmError, CodecError) as error:
        click.echo(f"fedmq: {plain(error, _LONGEST)}", err=True)
        sys.exit(1 if isinstance(error, GaveUp) else 2)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """End on Ctrl-C or SIGTERM without a traceback."""
    from fedmq.nodes.programs import Stopped, stop_on_signals

    try:
        with stop_on_signals(signal.SIGINT, signal.SIGTERM):
            yield
    except Stopped as stopped:
        click.echo(f"fedmq: stopped by {stopped}", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
