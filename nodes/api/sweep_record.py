"""The folder of a sweep: which values and which configuration each of its runs has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmq.broker.file_modes import make_private_folder
from fedmq.nodes.api.given import Given
from fedmq.nodes.api.sweep_grid import GridCell
from fedmq.nodes.cluster.continuing import kind_of_key
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.process.atomic_write import replacing
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.run.config_difference import differences, shown

RECORD_FILE = "sweep.json"
CSV_FILE = "sweep.csv"


class SweepRecord:
    """The configurations in ``sweep.json``; makes the folder, and adds the runs of this sweep.

    Args:
        folder: of the sweep.
        how: ``run`` or ``simulate``.
        cells: of the sweep.

    Attributes:
        settings: values by key of each run in the folder, by its name.
        extended: names of runs that were there with another goal, which resuming them changes.

    Raises:
        ConfigError: the folder has a run of another configuration, or cannot be used.
    """

    def __init__(self, folder: Path, how: str, cells: Sequence[GridCell]) -> None:
        self._folder, self._how = folder, how
        self.settings: dict[str, dict[str, Any]] = {}
        self._runs = self._read()
        self.extended = {
            cell.name
            for cell in cells
            if cell.name in self._runs and self._goal_differs(cell, self._runs[cell.name])
        }
        for cell in cells:
            # An extended run keeps its old goal until it has reached the new one.
            self._runs.setdefault(cell.name, _as_json(cell.given.tables))
            self.settings[cell.name] = _as_json(cell.settings)
        self._save()

    def reached(self, cell: GridCell) -> None:
        """Record the new goal of a run that has reached it."""
        if cell.name in self.extended:
            self._runs[cell.name] = _as_json(cell.given.tables)
            self._save()

    def write(self, name: str, text: str) -> None:
        """Write a file of the sweep atomically.

        Raises:
            ConfigError: it cannot be written.
        """
        file = self._folder / name
        try:
            with replacing(file) as fresh:
                fresh.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {reason_of(error)}") from None

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the tables of each run that is recorded."""
        file = self._folder / RECORD_FILE
        try:
            make_private_folder(self._folder)
            content = json.loads(file.read_text())
            runs = {str(name): dict(tables) for name, tables in content["runs"].items()}
            settings = {str(name): dict(each) for name, each in content["settings"].items()}
            how = str(content["how"])
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"cannot use {self._folder}: {reason_of(error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"cannot read {file}: it is no record of a sweep: {error!r}"
            ) from None
        if how != self._how:
            raise ConfigError(
                f"{self._folder} has a sweep that was made with how={how!r}, got {self._how!r}; "
                "choose another folder"
            )
        self.settings = settings
        return runs

    def _save(self) -> None:
        content = {"how": self._how, "settings": self.settings, "runs": self._runs}
        self.write(RECORD_FILE, json.dumps(content, indent=2) + "\n")

    def _goal_differs(self, cell: GridCell, before: Mapping[str, Any]) -> bool:
        """Return whether a run has another goal than before.

        Raises:
            ConfigError: another key differs.
        """
        there, here = (
            Given.of(each).checked.model_dump() for each in (before, _as_json(cell.given.tables))
        )
        found = differences(there, here)
        # A simulation depends on every key, and starts over instead of being resumed.
        kinds = {key: kind_of_key(key) if self._how == "run" else None for key in found}
        wrong = {key: found[key] for key, kind in kinds.items() if kind is None}
        if wrong:
            pairs = [
                f"{key} is {shown(old)} there and {shown(new)} here"
                for key, (old, new) in wrong.items()
            ]
            raise ConfigError(
                f"{self._folder / cell.name} has another configuration: {', '.join(pairs)}; "
                "choose another folder for this sweep"
            )
        return "goal" in kinds.values()


def _as_json(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables as JSON has them; TOML has dates, too."""
    plain: dict[str, Any] = json.loads(json.dumps(tables, default=str))
    return plain
