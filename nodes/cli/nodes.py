"""The commands of nodes: ``fedmq aggregator`` and ``fedmq worker``."""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import xxhash

from fedmq.broker.access.key_files import NODE_KEY
from fedmq.broker.file_modes import make_private_folder
from fedmq.broker.process import tune_process
from fedmq.broker.wire.addresses import EVALUATOR, MAX_RANGES, WORKER, name_fault
from fedmq.nodes.cli.options import (
    DEFAULT_ENDPOINT,
    LONGEST_TEXT,
    Number,
    above_zero,
    allow_option,
    config_argument,
    exit_2_on_error,
    keys_option,
    parse_ranges,
    settings_option,
)
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.keys.folder import BROKER_KEY_VARIABLE, JOIN_VARIABLE
from fedmq.nodes.keys.joining import NO_KEY, ConnectionOptions, credentials
from fedmq.nodes.keys.trust import allowed_here, find_own_code
from fedmq.nodes.process import logs, streams
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.process.terminal import plain

if TYPE_CHECKING:
    from fedmq.nodes.run.config import Config

_CONNECTION = (
    click.option(
        "--connect",
        "endpoint",
        metavar="ADDRESS",
        help=f"Address of the broker: tcp://HOST:PORT or ipc://PATH; default: that of the invite, "
        f"or {DEFAULT_ENDPOINT}.",
    ),
    click.option(
        "--broker-key",
        metavar="KEY",
        help="Public key of the broker, or a .pub file; stored once the broker has "
        "admitted this node, in place of an earlier one. "
        f"Default: {BROKER_KEY_VARIABLE}, or the stored one. {NO_KEY!r} connects without keys.",
    ),
    click.option(
        "--join-file",
        metavar="FILE",
        help="File with an invite, or - for standard input; default: the variable "
        f"{JOIN_VARIABLE}. The node makes a key of its own and hands in the public half.",
    ),
    click.option(
        "--key",
        metavar="NAME",
        default=NODE_KEY,
        show_default=True,
        help="Key of this node, see fedmq keys.",
    ),
    keys_option,
    click.option(
        "--give-up",
        "give_up_s",
        metavar="SECONDS",
        type=Number(),
        callback=above_zero,
        help="Exit with code 1 after this time without the broker or the run; default: never.",
    ),
)


def _connecting(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a connection to a command, which gets them as one `ConnectionOptions`."""

    @functools.wraps(command)
    def collected(
        *,
        endpoint: str | None,
        broker_key: str | None,
        join_file: str | None,
        key: str,
        keys_folder: Path | None,
        give_up_s: float | None,
        **others: Any,
    ) -> None:
        options = ConnectionOptions(endpoint, keys_folder, key, broker_key, join_file, give_up_s)
        command(options=options, **others)

    for option in reversed(_CONNECTION):
        collected = option(collected)
    return collected


@click.command()
@_connecting
@config_argument
@settings_option
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), help="Folder for the final model."
)
def aggregator(
    options: ConnectionOptions,
    config: Path | None,
    settings: tuple[str, ...],
    folder: Path | None,
) -> None:
    """Run the aggregator; this starts the run.

    CONFIG is a TOML file; keys that it and --set leave out have their defaults.
    """
    from fedmq.nodes.aggregator.program import run_aggregator
    from fedmq.nodes.run.config import load
    from fedmq.nodes.run_folder.folder import check_not_simulated

    streams.go_on_without_output()
    with exit_2_on_error():
        chosen = _named(load(config, settings))
        find_own_code(chosen.allowed)
        logs.configure(None, node="aggregator", run=chosen.run.id)
        if folder is not None:
            check_not_simulated(folder)
            _make(folder)
        tune_process()
        found = credentials(options, DEFAULT_ENDPOINT, stateless=folder is None)
        end = run_aggregator(
            found.endpoint,
            chosen,
            chosen.run.id,
            folder,
            give_up_s=options.give_up_s,
            secret=found.secret,
            keys=found.keys,
            on_admission=found.remember,
        )
        click.echo(plain(f"the run ended: {end}", LONGEST_TEXT))


@click.command()
@_connecting
@click.option("--clients", "ranges", help="Clients to host, for example 0-9 or 0-3,7.")
@click.option("--evaluator", is_flag=True, help="Evaluate models instead of training them.")
@click.option("--name", help="Name of the node; default: made from the host and the clients.")
@click.option("--run-id", default="", help="The run to join, if the broker serves several.")
@click.option(
    "--state",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder for its clients' local states, which a restart needs.",
)
@click.option(
    "--client-states",
    "states",
    type=click.Path(path_type=Path),
    help="Folder for clients' local states that several workers share, to take over clients.",
)
@allow_option
def worker(
    options: ConnectionOptions,
    ranges: str | None,
    evaluator: bool,  # noqa: FBT001 - click's
    name: str | None,
    run_id: str,
    folder: Path | None,
    states: Path | None,
    allow: tuple[str, ...],
) -> None:
    """Run a worker: train the tasks of some clients, or evaluate, until the run ends."""
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
        found = credentials(options, DEFAULT_ENDPOINT, stateless=folder is None)
        end = run_worker(
            found.endpoint,
            node,
            clients,
            role,
            run_id,
            folder,
            states,
            allowed,
            options.give_up_s,
            found.secret,
            found.keys,
            found.remember,
        )
        click.echo(plain(f"the run ended: {end}", LONGEST_TEXT))


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
