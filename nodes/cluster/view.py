"""What a person sees of a run: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedmq.broker.rejections import Code
from fedmq.nodes.process.terminal import clients_in_words, plain, plural, spans
from fedmq.nodes.run_folder.outcomes import NO_ANSWER, UNUSED, LastFailure
from fedmq.nodes.run_folder.summary import NodeState, RunFold

_PLAIN_EVERY_S = 5.0
_SAME_EVERY_S = 60.0
_QUIET_S = 4.0
"""After so long without news, it is said which clients a run waits for."""
_LONGEST = 1000
"""Characters of the reason for which a run ended, in the closing table."""
_NAMED = 10
"""Groups of clients without a result that are named; the summary has all."""
_REASON = 300
"""Characters of the newest failure that are shown."""
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-~=+*#"
_LIVE_EVERY_S = 0.125


class LiveView:
    """Shows a run while it goes on; a context manager.

    Whatever cannot be shown is left out, once with the reason: a run does not end for it.

    Args:
        console: where to; a terminal gets the live view.
        title: what runs, in one line.
        say: tells what went wrong with the view.
    """

    def __init__(self, console: Console, title: str, say: Callable[[str], None]) -> None:
        self._console = console
        self._title = title
        self._say = say
        self._live: Live | None = None
        self._lines = True
        self._points = 0
        self._drawn_at = 0.0
        self._shown_at = time.monotonic()
        self._shown: tuple[object, ...] = ()
        self._news: float | None = None
        self._news_at = time.monotonic()

    def __enter__(self) -> LiveView:
        try:
            self._console.print(self._title, highlight=False, soft_wrap=True, markup=False)
            if self._console.is_terminal:
                # Drawn by `show`: what goes wrong in a thread of rich's own would end unseen.
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
        except Exception as error:  # noqa: BLE001 - a run does not end for its view
            self._give_up(error)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop_live()

    def show(self, fold: RunFold) -> None:
        """Bring the view up to date."""
        now = time.monotonic()
        if fold.now != self._news:
            self._news, self._news_at = fold.now, now
        waits = now - self._news_at >= _QUIET_S
        try:
            if self._live:
                if now - self._drawn_at >= _LIVE_EVERY_S:
                    self._live.update(render(fold, self._bars(), waits=waits), refresh=True)
                    self._drawn_at = now
            elif self._lines:
                self._show_line(fold, now, waits=waits)
        except Exception as error:  # noqa: BLE001 - a run does not end for its view
            self._give_up(error)

    def _show_line(self, fold: RunFold, now: float, *, waits: bool) -> None:
        since, state = now - self._shown_at, (fold.now, waits)
        due = since >= (_PLAIN_EVERY_S if state != self._shown else _SAME_EVERY_S)
        if due or len(fold.curve) > self._points:
            self._points, self._shown_at, self._shown = len(fold.curve), now, state
            self._console.print(
                line(fold, waits=waits), highlight=False, soft_wrap=True, markup=False
            )

    def _bars(self) -> str:
        return _BARS if self._console.encoding.startswith("utf") else _ASCII_BARS

    def _give_up(self, error: Exception) -> None:
        """Go on with plain lines, or, if those cannot be shown, without."""
        if self._live:
            self._stop_live()
            self._say(f"fedmq: the live view failed: {error!r}; lines instead")
        else:
            self._lines = False
            self._say(f"fedmq: the view failed: {error!r}; the run goes on without it")

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception):  # it only clears what it has drawn
                live.stop()


def render(fold: RunFold, bars: str = _BARS, *, waits: bool = False) -> RenderableType:
    """Return the live view of a run.

    Args:
        fold: of the run.
        bars: from low to high, for the accuracy.
        waits: whether nothing has happened for a while.
    """
    head = Table.grid(padding=(0, 2))
    head.add_row(*(Text(name, style="dim") for name in _figures(fold)))
    head.add_row(*(Text(value, style="bold") for value in _figures(fold).values()))
    nodes = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column in ("node", "state", "done", "failed"):
        nodes.add_column(column, justify="right" if column in ("done", "failed") else "left")
    for name, node in sorted(fold.nodes.items()):
        nodes.add_row(name, _state(node), str(node.tasks or ""), str(node.drops or ""))
    known = _trouble(fold, waits=waits)
    trouble = [Text(f"{name} {value}", style="red") for name, value in known.items()]
    return Group(head, *trouble, Text(_sparkline(fold, bars), style="green"), nodes)


def line(fold: RunFold, *, waits: bool = False) -> str:
    """Return one line on a run's state; ``waits``: nothing has happened for a while."""
    figures = {**_figures(fold), **_trouble(fold, waits=waits)}
    return "  ".join(f"{name} {value}" for name, value in figures.items())


_IN_FLIGHT = (UNUSED, NO_ANSWER, Code.RUN_OVER)
"""Codes of clients whose task was out, or had just come back, when the run ended."""


def closing_table(summary: Mapping[str, Any]) -> Table:
    """Return the table that a run ends with."""
    results, sizes = summary["results"], summary["bytes"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "run": summary["run"] or "-",
        "status": summary["status"],
        **({"ended": plain(summary["ended"], _LONGEST)} if summary["ended"] else {}),
        "algorithm": f"{summary['algorithm'] or '-'}, {summary['schedule'] or '-'}",
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
    if results["failed_evaluations"]:
        rows["not evaluated"] = f"{plural(results['failed_evaluations'], 'evaluation')} failed"
    last = summary["last_failure"]
    if last is not None and rows:
        rows["last failure"] = plain(LastFailure(**last), _REASON)
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


def _trouble(fold: RunFold, *, waits: bool) -> dict[str, str]:
    """Return what a run without trouble does not show."""
    outcomes = fold.outcomes
    counts = {
        "rejected": outcomes.refused,
        "failed": outcomes.failed.total(),
        "failed evaluations": outcomes.failed_evaluations,
    }
    found = {name: str(number) for name, number in counts.items() if number}
    if found and outcomes.last is not None:
        found["last"] = plain(outcomes.last, _REASON)
    if fold.disagreeing:
        found["other first model"] = ", ".join(fold.disagreeing)
    if waits and (missing := fold.missing_clients):
        found["waiting for"] = clients_in_words(missing)
    elif waits and (working := fold.working_clients):
        found["waiting for"] = f"results of {clients_in_words(working)}"
    return found


def _state(node: NodeState) -> Text:
    if not node.here:
        return Text("left", style="red")
    if not node.doing:
        return Text("ready", style="dim")
    doing = list(node.doing.values())
    more = f" and {len(doing) - 1} waiting" if len(doing) > 1 else ""
    return Text(f"{doing[0]}{more}", style="cyan")


def _sparkline(fold: RunFold, bars: str) -> str:
    known = (point.accuracy for point in fold.curve if point.accuracy is not None)
    values = [value for value in known if math.isfinite(value)][-60:]
    return "".join(bars[max(0, min(7, int(value * 8)))] for value in values)


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
