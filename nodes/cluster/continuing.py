"""Taking up a run again: which command goes on with what a folder holds.

A run is its folder, and the same command goes on with it. What may differ from what was recorded
is said in one table, `MAY_DIFFER`; everything else would make it another run.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from fedmq.broker.core.state import Continuation
from fedmq.nodes.cluster.view import closing_table
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import NONE, Config, changed, load, parse
from fedmq.nodes.run.config_difference import Differences, differences, shown
from fedmq.nodes.run.goal import Goal
from fedmq.nodes.run_folder.folder import (
    Contents,
    Recorded,
    held,
    is_record,
    look_into,
    usable_config,
)
from fedmq.nodes.run_folder.summary_file import SUMMARY_FILE, write_summary

RUNS = Path("runs")
"""Where a run's folder is, if the command names none."""

MAY_DIFFER: Mapping[str, Literal["goal", "here"]] = {
    "run.versions": "goal",
    "run.target_accuracy": "goal",
    "run.failures": "goal",
    "worker": "here",
    "broker": "here",
}
"""Keys, and tables, that may differ when a run is taken up again; docs/configuration.md has them.

goal: what the run is to reach: anything that is not behind it already.
here: how it is run on this host, which decides nothing of what is learned.
"""
_NAMED = ("problem", "algorithm", "schedule")
_SHOWN = 12
"""Keys that are named, where very many differ."""
_ROUNDING = 1e-9
"""A mean over clients was added up in another order by the aggregator."""


@dataclass(frozen=True)
class Asked:
    """What a command asks for, and where.

    config: with the run's id.
    begun: when the run was begun, in seconds since 1970; None if nothing says so.
    contents: of the folder; None if it is new.
    """

    config: Config
    folder: Path
    begun: float | None
    contents: Contents | None

    @property
    def recorded(self) -> Recorded | None:
        """Return what the folder's ledger tells of the run; None if it has not begun."""
        return self.contents.run if self.contents is not None else None


@contextlib.contextmanager
def asking(
    file: Path | None, settings: Sequence[str], folder: Path | None, now: float
) -> Iterator[Asked]:
    """Find out what a command asks for, and keep others out of its folder meanwhile.

    Args:
        file: the configuration that was given. Without one, ``settings`` are applied to that of
            the folder, or else to the defaults.
        settings: ``key=value``.
        folder: of the run; by default named by the run's id.
        now: when the command was given.

    Raises:
        ConfigError: the configuration is unusable; or the folder is that of something else, of
            another run than is asked for, or in use.
        LedgerError: the ledger in the folder is damaged.
    """
    given = _load(file, settings)
    name = given.run.id
    drawn = draw_id()
    folder = folder or RUNS / (name or drawn)
    with held(folder):
        contents = look_into(folder)
        if contents is None:
            yield Asked(called(given, name or drawn), folder, now, None)
            return
        if contents.run is not None and name not in ("", contents.id):
            raise ConfigError(
                f"run.id: {folder} holds run {contents.id}, got {name}: give --run another folder"
            )
        if file is None:
            given = _on_top_of_own(folder, contents, settings) or given
        # What has no run in its ledger was begun in vain, and begins now.
        begun = now if contents.run is None else contents.begun
        yield Asked(called(given, name or contents.id or drawn), folder, begun, contents)


def _load(file: Path | None, settings: Sequence[str]) -> Config:
    """Read what was given; a file that a run left tells of another run than is asked for."""
    recorded = file is not None and is_record(file)
    given = load(file, settings, recorded=recorded)
    asked = any(each.partition("=")[0].strip() == "run.id" for each in settings)
    return called(given, "") if recorded and not asked else given


def _on_top_of_own(folder: Path, contents: Contents, settings: Sequence[str]) -> Config | None:
    """Apply settings to the configuration in a folder; None if it has none."""
    file = usable_config(folder)
    if file is not None:
        return load(file, settings, recorded=True)
    return None if contents.run is None else changed(parse(contents.run.config), settings)


def draw_id() -> str:
    """Return an id for a run that was given none."""
    return time.strftime("%Y%m%d-%H%M%S") + "-" + secrets.token_hex(2)


def called(config: Config, name: str) -> Config:
    """Return a configuration with this id of its run."""
    return config.model_copy(update={"run": config.run.model_copy(update={"id": name})})


