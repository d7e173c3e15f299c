"""What a person sees of a run: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedmq.nodes.outcomes import NO_ANSWER, UNUSED
from fedmq.nodes.summary import NodeState, RunFold
from fedmq.nodes.trace.text import plain, plural, spans

_PLAIN_EVERY_S = 5.0
_NAMED = 10
"""Groups of clients without a result that are named; the summary has all."""
_BARS = "▁▂▃▄▅▆▇█"


class View:
    """Shows a run while it goes on; a context manager.

    Args:
        console: where to; a terminal gets the live view.
        title: what runs, in one line.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._live = (
            Live(console=console, refresh_per_second=8, transient=True)
            if console.is_terminal
            else None
        )
        self._points = 0
        self._last_line = 0.0

    def __enter__(self) -> View:
        self._console.print(self._title, highlight=False, soft_wrap=True)
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, fold: RunFold) -> None:
        """Bring the view up to date."""
        if self._live:
            self._live.update(render(fold))
            return
        fresh = len(fold.curve) > self._points
        if fresh or fold.wall_s - self._last_line >= _PLAIN_EVERY_S:
            self._points, self._last_line = len(fold.curve), fold.wall_s
            self._console.print(line(fold), highlight=False, soft_wrap=True)


def render(fold: RunFold) -> RenderableType:
    """Return the live view of a run."""
    head = Table.grid(padding=(0, 2))
    head.add_row(*(Text(name, style="dim") for name in _figures(fold)))
    head.add_row(*(Text(value, style="bold") for value in _figures(fold).values()))
    nodes = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column in ("node", "state", "done", "dropped"):
        nodes.add_column(column, justify="right" if column in ("done", "dropped") else "left")
    for name, node in sorted(fold.nodes.items()):
        nodes.add_row(name, _state(node), str(node.tasks or ""), str(node.drops or ""))
    trouble = [Text(f"{name} {value}", style="red") for name, value in _trouble(fold).items()]
    return Group(head, *trouble, Text(_sparkline(fold), style="green"), nodes)


def line(fold: RunFold) -> str:
    """Return one line on a run's state."""
    figures = {**_figures(fold), **_trouble(fold)}
    return "  ".join(f"{name} {value}" for name, value in figures.items())


_IN_FLIGHT = (UNUSED, NO_ANSWER)
"""Codes of clients whose task was out, or had just come back, when the run ended."""


