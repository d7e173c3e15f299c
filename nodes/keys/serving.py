"""Which keys a broker uses, and what it tells its operator about them."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmq.broker.access.broker_keys import BrokerKeys
from fedmq.broker.access.key_files import BROKER_KEY
from fedmq.broker.errors import AccessError
from fedmq.broker.wire.endpoints import parse_endpoint
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.keys.folder import has_key_folder, key_folder
from fedmq.nodes.keys.joining import leaves_this_host


def broker_keys(binds: Sequence[str], folder: Path | None, *, insecure: bool) -> BrokerKeys | None:
    """Return the keys of a broker; None for a broker without keys.

    It uses the keys in a folder that its operator names. If it listens beyond this host, it uses
    those of the user's key folder, too; without any, it does not start unless ``insecure``.

    Args:
        binds: endpoints to listen on.
        folder: of the keys; None if the operator names none.
        insecure: whether anybody may connect.

    Raises:
        ConfigError: the folder has no key of a broker, or contradicts ``insecure``.
        AccessError: the key is invalid, or others may read it.
    """
    if folder is None and (insecure or not any(map(leaves_this_host, binds))):
        return None
    if insecure:
        raise ConfigError("--insecure admits nodes without keys: leave out --keys, or --insecure")
    if folder is None and not has_key_folder():
        return None
    where = key_folder(folder)
    try:
        return BrokerKeys.in_folder(where)
    except FileNotFoundError:
        if folder is None:
            return None
        at = f" --keys {shlex.quote(str(folder))}"
        raise ConfigError(
            f"there is no broker key in {where}: make one with `fedmq keys new broker{at}`"
        ) from None
    except AccessError as error:
        if folder is not None or os.access(where, os.X_OK):
            raise
        raise AccessError(
            f"{error}. This is the folder of keys of this user: --keys DIR names another one; "
            "--insecure lets anybody connect"
        ) from None


def unused_keys() -> str:
    """Return what to tell the operator of a broker without keys who has some; "" without any."""
    if not has_key_folder():
        return ""
    where = key_folder()
    if not os.path.lexists(where / f"{BROKER_KEY}.key"):
        return ""
    return (
        f"this broker admits nodes without keys; --keys {shlex.quote(str(where))} makes it use the "
        "key there"
    )


def how_to_connect(keys: BrokerKeys, endpoints: Sequence[str]) -> Iterator[str]:
    """Yield lines for the operator: the broker's public key, and a command for nodes.

    Args:
        keys: of the broker.
        endpoints: that it listens on, with their real ports.
    """
    yield f"public key: {keys.own.public}"
    tcp = [each for each in endpoints if each.startswith("tcp://")]
    if not tcp:
        return
    first = parse_endpoint(next(filter(leaves_this_host, tcp), tcp[0]), listen=True)
    everywhere = first.host in ("*", "::", "0.0.0.0")  # noqa: S104 - only compared
    host = socket.gethostname() if everywhere else first.host
    host = f"[{host}]" if ":" in host else host
    yield "nodes connect with"
    yield f"  fedmq worker --connect tcp://{host}:{first.port} \\"
    yield f"    --broker-key {shlex.quote(keys.own.public)} --clients FIRST-LAST"
