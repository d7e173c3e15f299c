"""Read and write the record of a ledger's repairs, a file beside its segments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fedmq.broker.errors import io_error
from fedmq.broker.file_modes import open_private
from fedmq.broker.ledger.entries import BlobName

REPAIRS_FILE = "repairs.jsonl"


class Repair(msgspec.Struct, kw_only=True, frozen=True):
    """A repair: its time, its steps, and the blobs that were given up."""

    at: float
    steps: list[str]
    blobs: list[tuple[str, str, str]]
    """(run, owner, hexadecimal digest) of each."""


_decoder = msgspec.json.Decoder(Repair)


def read_repairs(folder: Path) -> list[Repair]:
    """Return the repairs of a ledger, oldest first; invalid lines are skipped.

    Raises:
        LedgerError: the file exists and cannot be read.
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
            continue  # truncated by a crash: the repair was not finished
    return found


def accepted_losses(folder: Path) -> set[BlobName]:
    """Return the blobs that earlier repairs have given up.

    Raises:
        LedgerError: the file exists and cannot be read.
    """
    return {
        BlobName(run, owner, bytes.fromhex(digest))
        for repair in read_repairs(folder)
        for run, owner, digest in repair.blobs
    }


def note_repair(folder: Path, at: float, steps: Sequence[str], blobs: Sequence[BlobName]) -> None:
    """Record a repair before its steps are done.

    Raises:
        LedgerError: the file cannot be written.
    """
    named = [(each.run, each.owner, each.digest.hex()) for each in blobs]
    line = msgspec.json.encode(Repair(at=at, steps=list(steps), blobs=named))
    path = folder / REPAIRS_FILE
    try:
        with open_private(path, "ab") as file:
            file.write((b"\n" if file.tell() else b"") + line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise io_error("cannot write", error, path.name) from None
