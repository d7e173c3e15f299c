"""What a person sees of a run: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedmq.nodes.summary import NodeState, RunFold

_PLAIN_EVERY_S = 5.0
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
    head = Table.grid(padding=(0, 3))
    head.add_row(*(Text(name, style="dim") for name in _figures(fold)))
    head.add_row(*(Text(value, style="bold") for value in _figures(fold).values()))
    nodes = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column in ("node", "state", "done", "dropped"):
        nodes.add_column(column, justify="right" if column in ("done", "dropped") else "left")
    for name, node in sorted(fold.nodes.items()):
        nodes.add_row(name, _state(node), str(node.tasks or ""), str(node.drops or ""))
    return Group(head, Text(_sparkline(fold), style="green"), nodes)


def line(fold: RunFold) -> str:
    """Return one line on a run's state."""
    return "  ".join(f"{name} {value}" for name, value in _figures(fold).items())


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
        f"(best {_percent(summary['best_accuracy'])})",
        "results": f"{results['used']} used, {results['stale']} stale, "
        f"{results['refused']} refused",
        "time": f"{summary['wall_s']:.1f} s, first task after {summary['first_task_s']:.1f} s",
        "bytes down": f"{_size(sizes['down']['payload'])} payload, "
        f"{_size(sizes['down']['wire'])} on the wire",
        "bytes up": f"{_size(sizes['up']['payload'])} payload, "
        f"{_size(sizes['up']['wire'])} on the wire",
        "model": summary["model_digest"] or "-",
    }
    if summary["disagreeing"]:
        rows["first model"] = (
            f"{', '.join(summary['disagreeing'])} started from other values than the aggregator: "
            "model() must give the same ones on every node"
        )
    clients = summary.get("clients")
    if clients:
        rows["clients"] = (
            f"{_percent(clients['mean'])} on average, {_percent(clients['worst_decile'])} in the "
            f"worst tenth, spread {_percent(clients['std'])}"
        )
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def _figures(fold: RunFold) -> dict[str, str]:
    return {
        "time": f"{fold.wall_s:5.1f} s",
        "version": f"{fold.version}",
        "accuracy": _percent(fold.accuracy),
        "used": f"{fold.used}",
        "stale": f"{fold.stale}",
        "staleness": f"{fold.mean_staleness:.1f}",
        "down": _size(fold.payload_down),
        "up": _size(fold.payload_up),
        **({"other first model": ", ".join(fold.disagreeing)} if fold.disagreeing else {}),
    }


def _state(node: NodeState) -> Text:
    if not node.here:
        return Text("left", style="red")
    if not node.doing:
        return Text("ready", style="dim")
    doing = list(node.doing.values())
    more = f" and {len(doing) - 1} waiting" if len(doing) > 1 else ""
    return Text(f"{doing[0]}{more}", style="cyan")


def _sparkline(fold: RunFold) -> str:
    values = [point.accuracy or 0.0 for point in fold.curve][-60:]
    return "".join(_BARS[min(7, int(value * 8))] for value in values)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
