"""``fedmq keys``: make keys, and decide what the holder of each may do at a broker."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

from fedmq.broker.access.access_file import SHORT_KEY, AccessFile
from fedmq.broker.access.curve import KeyPair
from fedmq.broker.access.invites import InviteToken
from fedmq.broker.access.key_files import (
    BROKER_KEY,
    NODE_KEY,
    complete_key,
    key_names,
    new_key,
    public_key,
    read_key,
)
from fedmq.broker.access.rights import Access, Rights
from fedmq.broker.errors import AccessError, EndpointError
from fedmq.broker.wire.addresses import ROLES, WORKER, name_fault
from fedmq.broker.wire.endpoints import parse_endpoint
from fedmq.nodes.cli.options import (
    LONGEST_TEXT,
    Commands,
    WholeNumber,
    Word,
    exit_2_on_error,
    keys_option,
    parse_ranges,
)
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.keys.folder import key_folder
from fedmq.nodes.keys.listing import clients_text, facts, in_words, lines
from fedmq.nodes.process.terminal import fitted, plain, plural

DEFAULT_PORT = 7700
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_NOUNS = {"s": "second", "m": "minute", "h": "hour", "d": "day"}
_LONGEST_S = 366 * 86400


class Duration(click.ParamType):  # type: ignore[type-arg] # generic only in newer click
    """A time such as 30m, 1h or 2d, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a time from the command line."""
        match = re.fullmatch(r"(\d{1,9})([smhd])", str(value))
        seconds = int(match[1]) * _UNITS_S[match[2]] if match else 0
        if not 0 < seconds <= _LONGEST_S:
            self.fail(f"expected a time such as 30m, 1h or 2d, got {value!r}", param, ctx)
        return seconds


_roles = click.option(
    "--role",
    "roles",
    type=Word(ROLES),
    multiple=True,
    help="Role that its nodes may have; required, repeatable. An aggregator may open runs.",
)
_clients = click.option(
    "--clients", "ranges", help="Clients that its workers may host, for example 0-9; default: all."
)
_runs = click.option(
    "--run",
    "runs",
    metavar="ID",
    multiple=True,
    help="Run that its nodes may join or open; repeatable; default: all.",
)
_read_files = click.option(
    "--read-files",
    is_flag=True,
    help="Let its nodes on the broker's host read the ledger's files: all messages.",
)


@click.group(cls=Commands)
def keys() -> None:
    """Make keys, authorise them at a broker, and invite nodes.

    A broker and its nodes identify each other by keys. The secret key stays where it was made.
    """


@keys.command()
@click.argument("name", default=NODE_KEY)
@keys_option
def new(name: str, keys_folder: Path | None) -> None:
    """Make a key pair, and print the public key.

    NAME is "broker" for a broker's own key; nodes use the key "node" unless --key names another. A
    key that exists is never overwritten: to replace it, remove its two files first.
    """
    with exit_2_on_error():
        where = key_folder(keys_folder)
        if name in key_names(where):
            complete_key(where, name)
            raise ConfigError(
                f"the key {name} exists in {where}: `fedmq keys list{_at(keys_folder)}` shows it; "
                "choose another name for another key"
            )
        pair = new_key(where, name)
        click.echo(pair.public)
        _hint(f"wrote {where / name}.key, which stays on this host, and {name}.pub")
        _next_of(name, pair, keys_folder)


@keys.command()
@click.argument("key")
@click.option(
    "--name", help="Name for people; default: that of the file, or made from the pasted key."
)
@_roles
@_clients
@_runs
@_read_files
@click.option(
    "--replace",
    "replaced",
    metavar="NAME",
    help="Give the key the name, the rights and the nodes of the key NAME, and revoke that one; "
    "without other options.",
)
@keys_option
def authorize(
    key: str,
    name: str | None,
    roles: tuple[str, ...],
    ranges: str | None,
    runs: tuple[str, ...],
    read_files: bool,  # noqa: FBT001 - click's
    replaced: str | None,
    keys_folder: Path | None,
) -> None:
    """Authorise a public key, or change its rights. Run this on the broker's host.

    KEY is a public key or the path of a .pub file. A running broker notices the change at once.
    """
    with exit_2_on_error():
        where = key_folder(keys_folder)
        file = AccessFile(where)
        public = public_key(key)
        if replaced is not None:
            if name or roles or ranges or runs or read_files:
                raise ConfigError(
                    f"--replace {replaced} gives the key the name and the rights of that key: "
                    "leave out the other options"
                )
            rights = file.replace(replaced, public)
        else:
            rights = _rights(name or _name_of(key), roles, ranges, runs, read_files=read_files)
            rights = _with_key(rights, public)
            file.authorize(rights)
        click.echo(f"authorised {rights.name}: {in_words(rights)}")
        _warn_without_broker_key(where)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@keys_option
def list_(as_json: bool, keys_folder: Path | None) -> None:  # noqa: FBT001 - click's
    """List the authorised keys, the invites, the own keys, and the known brokers."""
    with exit_2_on_error():
        where = key_folder(keys_folder)
        if as_json:
            click.echo(json.dumps(facts(where, time.time()), indent=2))
        else:
            faults: list[AccessError] = []
            click.echo("\n".join([*lines(where, time.time(), faults)]))
            for fault in faults[:-1]:
                click.echo(f"fedmq: {plain(fault, LONGEST_TEXT)}", err=True)
            if faults:
                raise faults[-1]


@keys.command()
@click.argument("name")
@keys_option
def revoke(name: str, keys_folder: Path | None) -> None:
    """Revoke a key or an invite. Run this on the broker's host.

    NAME is the name of a key or of an invite, or a public key or its first 8 characters. A running
    broker ends the connections of the key at once. Keys that came with an invite stay when it is
    revoked.
    """
    with exit_2_on_error():
        file = AccessFile(key_folder(keys_folder))
        revoked = file.revoke(name)
        click.echo(f"revoked {revoked.name}")
        if any(each.key == revoked.key for each in file.revoked()):
            _hint("to give its name and its nodes to another key:")
            _hint_command(f"fedmq keys authorize KEY --replace {revoked.name}{_at(keys_folder)}")


@keys.command()
@click.option("--name", help="Keys are then named NAME-1, NAME-2, ...; default: invite.")
@_roles
@_clients
@_runs
@_read_files
@click.option(
    "--uses",
    type=WholeNumber(min=1),
    default=1,
    show_default=True,
    help="Nodes' keys that it admits.",
)
@click.option(
    "--for",
    "valid_s",
    type=Duration(),
    default="1h",
    show_default=True,
    help="How long it is valid: 30m, 1h, 2d.",
)
@click.option(
    "--address", help="Where nodes find the broker; default: tcp://HOST:7700 with this host's name."
)
@keys_option
def invite(
    name: str | None,
    roles: tuple[str, ...],
    ranges: str | None,
    runs: tuple[str, ...],
    read_files: bool,  # noqa: FBT001 - click's
    uses: int,
    valid_s: int,
    address: str | None,
    keys_folder: Path | None,
) -> None:
    """Print an invite, with which nodes hand in keys of their own. Run this on the broker's host.

    The invite is a secret: pass it through a file or a pipe. Only the invite goes to standard
    output. A key that is handed in has the rights that you give here.
    """
    with exit_2_on_error():
        where = key_folder(keys_folder)
        file = AccessFile(where)
        rights = _rights(
            name or _free_name(file.load()), roles, ranges, runs, read_files=read_files
        )
        endpoint = address or f"tcp://{socket.gethostname()}:{DEFAULT_PORT}"
        try:
            if parse_endpoint(endpoint).path:
                raise EndpointError(f"expected tcp://HOST:PORT, got {endpoint!r}")
        except EndpointError as error:
            raise ConfigError(f"--address: {error}") from None
        broker = _broker_key(where, keys_folder)
        pair = file.invite(rights, uses, time.time() + valid_s)
        click.echo(InviteToken(endpoint, broker.public, pair).text())
        _hint(f"{rights.name}: {in_words(rights)}; {plural(uses, 'use')}, {_valid(valid_s)}")
        _hint(f"it leads to the broker at {endpoint}; --address sets another address")
        _hint("save it on the node's host in a file INVITE with mode 600, and there run:")
        _hint_command(f"{_example(rights)} --join-file INVITE")


# ---- rights


def _rights(
    name: str, roles: Sequence[str], ranges: str | None, runs: Sequence[str], *, read_files: bool
) -> Rights:
    """Return the rights that options describe, without a key.

    Raises:
        ConfigError: an option is missing or invalid.
    """
    if fault := name_fault(name):
        raise ConfigError(f"--name: {fault}")
    if not roles:
        raise ConfigError(f"expected --role, one or more of {', '.join(ROLES)}")
    if ranges is not None and WORKER not in roles:
        raise ConfigError("--clients: only workers host clients; add --role worker")
    for run in runs:
        if fault := name_fault(run):
            raise ConfigError(f"--run: {fault}")
    return Rights(
        name=name,
        roles=tuple(dict.fromkeys(roles)),
        clients=None if ranges is None else tuple(parse_ranges(ranges)),
        runs=tuple(dict.fromkeys(runs)),
        read_files=read_files,
    )


def _with_key(rights: Rights, key: str) -> Rights:
    return replace(rights, key=key)


def _name_of(key: str) -> str:
    """Return a name for a key: that of its file, or one made from its first characters."""
    path = Path(key)
    if path.suffix == ".pub":
        return path.stem
    return f"key-{re.sub('[^A-Za-z0-9]', '', key)[:SHORT_KEY]}"


def _free_name(access: Access) -> str:
    """Return a name for an invite that neither a key nor another invite has."""
    taken = {each.name for each in access.keys.values()}
    taken |= {each.rights.name for each in access.invites.values()}
    names = itertools.chain(["invite"], (f"invite-{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in taken)


def _broker_key(where: Path, keys_folder: Path | None) -> KeyPair:
    try:
        return read_key(where, BROKER_KEY)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no broker key in {where}: run `fedmq keys new broker{_at(keys_folder)}` "
            "first, on the broker's host"
        ) from None


# ---- hints, on standard error


def _hint(sentence: str) -> None:
    for line in fitted(plain(sentence, LONGEST_TEXT)):
        click.echo(line, err=True)


def _hint_command(*lines: str) -> None:
    """Print a command, indented, that can be copied: its lines are not wrapped."""
    click.echo(" \\\n".join(f"  {each}" for each in lines).replace("\n  ", "\n    "), err=True)


def _at(keys_folder: Path | None) -> str:
    """Return the option that names the folder of keys again, for a command to be copied."""
    return f" --keys {shlex.quote(str(keys_folder))}" if keys_folder else ""


def _next_of(name: str, pair: KeyPair, keys_folder: Path | None) -> None:
    if name == BROKER_KEY:
        _hint("next, start the broker:")
        bind = f"--bind 'tcp://*:{DEFAULT_PORT}'"
        _hint_command(f"fedmq broker {bind} --run runs/first{_at(keys_folder)}")
        return
    host = socket.gethostname() if name == NODE_KEY else name
    _hint("next, on the broker's host (for workers; choose clients, or other roles):")
    name = "NAME" if name_fault(host) else host
    _hint_command(
        f"fedmq keys authorize {shlex.quote(pair.public)}",
        f"--name {name} --role worker --clients FIRST-LAST",
    )


def _warn_without_broker_key(where: Path) -> None:
    if BROKER_KEY not in key_names(where):
        _hint(f"{where} has no key of a broker: run this where the broker runs, with its --keys")


def _example(rights: Rights) -> str:
    if WORKER not in rights.roles:
        return f"fedmq {'aggregator' if 'aggregator' in rights.roles else 'worker --evaluator'}"
    clients = "FIRST-LAST" if rights.clients is None else clients_text(rights.clients)
    return f"fedmq worker --clients {clients}"


def _valid(seconds: int) -> str:
    unit = next(each for each in "dhms" if seconds % _UNITS_S[each] == 0)
    return f"valid for {plural(seconds // _UNITS_S[unit], _NOUNS[unit])}"
