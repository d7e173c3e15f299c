"""Progress of a run: a live view on a terminal, plain lines elsewhere; and the closing table."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedmq.nodes.history.facts import SentTask
from fedmq.nodes.history.outcomes import IN_FLIGHT, LastFailure
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.history.tracker import NodeState
from fedmq.nodes.process.terminal import (
    clients_in_words,
    duration,
    fitted,
    plain,
    plural,
    ranges_in_words,
    size_text,
)
from fedmq.nodes.run.config import parse

_PLAIN_EVERY_S = 5.0
_SAME_EVERY_S = 60.0
_QUIET_S = 4.0
"""Seconds without a ledger entry after which the view shows the clients that the run waits for."""
_LONGEST = 1000
"""Characters of the reason why a run ended, at most."""
_NAMED = 10
"""Groups of clients without a result, at most."""
_REASON = 300
"""Characters of the last failure, at most."""
_LEAST_COLUMNS = 20
"""Columns of a value, at least, however narrow the terminal is."""
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-~=+*#"
_LIVE_EVERY_S = 0.125


class LiveView:
    """Shows the progress of a run; a context manager.

    An error in the view does not end the run: it is reported once, and the view is simplified or
    left out.

    Args:
        console: a terminal gets the live view, anything else plain lines.
        title: one line on the run.
        report: gets the sentence on an error in the view.
    """

    evaluation_every_s = 0.0
    """Least time between plain lines that show new evaluations, in seconds."""

    def __init__(self, console: Console, title: str, report: Callable[[str], None]) -> None:
        self._console = console
        self._title = title
        self._report = report
        self._live: Live | None = None
        self._lines = True
        self._points = 0
        self._drawn_at = 0.0
        self._shown_at = time.monotonic()
        self._shown: tuple[object, ...] = ()
        self._last_entry: float | None = None
        self._changed_at = time.monotonic()

    def __enter__(self) -> LiveView:
        try:
            self._console.print(self._title, highlight=False, soft_wrap=True, markup=False)
            if self._console.is_terminal:
                # `show` draws it: an error in a thread of rich would go unnoticed.
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
        except Exception as error:  # noqa: BLE001 - no error in the view ends a run
            self._simplify(error)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop_live()

    def show(self, history: RunHistory) -> None:
        """Update the view."""
        now = time.monotonic()
        if history.now != self._last_entry:
            self._last_entry, self._changed_at = history.now, now
        waits = now - self._changed_at >= _QUIET_S
        try:
            if self._live:
                if now - self._drawn_at >= _LIVE_EVERY_S:
                    self._live.update(self.render(history, waits=waits), refresh=True)
                    self._drawn_at = now
            elif self._lines:
                self._show_line(history, now, waits=waits)
        except Exception as error:  # noqa: BLE001 - no error in the view ends a run
            self._simplify(error)

    def render(self, history: RunHistory, *, waits: bool) -> RenderableType:
        """Return the live view; ``waits``: the ledger has not grown for a while."""
        return render(history, self.bars, waits=waits)

    def line(self, history: RunHistory, *, waits: bool) -> str:
        """Return a plain line."""
        return line(history, waits=waits)

    @property
    def bars(self) -> str:
        """Return the characters for accuracies from low to high."""
        return _BARS if self._console.encoding.startswith("utf") else _ASCII_BARS

    def _show_line(self, history: RunHistory, now: float, *, waits: bool) -> None:
        since, state = now - self._shown_at, (history.now, waits)
        due = since >= (_PLAIN_EVERY_S if state != self._shown else _SAME_EVERY_S)
        if due or (len(history.curve) > self._points and since >= self.evaluation_every_s):
            self._points, self._shown_at, self._shown = len(history.curve), now, state
            text = self.line(history, waits=waits)
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _simplify(self, error: Exception) -> None:
        """Replace the live view by plain lines, and plain lines by nothing."""
        if self._live:
            self._stop_live()
            self._report(f"fedmq: the live view failed: {error!r}; printing plain lines instead")
        else:
            self._lines = False
            self._report(f"fedmq: the view failed: {error!r}; the run continues without it")

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception):  # it only clears the screen
                live.stop()


def render(history: RunHistory, bars: str = _BARS, *, waits: bool = False) -> RenderableType:
    """Return the live view of a run.

    Args:
        history: of the run.
        bars: characters for accuracies from low to high.
        waits: whether the ledger has not grown for a while.
    """
    head = Table.grid(padding=(0, 2))
    known = figures(history)
    head.add_row(*(Text(name, style="dim") for name in known))
    head.add_row(*(Text(value, style="bold") for value in known.values()))
    nodes = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column in ("node", "state", "done", "failed"):
        nodes.add_column(column, justify="right" if column in ("done", "failed") else "left")
    at_work = history.at_work
    for name, node in sorted(history.nodes.items()):
        nodes.add_row(
            name, _state(node, at_work.get(name, [])), str(node.tasks or ""), str(node.drops or "")
        )
    found = warnings(history, waits=waits)
    lines = [Text(f"{name} {value}", style="red") for name, value in found.items()]
    return Group(head, *lines, Text(sparkline(history, bars), style="green"), nodes)


def line(history: RunHistory, *, waits: bool = False) -> str:
    """Return one line on a run's state; ``waits``: the ledger has not grown for a while."""
    return in_one_line({**figures(history), **warnings(history, waits=waits)})


