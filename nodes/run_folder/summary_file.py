"""Write ``summary.json`` in a run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmq.broker.ledger.reader import read_entries
from fedmq.nodes.errors import NodeError
from fedmq.nodes.history.run import RunHistory, runs_of
from fedmq.nodes.process.atomic_write import replacing
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.run_folder.strict_json import to_strict_json
from fedmq.nodes.run_folder.summary import summary_of

SUMMARY_FILE = "summary.json"
SIMULATED_IN_S = "simulated_in_s"
"""Key of a simulated run: the real seconds that it took. All its other times are virtual."""


def write_summary(folder: Path, started_at: float | None = None, run: str = "") -> dict[str, Any]:
    """Write ``summary.json`` in a run's folder, from its ledger.

    Args:
        folder: of the run.
        started_at: start of the run, in seconds since 1970; None if unknown.
        run: id of the run; by default the last of several.

    Raises:
        ConfigError: the recorded configuration cannot be read.
        LedgerError: the ledger is damaged.
        NodeError: the file cannot be written.
    """
    runs = runs_of(read_entries(folder / "ledger"), started_at)
    chosen = runs.get(run or next(reversed(runs), ""), RunHistory(started_at))
    summary = summary_of(chosen)
    save_summary(folder, summary)
    return summary


def remove_summary(folder: Path) -> None:
    """Remove a summary of an earlier state of the run; it is written again at the end.

    Raises:
        NodeError: the file cannot be removed.
    """
    path = folder / SUMMARY_FILE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise NodeError(f"cannot remove {path}: {reason_of(error)}") from None


def recorded_value(folder: Path, key: str) -> Any:
    """Return a value of a folder's summary; None if there is no such file or value."""
    try:
        return json.loads((folder / SUMMARY_FILE).read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def save_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write a summary atomically.

    Raises:
        NodeError: the file cannot be written.
    """
    path = folder / SUMMARY_FILE
    try:
        with replacing(path) as fresh:
            fresh.write_text(to_strict_json(summary))
    except OSError as error:
        raise NodeError(f"cannot write {path}: {reason_of(error)}") from None
