"""What earlier repairs of a ledger have given up, as they noted it beside the segments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fedmq.broker.errors import io_error
from fedmq.broker.ledger.entries import BlobName

REPAIRS_FILE = "repairs.jsonl"


class Repair(msgspec.Struct, kw_only=True, frozen=True):
    """One repair: when, what was done, and which blobs were lost by then."""

    at: float
    steps: list[str]
    blobs: list[tuple[str, str, str]]
    """(run, owner, digest in hexadecimal digits)."""


_decoder = msgspec.json.Decoder(Repair)


def read_repairs(folder: Path) -> list[Repair]:
    """Return the repairs of a ledger, oldest first; a line that is none is passed over.

    Raises:
        LedgerError: the file is there and cannot be read.
    """
    path = folder / REPAIRS_FILE
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise io_error("cannot read", error, path.name) from None
    found = []
    for line in lines:
        try:
            found.append(_decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue  # cut short by a crash: the repair it tells of was not finished
    return found


def accepted_losses(folder: Path) -> set[BlobName]:
    """Return the blobs that earlier repairs have given up.

    Raises:
        LedgerError: the file that names them cannot be read.
    """
    return {
        BlobName(run, owner, bytes.fromhex(digest))
        for repair in read_repairs(folder)
        for run, owner, digest in repair.blobs
    }


def note_repair(folder: Path, at: float, steps: Sequence[str], blobs: Sequence[BlobName]) -> None:
    """Write down what is done, before it is.

    Raises:
        LedgerError: it cannot be written.
    """
    named = [(each.run, each.owner, each.digest.hex()) for each in blobs]
    line = msgspec.json.encode(Repair(at=at, steps=list(steps), blobs=named))
    path = folder / REPAIRS_FILE
    try:
        with path.open("ab") as file:
            file.write((b"\n" if file.tell() else b"") + line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise io_error("cannot write", error, path.name) from None
