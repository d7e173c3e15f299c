"""Resuming a run: which command may continue the run in a folder.

The same command resumes a run. The table `MAY_DIFFER` lists the keys that may then have another
value; any other difference would make it another run.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from fedmq.broker.settings import Continuation
from fedmq.nodes.cluster.view import closing_table
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.population.table import stand_in_of
from fedmq.nodes.run.config import Config, changed, load, parse
from fedmq.nodes.run.config_difference import Differences, differences, shown
from fedmq.nodes.run.goal import Goal, Spent
from fedmq.nodes.run.toml import NONE
from fedmq.nodes.run_folder.folder import (
    Contents,
    held,
    is_record,
    look_into,
    usable_config,
)
from fedmq.nodes.run_folder.summary import summary_of
from fedmq.nodes.run_folder.summary_file import (
    SIMULATED_IN_S,
    SUMMARY_FILE,
    recorded_value,
    write_summary,
)

RUNS = Path("runs")
"""Folder of the runs' folders, if a command names none."""

MAY_DIFFER: Mapping[str, Literal["goal", "here"]] = {
    "run.versions": "goal",
    "run.target_accuracy": "goal",
    "run.max_bytes": "goal",
    "run.max_wall_s": "goal",
    "run.patience": "goal",
    "run.failures": "goal",
    "worker": "here",
    "broker": "here",
    "simulation": "here",
}
"""Keys and tables that may differ when a run is resumed, see docs/configuration.md.

goal: decides when the run ends; may take any value that the run has not passed.
here: describes this host; does not affect what is learned.
"""
_SIMULATED_MAY_DIFFER = ("worker", "broker")
"""Tables that may differ when the command of a simulated run is repeated, which shows the run."""
_NAMED = ("problem", "algorithm", "schedule")
_SHOWN = 12
"""Differing keys in an error, at most."""
_ROUNDING = 1e-9
"""The aggregator may have added the clients' accuracies in another order."""


@dataclass(frozen=True)
class Asked:
    """A command's configuration, and the folder of its run.

    config: includes the run's id.
    begun: start of the run, in seconds since 1970; None if unknown.
    contents: of the folder; None if the folder is new.
    """

    config: Config
    folder: Path
    begun: float | None
    contents: Contents | None

    @property
    def recorded(self) -> RunHistory | None:
        """Return the run in the folder's ledger; None if it has not started."""
        return self.contents.run if self.contents is not None else None


