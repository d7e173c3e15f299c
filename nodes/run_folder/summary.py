"""Content of ``summary.json``: counts, curve, nodes and clients of a run."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedmq.nodes.history.curve import CurvePoint, Totals
from fedmq.nodes.history.outcomes import (
    IN_FLIGHT,
    NO_ANSWER,
    UNUSED,
    ClientRecord,
    Cohorts,
    Outcomes,
)
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.run.config import parse
from fedmq.nodes.run_folder.strict_json import not_finite

_OWN_KEYS = ("accuracy", "loss")
"""Metrics that have a key of their own in the curve; it is null for a problem without them."""
_NAMED_CLIENTS = 100
"""Clients without a result that the summary names, at most: a run can have a million."""
_REASONS: Mapping[str, str] = {UNUSED: "its result is in no version", NO_ANSWER: "no answer"}


def summary_of(history: RunHistory) -> dict[str, Any]:
    """Return the content of ``summary.json``, in which NaN and infinities become null.

    ``not_finite``, if present, lists those values.

    Raises:
        ConfigError: the recorded configuration cannot be read.
    """
    # Without the aggregator's first record: the run was stopped before it was written.
    config = parse(history.config).model_dump() if history.begun else {}
    outcomes, newest, first = history.outcomes, history.newest, history.first_task_s
    without_result = outcomes.without_result
    down, up = (
        # The broker records the bytes on the wire at the end of the run.
        {"payload": payload, "wire": None if history.ended is None else wire}
        for payload, wire in (
            (history.payload_down, history.wire_down),
            (history.payload_up, history.wire_up),
        )
    )
    summary = {
        "run": history.run if history.begun else "",
        "algorithm": config.get("algorithm", {}).get("name"),
        "schedule": config.get("schedule", {}).get("name"),
        "codec": config.get("codec"),
        "seed": config.get("run", {}).get("seed"),
        "versions": history.version,
        "results": _results(outcomes),
        "rounds": _rounds(outcomes.cohorts),
        "clients_without_result": _named(without_result),
        "more_clients_without_result": max(0, len(without_result) - _NAMED_CLIENTS),
        "final_accuracy": history.accuracy,
        "metrics": newest.metrics if newest is not None else {},
        "best_accuracy": history.best_accuracy,
        "curve": [_point(each, history.totals.at(each.version)) for each in history.curve],
        "wall_s": round(history.wall_s, 3),
        "first_task_s": None if first is None else round(first, 3),
        "bytes": {
            "down": down,
            "up": up,
            "kinds": history.groups,
            "wire_at_least": history.wire_at_least and history.ended is not None,
        },
        "model_digest": history.model_digest,
        "nodes": {
            name: {"sessions": node.sessions, "tasks": node.tasks, "drops": node.drops}
            for name, node in history.nodes.items()
        },
        "status": history.status,
        "ended": history.ended,
        "last_failure": None if outcomes.last is None else vars(outcomes.last),
        "disagreeing": history.disagreeing,
    }
    answers = newest.clients.values() if newest is not None else ()
    if known := [each["accuracy"] for each in answers if "accuracy" in each]:
        summary["clients"] = spread(known)
    if strange := not_finite(summary):
        summary["not_finite"] = strange
    return summary


def _named(without_result: Mapping[int, ClientRecord]) -> dict[str, dict[str, Any]]:
    """Return the clients that the summary names: those that failed before those in flight."""

    def in_flight_last(client: int) -> tuple[bool, int]:
        each = without_result[client]
        return each.tasks == 1 and each.code in IN_FLIGHT, client

    chosen = heapq.nsmallest(_NAMED_CLIENTS, without_result, key=in_flight_last)
    return {
        str(client): {
            "tasks": each.tasks,
            "code": each.code,
            "reason": each.reason or _REASONS.get(each.code, ""),
        }
        for client, each in ((client, without_result[client]) for client in sorted(chosen))
    }


def _point(point: CurvePoint, totals: Totals | None) -> dict[str, Any]:
    """Return the evaluation of one version, and what the version had cost at its commit."""
    metrics = {name: value for name, value in point.metrics.items() if name not in _OWN_KEYS}
    return {
        "version": point.version,
        "wall_s": round(point.wall_s, 3),
        "bytes_up": None if totals is None else totals.bytes_up,
        "bytes_down": None if totals is None else totals.bytes_down,
        "results_used": None if totals is None else totals.results_used,
        "staleness": None if totals is None else totals.staleness,
        "accuracy": point.accuracy,
        "loss": point.loss,
        # Under a key of their own, because a problem may call a metric "version".
        "metrics": metrics,
    }


def _results(outcomes: Outcomes) -> dict[str, Any]:
    """Return counts of results; ``failed`` counts tasks, and ``unaccepted`` posts."""
    return {
        "used": outcomes.used,
        "stale": outcomes.stale,
        "refused": outcomes.refused,
        "unused": outcomes.unused,
        "failed": outcomes.failed.total(),
        "failed_evaluations": outcomes.failed_evaluations,
        "unaccepted": outcomes.unaccepted,
        "by_code": {code or "unknown": n for code, n in outcomes.rejected.items() if n},
        "failed_by_code": {code or "unknown": n for code, n in outcomes.failed.items() if n},
    }


def _rounds(cohorts: Cohorts) -> dict[str, int] | None:
    """Return the completeness of cohorts, if the run has synchronous rounds."""
    if not cohorts.versions:
        return None
    return {
        "versions": cohorts.versions,
        "whole": cohorts.whole,
        "wanted": cohorts.wanted,
        "missing": cohorts.missing,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, worst_decile (mean of the lowest tenth, at least one), std and count.

    They include the finite values only; ``not_finite``, if present, is the number of the others.
    """
    finite = sorted(filter(math.isfinite, values))
    others = {"not_finite": len(values) - len(finite)} if len(finite) < len(values) else {}
    if not finite:
        return {"mean": math.nan, "worst_decile": math.nan, "std": math.nan, "count": 0, **others}
    return {
        "mean": statistics.fmean(finite),
        "worst_decile": statistics.fmean(finite[: max(1, len(finite) // 10)]),
        "std": statistics.pstdev(finite),
        "count": len(finite),
        **others,
    }
