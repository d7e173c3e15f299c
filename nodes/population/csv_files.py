"""CSV files of device profiles and of availability; errors name file, line and column."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.hashing import Clients

NUMBERS = ("compute", "latency", "bandwidth_down", "bandwidth_up")
"""Columns of a device profile, named after the keys that they replace."""
_LARGEST_CLIENT = 1 << 31


@dataclass(frozen=True)
class Profiles:
    """Profiles of devices.

    values: float64 [rows] of each column of `NUMBERS` that the file has; infinite for an empty
        bandwidth.
    weight: float64 [rows], how often a client has each profile; None if `client` assigns them.
    client: the row of each client; None if they are drawn.
    """

    values: Mapping[str, NDArray[np.float64]]
    weight: NDArray[np.float64] | None
    client: Mapping[int, int] | None


@dataclass(frozen=True)
class Intervals:
    """Intervals in which clients are available, ordered by client and start.

    client: int64 [n]; start, end: float64 [n], in seconds since the start of the run.
    """

    client: Clients
    start: NDArray[np.float64]
    end: NDArray[np.float64]


def read_profiles(path: str, key: str) -> Profiles:
    """Read a file of device profiles.

    Args:
        path: of the file; its columns are `NUMBERS`, and ``weight`` or ``client``.
        key: of the configuration that names the file, for errors.

    Raises:
        ConfigError: the file cannot be read, or a line cannot be used.
    """
    table = _CsvTable(path, key, (*NUMBERS, "weight", "client"))
    known = [name for name in NUMBERS if name in table.columns]
    if not known:
        raise table.fault(1, f"expected at least one of the columns {', '.join(NUMBERS)}")
    if {"weight", "client"} <= {*table.columns}:
        raise table.fault(1, "expected weight or client, got both")
    rows = table.rows()
    if not rows:
        raise table.fault(2, "expected a row for each device, got none")
    values = {
        name: np.array([table.number(row, name, empty=name in NUMBERS[2:]) for row in rows])
        for name in known
    }
    if "client" in table.columns:
        of_client: dict[int, int] = {}
        for index, row in enumerate(rows):
            client = table.client(row)
            if client in of_client:
                raise table.fault(row[0], f"client {client} has a row already", "client")
            of_client[client] = index
        return Profiles(values, None, of_client)
    weighted = "weight" in table.columns
    weight = np.array([table.number(row, "weight") if weighted else 1.0 for row in rows])
    if not weight.sum() > 0:
        raise table.fault(2, "expected a weight above 0 in some row", "weight")
    return Profiles(values, weight, None)


def read_intervals(path: str, key: str) -> Intervals:
    """Read a file of the intervals in which each client is available.

    Args:
        path: of the file; its columns are ``client``, ``start`` and ``end``.
        key: of the configuration that names the file, for errors.

    Raises:
        ConfigError: the file cannot be read, or a line cannot be used.
    """
    names = ("client", "start", "end")
    table = _CsvTable(path, key, names)
    if missing := [name for name in names if name not in table.columns]:
        raise table.fault(1, f"expected the columns client, start and end, {missing[0]} is missing")
    rows = table.rows()
    client = np.array([table.client(row) for row in rows], np.int64)
    start = np.array([table.number(row, "start") for row in rows], np.float64)
    end = np.array([table.number(row, "end") for row in rows], np.float64)
    order = np.lexsort((start, client))
    client, start, end = client[order], start[order], end[order]
    for wrong in np.flatnonzero(end <= start)[:1]:
        line = rows[int(order[wrong])][0]
        raise table.fault(line, f"expected more than start, {start[wrong]:g}", "end")
    overlap = (client[1:] == client[:-1]) & (start[1:] < end[:-1])
    for wrong in np.flatnonzero(overlap)[:1]:
        line = rows[int(order[wrong + 1])][0]
        before = f"{start[wrong]:g} to {end[wrong]:g}"
        raise table.fault(line, f"expected no overlap with {before} of the same client", "start")
    return Intervals(client, start, end)


_Row = tuple[int, Mapping[str, str]]
"""Line number, and texts by column."""


class _CsvTable:
    def __init__(self, path: str, key: str, known: Sequence[str]) -> None:
        self._path, self._key = path, key
        try:
            text = Path(path).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"{key}: cannot read {path}: {reason}") from None
        self._lines = csv.reader(text.splitlines())
        self.columns = [name.strip() for name in next(self._lines, [])]
        for name in self.columns:
            if name not in known:
                choices = ", ".join(known)
                raise self.fault(1, f"unknown column {name!r:.100}; choose from {choices}")
            if self.columns.count(name) > 1:
                raise self.fault(1, "expected each column once", name)

    def fault(self, line: int, fault: str, column: str = "") -> ConfigError:
        """Return the error for a line."""
        where = f", column {column}" if column else ""
        return ConfigError(f"{self._key}: {self._path}, line {line}{where}: {fault}")

    def rows(self) -> list[_Row]:
        """Return the rows below the head; empty lines are left out."""
        return list(self._rows())

    def _rows(self) -> Iterator[_Row]:
        try:
            for values in self._lines:
                line = self._lines.line_num
                if not values:
                    continue
                if len(values) != len(self.columns):
                    wanted = len(self.columns)
                    raise self.fault(line, f"expected {wanted} values, got {len(values)}")
                yield line, dict(zip(self.columns, (each.strip() for each in values), strict=True))
        except csv.Error as error:
            raise self.fault(self._lines.line_num, str(error)) from None

    def number(self, row: _Row, column: str, *, empty: bool = False) -> float:
        """Return a number from 0; infinity for an empty value, if ``empty`` allows it."""
        line, text = row[0], row[1][column]
        if empty and not text:
            return math.inf
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 <= value < math.inf):
            raise self.fault(line, f"expected a number of at least 0, got {text!r:.100}", column)
        if empty and not value:
            raise self.fault(line, "expected a bandwidth above 0, or none", column)
        return value

    def client(self, row: _Row) -> int:
        """Return the number of a client."""
        text = row[1]["client"]
        if not (text.isascii() and text.isdigit() and int(text[:12]) < _LARGEST_CLIENT):
            raise self.fault(
                row[0], f"expected the number of a client, got {text!r:.100}", "client"
            )
        return int(text)