@contextlib.contextmanager
def asking(
    file: Path | None,
    settings: Sequence[str],
    folder: Path | None,
    now: float,
    *,
    simulated: bool = False,
) -> Iterator[Asked]:
    """Read a command's configuration, and lock the folder of its run while the body runs.

    Args:
        file: the configuration. Without one, ``settings`` are applied to the configuration in
            the folder, or else to the defaults.
        settings: ``key=value``.
        folder: of the run; by default named by the run's id.
        now: start of a new run, in seconds since 1970.
        simulated: whether the command simulates the run.

    Raises:
        ConfigError: the configuration is invalid; or the folder contains another run or
            something else, or is in use.
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
        if contents.run is not None and contents.simulated != simulated:
            kind = "simulated run" if contents.simulated else "run that was not simulated"
            raise ConfigError(f"--run: {folder} has a {kind}: choose another folder")
        if contents.run is not None and name not in ("", contents.id):
            raise ConfigError(
                f"run.id: expected {contents.id}, the run in {folder}, got {name}: "
                "choose another folder with --run"
            )
        if file is None:
            given = _on_top_of_own(folder, contents, settings) or given
        # Without a run in the ledger, an earlier start failed: the run starts now.
        begun = now if contents.run is None else contents.begun
        yield Asked(called(given, name or contents.id or drawn), folder, begun, contents)


def _load(file: Path | None, settings: Sequence[str]) -> Config:
    """Read a configuration, without the id of the run that wrote the file, if one did."""
    recorded = file is not None and is_record(file)
    given = load(file, settings, recorded=recorded)
    has_id = any(each.partition("=")[0].strip() == "run.id" for each in settings)
    return called(given, "") if recorded and not has_id else given


def _on_top_of_own(folder: Path, contents: Contents, settings: Sequence[str]) -> Config | None:
    """Return the configuration in a folder with settings applied; None if it has none."""
    file = usable_config(folder)
    if file is not None:
        return load(file, settings, recorded=True)
    return None if contents.run is None else changed(parse(contents.run.config), settings)


def draw_id() -> str:
    """Return an id from the time and a random number."""
    return time.strftime("%Y%m%d-%H%M%S") + "-" + secrets.token_hex(2)


def called(config: Config, name: str) -> Config:
    """Return a configuration with another run id."""
    return config.model_copy(update={"run": config.run.model_copy(update={"id": name})})


def continuation(asked: Asked) -> Continuation | None:
    """Return how to resume a run; None if it has ended and its goal is reached.

    Raises:
        ConfigError: a key differs that may not, see `MAY_DIFFER`; or the run has passed the goal.
        NodeError: the run was started by a release that computes differently.
    """
    # These import torch; a new run imports it in the background.
    from fedmq.nodes.aggregator.computed import Computed
    from fedmq.nodes.run.setup import completed

    run = asked.recorded
    if run is None:
        raise ValueError("expected a run that has started")
    before, now = parse(run.config), asked.config
    _check_same(asked, _differences(before, now, only=_NAMED))
    before, now = completed(before, now.allowed), completed(now)
    found = _differences(before, now)
    _check_same(asked, found)
    _check_learner(asked, before, now)
    goal, best = Goal.of(now.run), run.best_accuracy
    changed_goal = any(kind_of_key(key) == "goal" for key in found)
    if changed_goal and goal.versions < run.version:
        raise ConfigError(
            f"run.versions: expected at least {run.version}, which run {run.run} in {asked.folder} "
            f"already has, got {goal.versions}"
        )
    if run.ended is not None:
        met = goal.met_by(None if best is None else best + _ROUNDING)
        if changed_goal and met:
            raise ConfigError(
                f"run.target_accuracy: expected more than {best:.4f}, the best accuracy of run "
                f"{run.run} in {asked.folder}, or {NONE}, got {goal.target_accuracy:g}"
            )
        key, reason = _limit_reached(run, goal)
        if changed_goal and reason:
            raise ConfigError(
                f"{key}: expected more than run {run.run} in {asked.folder} has used, or {NONE}: "
                f"{reason}"
            )
        if met or reason or goal.after(run.version):
            return None
    if run.arithmetic is not None:
        Computed().check(run.arithmetic, run.run)
    _check_code(asked)
    # The command asks for the run again: an end before the goal no longer counts.
    further = changed_goal or run.ended is not None
    return Continuation(run.run, now.to_toml(), further=further)


def check_simulated(asked: Asked) -> None:
    """Check that the simulated run in a folder is the one that a command asks for, and has ended.

    Raises:
        ConfigError: a key differs that may not, see `_SIMULATED_MAY_DIFFER`; or the run was
            interrupted.
    """
    from fedmq.nodes.run.setup import completed  # imports torch

    run = asked.recorded
    if run is None:
        raise ValueError("expected a run that has started")
    before, now = parse(run.config), asked.config
    found = _differences(before, now, only=_NAMED) or _differences(
        completed(before, now.allowed), completed(now)
    )
    _check_same(asked, found, _SIMULATED_MAY_DIFFER)
    if run.ended is None:
        raise ConfigError(
            f"--run: the simulation of run {run.run} in {asked.folder} was interrupted at version "
            f"{run.version}, and a simulation cannot be resumed: to start over, choose another "
            f"folder, or remove {asked.folder}"
        )


def about(asked: Asked, resumed: Continuation) -> str:
    """Return the line on the version at which a run is resumed or extended."""
    version = 0 if asked.recorded is None else asked.recorded.version
    verb = "extending" if resumed.further else "resuming"
    return f"{verb} run {resumed.run} from version {version}"


def show_ended(asked: Asked, console: Console, hint: str = "") -> None:
    """Print the closing table of a run that has ended.

    Args:
        asked: the run.
        console: where to print.
        hint: how to go on; by default, which key extends the run.

    Raises:
        LedgerError: the ledger is damaged.
    """
    if asked.recorded is None:
        return
    summary = summary_of(asked.recorded)
    if not (asked.folder / SUMMARY_FILE).exists():  # its supervisor was killed first
        summary = write_summary(asked.folder, asked.begun)
    if asked.contents is not None and asked.contents.simulated:
        summary |= {SIMULATED_IN_S: recorded_value(asked.folder, SIMULATED_IN_S)}
    console.print(closing_table(summary), soft_wrap=True)
    key = _limit_reached(asked.recorded, Goal.of(asked.config.run))[0] or "run.versions"
    hint = hint or f"To extend it, set a higher {key}"
    console.print(
        f"run {summary['run']} has ended; nothing was started. {hint}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _limit_reached(run: RunHistory, goal: Goal) -> tuple[str, str]:
    """Return the key of a limit that a run has reached, and the reason; ("", "") if none."""
    spent = Spent(payload_bytes=run.payload_up + run.payload_down)
    for point in run.curve:
        if point.accuracy is not None and not point.is_partial:
            spent.evaluated(point.accuracy)
    spent.started_at, spent.stopped_s = run.recorded_at, run.stopped_s
    return goal.limit_reached(spent, spent.wall_s(run.now or 0.0))


def _check_code(asked: Asked) -> None:
    """Raise ConfigError if only the ledger names the run's own code: that does not allow it."""
    named = [str(table.get("name")) for table in (asked.config.problem, asked.config.algorithm)]
    own = [name for name in named if ":" in name]
    if own and not asked.config.allowed.names:
        raise ConfigError(
            f"{asked.folder} has no usable config.toml, and the run needs the code of "
            f"{' and '.join(own)}: give its configuration, fedmq cluster FILE --run {asked.folder}"
        )


