"""A recorded run: its curve, counts, model and messages, from the files in its folder."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmq.broker.errors import LedgerDamage, check_advice
from fedmq.broker.ledger.entries import ledger_folder
from fedmq.broker.ledger.reader import read_entries
from fedmq.nodes.api.array_table import ArrayTable
from fedmq.nodes.api.given import usable_path
from fedmq.nodes.api.run_trace import RunTrace
from fedmq.nodes.errors import ConfigError, NodeError
from fedmq.nodes.history.facts import client_of
from fedmq.nodes.history.run import RunHistory, runs_of
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.process.terminal import duration, plural, size_text
from fedmq.nodes.run.config import Config, parse
from fedmq.nodes.run.config import load as load_config
from fedmq.nodes.run_folder.folder import begun_at, usable_config
from fedmq.nodes.run_folder.summary import summary_of
from fedmq.nodes.run_folder.summary_file import SIMULATED_IN_S, SUMMARY_FILE

if TYPE_CHECKING:
    from torch import Tensor

CURVE = (
    *("version", "wall_s", "bytes_up", "bytes_down", "results_used", "staleness"),
    *("accuracy", "loss"),
)
"""Columns that every curve has; other metrics come after them."""
_KEYS = {"run", "status", "versions", "results", "curve", "wall_s", "bytes", "final_accuracy"}
"""Keys of ``summary.json`` that are needed to read it without the ledger."""


class Run:
    """A run, as its folder has it; what was read once is kept.

    ``fedmq.load(folder)`` returns a new object, which has what was added since.

    Args:
        folder: of the run.
        run_id: of the run, if the ledger in the folder has several.

    Attributes:
        folder: of the run, as an absolute path.

    Raises:
        ConfigError: the folder has neither a ledger nor a summary.
    """

    def __init__(self, folder: Path, run_id: str = "") -> None:
        ledger = ledger_folder(folder)
        self.folder = (
            ledger.parent if ledger == folder and _is_ledger(folder) else folder
        ).absolute()
        self._run_id = run_id
        if not (self.folder / SUMMARY_FILE).is_file() and not _is_ledger(self._ledger):
            raise ConfigError(
                f"expected the folder of a run, {folder} has no ledger and no {SUMMARY_FILE}"
            )

    @property
    def id(self) -> str:
        """Return the run's id."""
        return str(self.summary["run"])

    @property
    def status(self) -> str:
        """Return ``finished``, ``failed``, or ``interrupted`` if it has not ended (yet)."""
        return str(self.summary["status"])

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` has; it is computed from the ledger if there is none.

        Raises:
            ConfigError: the file cannot be read.
            LedgerError: the ledger is damaged.
        """
        read = self._read_summary()
        if read is not None and (_is_current(read) or not _is_ledger(self._ledger)):
            return read
        return summary_of(self._history)

    @functools.cached_property
    def curve(self) -> ArrayTable:
        """Return a row for each evaluated version; NaN where a value is missing or not finite.

        Columns: ``version``; ``wall_s``, seconds from the start to the evaluation's end; at the
        commit of the version, ``bytes_up`` and ``bytes_down``, bytes of all results and scores,
        and of all tasks and evaluations, and ``results_used``, the number of results in the model;
        ``staleness``, the mean of the version's results, in versions; ``accuracy``, ``loss``, and
        every other metric by its name. A metric with the name of a column is ``metrics.NAME``.
        """
        rows = []
        for point in self.summary["curve"]:
            others = point.get("metrics", {})
            named = {f"metrics.{key}" if key in CURVE else key: others[key] for key in others}
            row = {**{name: point.get(name) for name in CURVE}, **named}
            rows.append({name: each if _is_finite(each) else None for name, each in row.items()})
        return ArrayTable.of_rows(rows, "evaluation", CURVE)

    @functools.cached_property
    def clients(self) -> ArrayTable:
        """Return a row for each client that got a task or an evaluation.

        Columns: ``client``; ``tasks``, the number of its tasks; ``used``, the number of its results
        in the model; and the metrics of its newest evaluation on its own test data, if the
        algorithm has the clients evaluate.

        Raises:
            LedgerError: the ledger is missing or damaged.
        """
        history = self._history
        metrics: dict[int, Mapping[str, float]] = {}
        for point in history.curve:
            for address, each in point.clients.items():
                client = client_of(address)
                if client is not None:
                    metrics[client] = each
        records = history.outcomes.clients
        rows = [
            {
                "client": client,
                "tasks": records[client].tasks if client in records else 0,
                "used": records[client].good if client in records else 0,
                **metrics.get(client, {}),
            }
            for client in sorted({*records, *metrics})
        ]
        return ArrayTable.of_rows(rows, "client", ("client", "tasks", "used"))

    @functools.cached_property
    def trace(self) -> RunTrace:
        """Return the messages of the run, to iterate over."""
        return RunTrace(self.folder, self._run_id)

    @functools.cached_property
    def config(self) -> Config:
        """Return the complete configuration, without the run's id.

        Raises:
            ConfigError: the configuration cannot be read.
        """
        file = usable_config(self.folder)
        if file is not None:
            return load_config(file, recorded=True)
        config = parse(self._history.config)
        return config.model_copy(update={"run": config.run.model_copy(update={"id": ""})})

    def model(self) -> dict[str, Tensor]:
        """Return the final model, for ``module.load_state_dict(run.model(), strict=True)``.

        For an algorithm whose model is not the problem's module, the tensors of the algorithm by
        name.

        Raises:
            NodeError: the run has no final model (yet), or the file is damaged.
        """
        from fedmq.nodes.run_folder.model_files import MODEL_FILE, read_state_dict

        if not (self.folder / MODEL_FILE).exists():
            versions = plural(int(self.summary["versions"]), "version")
            raise NodeError(
                f"{self.folder} has no {MODEL_FILE}, which is written when the run finishes: it is "
                f"{self.status} after {versions}; resume it with the same configuration and folder"
            )
        return read_state_dict(self.folder)

    def to_pandas(self) -> Any:
        """Return the curve as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        return self.curve.to_pandas()

    def __repr__(self) -> str:
        try:
            facts = ", ".join(_facts(self.summary))
        except Exception as error:  # noqa: BLE001 - printing an object must not fail
            facts = f"cannot be read: {error}"
        return f"<fedmq run {self.folder}: {facts}>"

    # ----

    @property
    def _ledger(self) -> Path:
        return self.folder / "ledger"

    @functools.cached_property
    def _history(self) -> RunHistory:
        try:
            runs = runs_of(read_entries(self._ledger), begun_at(self.folder))
        except LedgerDamage as error:
            raise error.advise(check_advice(self.folder)) from None
        if self._run_id in runs:
            return runs[self._run_id]
        names = ", ".join(runs) or "no run"
        if self._run_id or len(runs) != 1:
            asked = f"got {self._run_id!r}" if self._run_id else "choose one with run_id"
            raise ConfigError(f"expected one run of the ledger in {self.folder} ({names}), {asked}")
        return next(iter(runs.values()))

    def _read_summary(self) -> dict[str, Any] | None:
        """Return the content of ``summary.json``, if there is one of this run."""
        file = self.folder / SUMMARY_FILE
        try:
            read = json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {reason_of(error)}") from None
        except ValueError as error:
            raise ConfigError(f"cannot read {file}: it is not JSON: {error}") from None
        if not isinstance(read, dict) or not read.keys() >= _KEYS:
            raise ConfigError(f"cannot read {file}: expected the keys {', '.join(sorted(_KEYS))}")
        return read if self._run_id in ("", read.get("run")) else None


def load(folder: str | Path, run_id: str = "") -> Run:
    """Return the run in a folder, also while it runs.

    Args:
        folder: of the run.
        run_id: of the run, if the ledger in the folder has several.

    Raises:
        ConfigError: the folder has neither a ledger nor a summary.
    """
    return Run(usable_path(folder, "the folder of a run"), run_id)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _is_ledger(folder: Path) -> bool:
    return any(folder.glob("*.log")) and (folder.name == "ledger")


def _is_current(summary: Mapping[str, Any]) -> bool:
    """Return whether this release has written a summary: older ones have shorter curves."""
    return all(name in point for point in summary["curve"] for name in CURVE)


def _facts(summary: Mapping[str, Any]) -> list[str]:
    final, best = summary["final_accuracy"], summary.get("best_accuracy")
    sizes = summary["bytes"]
    facts = [
        f"{summary['algorithm'] or 'no algorithm yet'}, {summary['schedule'] or 'no schedule yet'}",
        summary["status"],
        plural(summary["versions"], "version"),
    ]
    if final is not None:
        facts.append(f"accuracy {final:.2%}" + ("" if best is None else f" (best {best:.2%})"))
    return [
        *facts,
        f"{plural(summary['results']['used'], 'result')} used",
        f"{size_text(sizes['up']['payload'])} up, {size_text(sizes['down']['payload'])} down",
        f"{'simulated ' if SIMULATED_IN_S in summary else ''}{duration(summary['wall_s'])}",
    ]