def continuation(asked: Asked) -> Continuation | None:
    """Return how a run goes on; None if it has ended, and nothing more is asked for.

    The configuration that was asked for may have other values where `MAY_DIFFER` says so.

    Raises:
        ConfigError: others differ; or what is asked for is behind the run already.
        NodeError: the run was begun by a release that computes otherwise.
    """
    # These bring torch, which a new run imports meanwhile.
    from fedmq.nodes.aggregator.computed import Computed
    from fedmq.nodes.run.setup import completed

    contents, run = asked.contents, asked.recorded
    if contents is None or run is None or contents.fold is None:
        raise ValueError("nothing has begun that could go on")
    before, now = parse(run.config), asked.config
    _check_same(asked, _differences(before, now, only=_NAMED))
    before, now = completed(before, now.allowed), completed(now)
    found = _differences(before, now)
    _check_same(asked, found)
    goal, best = Goal.of(now.run), contents.fold.best_accuracy
    changed_goal = any(_kind(key) == "goal" for key in found)
    if changed_goal and goal.versions < run.version:
        raise ConfigError(
            f"run.versions: run {run.id} in {asked.folder} has {run.version} versions already, "
            f"got {goal.versions}"
        )
    if run.ended is not None:
        met = goal.met_by(None if best is None else best + _ROUNDING)
        if changed_goal and met:
            raise ConfigError(
                f"run.target_accuracy: run {run.id} in {asked.folder} has reached it: its best "
                f"accuracy is {best:.4f}, expected a higher target, or {NONE}, got "
                f"{goal.target_accuracy:g}"
            )
        if met or goal.after(run.version):
            return None
    if run.arithmetic is not None:
        Computed().check(run.arithmetic, run.id)
    _check_code(asked)
    # An end that is not what was to be reached is none that holds when the run is asked for again.
    further = changed_goal or run.ended is not None
    return Continuation(run.id, now.to_toml(), further=further)


def about(asked: Asked, going_on: Continuation) -> str:
    """Return a line that says where a run goes on."""
    run = asked.recorded
    version = 0 if run is None else run.version
    how = "goes further" if going_on.further else "goes on"
    return f"run {going_on.run} {how} from version {version}"


def show_ended(asked: Asked, console: Console) -> None:
    """Say that a run has ended, with the table that it ended with.

    Raises:
        LedgerError: its ledger is damaged.
    """
    if asked.contents is None or asked.contents.fold is None:
        return
    summary = asked.contents.fold.summary()
    if not (asked.folder / SUMMARY_FILE).exists():  # its supervisor was killed before that
        summary = write_summary(asked.folder, asked.begun)
    console.print(closing_table(summary))
    console.print(
        f"run {summary['run']} has ended: nothing was started. For more versions, give a higher "
        "run.versions",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _check_code(asked: Asked) -> None:
    """Raise ConfigError if a run's code is named by its ledger alone: that allows nothing."""
    named = [str(table.get("name")) for table in (asked.config.problem, asked.config.algorithm)]
    own = [name for name in named if ":" in name]
    if own and not asked.config.allowed.names:
        raise ConfigError(
            f"{asked.folder} has no config.toml that can be read, and its run needs the code of "
            f"{' and '.join(own)}: give the configuration, fedmq cluster FILE --run {asked.folder}"
        )


def _check_same(asked: Asked, found: Differences) -> None:
    """Raise ConfigError if keys differ that may not."""
    wrong = {key: each for key, each in found.items() if _kind(key) is None}
    if not wrong or asked.recorded is None:
        return
    named = [f"{key} {shown(old)} there, {shown(new)} here" for key, (old, new) in wrong.items()]
    more = f"; and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    raise ConfigError(
        f"{asked.folder} holds run {asked.recorded.id} with another configuration: "
        f"{'; '.join(named[:_SHOWN])}{more}. Ask for the same, or give --run another folder"
    )


def _differences(before: Config, now: Config, *, only: Sequence[str] = ()) -> Differences:
    """Return the keys in which two configurations differ, but for the run's id.

    Args:
        before: one of them.
        now: the other.
        only: tables of which nothing but the name is compared; by default everything is.
    """
    wanted = [f"{table}.name" for table in only]
    return {
        key: pair
        for key, pair in differences(before.model_dump(), now.model_dump()).items()
        if key != "run.id" and (not only or key in wanted)
    }


def _kind(key: str) -> str | None:
    """Return how a key may differ, or None if it may not."""
    return MAY_DIFFER.get(key) or MAY_DIFFER.get(key.partition(".")[0])