def in_one_line(known: Mapping[str, str]) -> str:
    """Return names and values as one line."""
    return "  ".join(f"{name} {value}" for name, value in known.items())


@dataclass(frozen=True)
class ClosingTable:
    """Rows of a name and a value; a name that is empty continues the row above.

    A terminal gets lines that fit; a pipe or a file gets one line for each row.
    """

    rows: list[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines, for rich."""
        indent = max(len(name) for name, _ in self.rows) + 2
        width = max(options.max_width - indent, _LEAST_COLUMNS) if console.is_terminal else None
        for name, value in self.rows:
            first, *rest = [value] if width is None else fitted(value, "", width)
            yield Text.assemble((name.ljust(indent), "dim"), first)
            yield from (Text(" " * indent + each) for each in rest)


def closing_table(summary: Mapping[str, Any]) -> ClosingTable:
    """Return the table that a command prints at the end of a run."""
    results, sizes = summary["results"], summary["bytes"]
    rows = [("run", summary["run"] or "-"), ("status", summary["status"])]
    if summary["ended"]:
        rows.append(("ended", plain(summary["ended"], _LONGEST)))
    used = f"{results['used']} used, {results['stale']} stale"
    accuracy, best = _percent(summary["final_accuracy"]), _percent(summary["best_accuracy"])
    rows += [
        ("algorithm", f"{summary['algorithm'] or '-'}, {summary['schedule'] or '-'}"),
        ("versions", str(summary["versions"])),
        ("accuracy", f"{accuracy} (best {best}){_of_version(summary)}"),
        ("results", f"{used}, {results['refused']} rejected, {results['unused']} unused"),
        *_problems(summary),
        ("time", f"{_time(summary)}, first task after {_seconds(summary['first_task_s'])}"),
    ]
    least = "at least " if sizes.get("wire_at_least") else ""  # missing in older summaries
    for way in ("down", "up"):
        payload, wire = size_text(sizes[way]["payload"]), size_text(sizes[way]["wire"])
        rows.append((f"bytes {way}", f"{payload} payload, {least}{wire} on the wire"))
    rows.append(("model", summary["model_digest"] or "-"))
    clients = summary.get("clients")
    if clients:
        mean, worst, spread = (_percent(clients[key]) for key in ("mean", "worst_decile", "std"))
        rows.append(("clients", f"mean {mean}, worst tenth {worst}, spread {spread}"))
    return ClosingTable(rows)


def _problems(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on failures and rejections; none if there were none."""
    results, rounds = summary["results"], summary["rounds"]
    rows = []
    if results["refused"] or results["stale"]:
        rows.append(("reasons", _by_code(results["by_code"])))
    if results["failed"]:
        tasks = plural(results["failed"], "task")
        rows.append(("failed", f"{tasks}: {_by_code(results['failed_by_code'])}"))
    if results["failed_evaluations"]:
        rows.append(("evaluations", f"{results['failed_evaluations']} failed"))
    last = summary["last_failure"]
    if last is not None and rows:
        rows.append(("last failure", plain(_failure(LastFailure(**last)), _REASON)))
    if results["unaccepted"]:
        messages = plural(results["unaccepted"], "message")
        rows.append(("not accepted", f"{messages}, rejected by the broker: see the logs"))
    if rounds is not None:
        whole = f"{rounds['whole']} of {rounds['versions']} complete"
        missing = f"{rounds['missing']} of {rounds['wanted']} results missing"
        rows.append(("rounds", f"{whole}, {missing}"))
    if summary["disagreeing"]:
        nodes = ", ".join(summary["disagreeing"])
        text = f"different on {nodes}: model() must return the same values on every node"
        rows.append(("first model", text))
    return rows + _clients_without_result(summary)


def _clients_without_result(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    groups: dict[tuple[int, str], list[int]] = {}
    # A summary of an earlier release names all clients.
    left = summary.get("more_clients_without_result", 0)
    for client, each in summary["clients_without_result"].items():
        if each["tasks"] == 1 and each["code"] in IN_FLIGHT and summary["ended"]:
            left = 0  # the summary names the clients that failed first
            continue  # no failure: the run ended before its first task did
        groups.setdefault((each["tasks"], each["reason"]), []).append(int(client))
    rows = []
    left += sum(map(len, list(groups.values())[_NAMED:]))
    for number, ((tasks, reason), clients) in enumerate(list(groups.items())[:_NAMED]):
        given = plural(tasks, "task") + (" each" if len(clients) > 1 else "")
        last = f"last: {plain(reason, 100)}"
        rows.append(
            ("" if number else "no result", f"{clients_in_words(clients, 60)}: {given}, {last}")
        )
    if left and rows:
        rows.append(("", f"and {plural(left, 'more client')}"))
    return rows


def _of_version(summary: Mapping[str, Any]) -> str:
    """Return the version of the final accuracy, if it is not the newest version."""
    curve = summary["curve"]
    if not curve or curve[-1]["version"] == summary["versions"]:
        return ""
    return f", of version {curve[-1]['version']}"


def _by_code(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{plain(code) or 'unknown'} {number}" for code, number in counts.items())


def figures(history: RunHistory) -> dict[str, str]:
    """Return the figures of a run by name; "-" where a value is unknown."""
    begun, newest = history.begun, history.newest
    accuracy = _percent(history.accuracy)
    if newest is not None and newest.accuracy is not None:
        of = [f"v{newest.version}"] if newest.version != history.version else []
        of += [f"{len(newest.clients)} of {newest.asked} clients"] if newest.is_partial else []
        accuracy += f" ({', '.join(of)})" if of else ""
    cohort = history.outcomes.cohorts.last
    found = {
        "time": f"{history.wall_s:5.1f} s" if history.now is not None else "-",
        "version": f"{history.version}" if begun else "-",
        "accuracy": accuracy,
        "used": f"{history.outcomes.used}",
        "stale": f"{history.outcomes.stale}",
    }
    if begun and _schedule(history.config) == "rounds":
        found["cohort"] = "-" if cohort is None else f"{cohort[0]} of {cohort[1]}"
    else:
        known = history.mean_staleness
        found["staleness"] = "-" if known is None else f"{known:.1f}"
    return {**found, "down": size_text(history.payload_down), "up": size_text(history.payload_up)}


def warnings(history: RunHistory, *, waits: bool) -> dict[str, str]:
    """Return by name failures, rejections and the clients that the run waits for."""
    outcomes = history.outcomes
    counts = {
        "rejected": outcomes.refused,
        "failed": outcomes.failed.total(),
        "failed evaluations": outcomes.failed_evaluations,
    }
    found = {name: str(number) for name, number in counts.items() if number}
    if found and outcomes.last is not None:
        found["last failure:"] = plain(_failure(outcomes.last), _REASON)
    if history.disagreeing:
        found["different first model on"] = ", ".join(history.disagreeing)
    if waits and (missing := history.missing_clients):
        found["waiting for"] = ranges_in_words(missing)
    elif waits and (working := history.working_clients):
        found["waiting for"] = f"results of {clients_in_words(working)}"
    return found


def _failure(last: LastFailure) -> str:
    of = "" if last.client is None else f" of client {last.client}"
    place = f" ({last.where})" if last.where else ""
    return f"{last.what}{of}: {last.reason}{place}"


@functools.lru_cache(maxsize=1)
def _schedule(config: str) -> object:
    return parse(config).schedule["name"]


def _state(node: NodeState, tasks: Sequence[SentTask]) -> Text:
    if not node.here:
        return Text("left", style="red")
    if not tasks:
        return Text("ready", style="dim")
    more = f" and {len(tasks) - 1} waiting" if len(tasks) > 1 else ""
    return Text(f"{tasks[0].to}{more}", style="cyan")


def sparkline(history: RunHistory, bars: str) -> str:
    """Return a bar for each of the newest accuracies."""
    known = (point.accuracy for point in history.curve if point.accuracy is not None)
    values = [value for value in known if math.isfinite(value)][-60:]
    return "".join(bars[max(0, min(7, int(value * 8)))] for value in values)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _time(summary: Mapping[str, Any]) -> str:
    """Return how long a run took; of a simulated run, both times."""
    if "simulated_in_s" not in summary:
        return f"{summary['wall_s']:.1f} s"
    real = summary["simulated_in_s"]
    return f"simulated {duration(summary['wall_s'])}" + (f" in {duration(real)}" if real else "")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