def closing_table(summary: Mapping[str, Any]) -> Table:
    """Return the table that a run ends with."""
    results, sizes = summary["results"], summary["bytes"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "run": summary["run"],
        "ended": summary["ended"] or "before its end",
        "algorithm": f"{summary['algorithm']}, {summary['schedule']}",
        "versions": str(summary["versions"]),
        "accuracy": f"{_percent(summary['final_accuracy'])} "
        f"(best {_percent(summary['best_accuracy'])}){_of_version(summary)}",
        "results": ", ".join(
            f"{results[name]} {name}" for name in ("used", "stale", "refused", "unused")
        ),
        **_what_went_wrong(summary),
        "time": f"{summary['wall_s']:.1f} s, first task after {_seconds(summary['first_task_s'])}",
        "bytes down": f"{_size(sizes['down']['payload'])} payload, "
        f"{_size(sizes['down']['wire'])} on the wire",
        "bytes up": f"{_size(sizes['up']['payload'])} payload, "
        f"{_size(sizes['up']['wire'])} on the wire",
        "model": summary["model_digest"] or "-",
    }
    clients = summary.get("clients")
    if clients:
        rows["clients"] = (
            f"{_percent(clients['mean'])} on average, {_percent(clients['worst_decile'])} in the "
            f"worst tenth, spread {_percent(clients['std'])}"
        )
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def _what_went_wrong(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows that a run without trouble does not have."""
    results, rounds = summary["results"], summary["rounds"]
    rows = {}
    if results["refused"] or results["stale"]:
        rows["rejected"] = _by_code(results["by_code"])
    if results["failed"]:
        rows["failed"] = (
            f"{plural(results['failed'], 'task')}: {_by_code(results['failed_by_code'])}"
        )
    if results["unaccepted"]:
        posts = plural(results["unaccepted"], "message")
        rows["not kept"] = f"{posts} that the broker did not accept: see the logs"
    if rounds is not None:
        rows["rounds"] = (
            f"{rounds['whole']} of {rounds['versions']} with their whole cohort, "
            f"{rounds['missing']} of {rounds['wanted']} results missing"
        )
    if summary["disagreeing"]:
        rows["first model"] = (
            f"{', '.join(summary['disagreeing'])} started from other values than the aggregator: "
            "model() must give the same ones on every node"
        )
    groups: dict[tuple[int, str], list[int]] = {}
    for client, each in summary["clients_without_result"].items():
        if each["tasks"] == 1 and each["code"] in _IN_FLIGHT and summary["ended"]:
            continue  # nothing went wrong: the run ended before its first task did
        groups.setdefault((each["tasks"], each["reason"]), []).append(int(client))
    for number, ((tasks, reason), clients) in enumerate(groups.items()):
        if number == _NAMED:
            left = sum(map(len, list(groups.values())[number:]))
            rows["and"] = f"{plural(left, 'more client')} without a result in any version"
            break
        what = f"client{'s' if len(clients) > 1 else ''} {plain(spans(clients), 60)}"
        given = plural(tasks, "task") + (" each" if len(clients) > 1 else "")
        rows[what] = f"{given}, no result in any version; last: {plain(reason, 100)}"
    return rows


def _of_version(summary: Mapping[str, Any]) -> str:
    """Say which version an accuracy is of, where it is not of the newest."""
    curve = summary["curve"]
    if not curve or curve[-1]["version"] == summary["versions"]:
        return ""
    return f", of version {curve[-1]['version']}"


def _by_code(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{plain(code)} {number}" for code, number in counts.items())


def _figures(fold: RunFold) -> dict[str, str]:
    """Return the figures of a run; "-" where nothing is known yet."""
    begun, newest = bool(fold.run), fold.newest
    accuracy = _percent(fold.accuracy)
    if newest is not None and fold.accuracy is not None and newest.version != fold.version:
        accuracy += f" (v{newest.version})"  # of an older version than the one beside it
    cohort = fold.outcomes.cohorts.last
    figures = {
        "time": f"{fold.wall_s:5.1f} s" if fold.now is not None else "-",
        "version": f"{fold.version}" if begun else "-",
        "accuracy": accuracy,
        "used": f"{fold.outcomes.used}",
        "stale": f"{fold.outcomes.stale}",
    }
    if begun and fold.config["schedule"]["name"] == "rounds":
        figures["cohort"] = "-" if cohort is None else f"{cohort[0]} of {cohort[1]}"
    else:
        known = fold.mean_staleness
        figures["staleness"] = "-" if known is None else f"{known:.1f}"
    return {**figures, "down": _size(fold.payload_down), "up": _size(fold.payload_up)}


def _trouble(fold: RunFold) -> dict[str, str]:
    """Return what a run without trouble does not show."""
    counts = {"refused": fold.outcomes.refused, "failed": fold.outcomes.failed.total()}
    found = {name: str(number) for name, number in counts.items() if number}
    if fold.disagreeing:
        found["other first model"] = ", ".join(fold.disagreeing)
    return found


def _state(node: NodeState) -> Text:
    if not node.here:
        return Text("left", style="red")
    if not node.doing:
        return Text("ready", style="dim")
    doing = list(node.doing.values())
    more = f" and {len(doing) - 1} waiting" if len(doing) > 1 else ""
    return Text(f"{doing[0]}{more}", style="cyan")


def _sparkline(fold: RunFold) -> str:
    known = (point.accuracy for point in fold.curve if point.accuracy is not None)
    values = [value for value in known if math.isfinite(value)][-60:]
    return "".join(_BARS[max(0, min(7, int(value * 8)))] for value in values)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