def _check_same(asked: Asked, found: Differences, may_differ: Collection[str] = MAY_DIFFER) -> None:
    """Raise ConfigError if a key differs that may not."""
    wrong = {
        key: each
        for key, each in found.items()
        if key not in may_differ and key.partition(".")[0] not in may_differ
    }
    if not wrong or asked.recorded is None:
        return
    named = [f"{key} expected {shown(old)}, got {shown(new)}" for key, (old, new) in wrong.items()]
    more = f"; and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    raise ConfigError(
        f"run {asked.recorded.run} in {asked.folder} has another configuration: "
        f"{'; '.join(named[:_SHOWN])}{more}. Use the same values, or another folder with --run"
    )


def _check_learner(asked: Asked, before: Config, now: Config) -> None:
    """Raise ConfigError if clients would train something else: ``simulation`` is mostly `here`."""
    learners = stand_in_of(before.simulation), stand_in_of(now.simulation)
    if learners[0] == learners[1]:
        return
    old, new = (
        "'train'" if each is None else f"'curve' with {each.model_dump()}" for each in learners
    )
    raise ConfigError(
        f"simulation.learner: expected {old}, as in run {now.run.id} in {asked.folder}, got {new}"
    )


def _differences(before: Config, now: Config, *, only: Sequence[str] = ()) -> Differences:
    """Return the keys in which two configurations differ, except the run's id.

    Args:
        before: one configuration.
        now: the other.
        only: compare only the names in these tables; by default, compare all keys.
    """
    wanted = [f"{table}.name" for table in only]
    return {
        key: pair
        for key, pair in differences(before.model_dump(), now.model_dump()).items()
        if key != "run.id" and (not only or key in wanted)
    }


def kind_of_key(key: str) -> str | None:
    """Return the entry of a key in `MAY_DIFFER`, or None."""
    return MAY_DIFFER.get(key) or MAY_DIFFER.get(key.partition(".")[0])
