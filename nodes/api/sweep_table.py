"""The results of a sweep as a table: one row for each run, or means over seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedmq.nodes.api.sweep_grid import SEED, short_names, value_text
from fedmq.nodes.process.terminal import WIDTH, duration, fitted, plain, size_text, table

FINISHED = "finished"
FIGURES = (
    *("status", "versions", "accuracy", "best_accuracy", "loss"),
    *("wall_s", "bytes_up", "bytes_down", "results_used"),
)
"""Columns of a run after its settings; its other metrics come after them."""
_REASON = 500
"""Characters of a failed run's reason, at most."""


def row_of(
    settings: Mapping[str, Any], status: str, summary: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the row of one run: settings, figures, and other metrics of the last evaluation.

    Args:
        settings: values by key.
        status: of the run.
        summary: of the run; None if it has none.
    """
    row = {**{key: _cell(value) for key, value in settings.items()}, "status": status}
    if summary is None:
        return row
    metrics = summary.get("metrics", {})
    row |= {
        "versions": summary["versions"],
        "accuracy": summary["final_accuracy"],
        "best_accuracy": summary.get("best_accuracy"),
        "loss": metrics.get("loss"),
        "wall_s": summary["wall_s"],
        "bytes_up": summary["bytes"]["up"]["payload"],
        "bytes_down": summary["bytes"]["down"]["payload"],
        "results_used": summary["results"]["used"],
    }
    others = {key: each for key, each in metrics.items() if key not in ("accuracy", "loss")}
    taken = {*row, *FIGURES}
    return row | {f"metrics.{key}" if key in taken else key: others[key] for key in others}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a head; a missing value is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return the table for a terminal: mean and standard deviation over the seeds of finished runs.

    Args:
        rows: of all runs.
        keys: that were varied.
    """
    names = short_names(keys)
    shown = [key for key in keys if key != SEED]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        text = ", ".join(f"{names[key]} {value_text(row[key])}" for key in shown) or "all"
        groups.setdefault(plain(text, WIDTH), []).append(row)
    metric = _metric(rows, keys)
    percent = metric == "accuracy"
    head = ["", "runs", metric or "metric", *(["best"] if percent else [])]
    head += ["used", "time", "up", "down"]
    body = []
    for text, members in groups.items():
        done = [each for each in members if each["status"] == FINISHED]
        count = str(len(done)) if len(done) == len(members) else f"{len(done)} of {len(members)}"
        cells = [text, count, _spread(_known(done, metric), percent=percent)]
        if percent:
            cells.append(_percent(_mean(_known(done, "best_accuracy"))))
        used, seconds = (_mean(_known(done, name)) for name in ("results_used", "wall_s"))
        sizes = [_mean(_known(done, name)) for name in ("bytes_up", "bytes_down")]
        cells += [
            _number(used),
            "-" if seconds is None else duration(seconds),
            *map(size_text, sizes),
        ]
        body.append(cells)
    return table(head, body, width=WIDTH)


def failure_lines(failures: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the lines on runs that have not finished; those with one reason share a line.

    Args:
        failures: status and reason by name.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, failure in failures.items():
        groups.setdefault(failure, []).append(name)
    found = []
    for (status, reason), names in groups.items():
        why = f": {plain(reason, _REASON)}" if reason else ""
        more = "" if len(names) == 1 else f" and {len(names) - 1} more"
        found += fitted(f"{status}{why} ({names[0]}{more})")
    return found


def _cell(value: Any) -> Any:
    """Return a setting as a number or a text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else value_text(value)


def _metric(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Return the first metric that a run has; "" if none has any."""
    others = [name for row in rows for name in row if name not in {*keys, *FIGURES}]
    names = ("accuracy", "loss", *others)
    return next((name for name in names if _known(rows, name)), "")


def _known(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return the finite values of a column."""
    values = [row.get(name) for row in rows]
    return [float(each) for each in values if isinstance(each, int | float) and math.isfinite(each)]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spread(values: Sequence[float], *, percent: bool) -> str:
    """Return the mean, and with several values their standard deviation."""
    mean = _mean(values)
    if mean is None:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else None
    if percent:
        return f"{_percent(mean)}" if deviation is None else f"{mean:.2%} ± {100 * deviation:.2f}"
    return f"{mean:.4g}" if deviation is None else f"{mean:.4g} ± {deviation:.2g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
