"""The folder of a run: its contents, its lock, and its ``config.toml``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmq.broker.errors import LedgerDamage, check_advice
from fedmq.broker.file_modes import make_private_folder
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD
from fedmq.broker.ledger.lock import LOCK_FILE
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.wire.addresses import name_fault
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.history.run import RunHistory, runs_of
from fedmq.nodes.process.atomic_write import replacing
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.run.config import Config
from fedmq.nodes.run.toml import STDIN

CONFIG_FILE = "config.toml"
_FRESH_FILE = f"{CONFIG_FILE}.new"
SUPERVISOR_LOG = "cluster.log"
SIMULATION_LOG = "simulation.log"
LEDGER = "ledger"

_OWN = re.compile(r'^# run\.id = "([^"\n]*)"(?:\n# begun = ([0-9]+\.[0-9]+))?', re.MULTILINE)
_SIMULATED = re.compile(r"^# simulated = true$", re.MULTILINE)
_OLD = re.compile(r'\A\[run\]\nid = "([^"\n]*)')
"""Start of a ``config.toml`` of 0.1.0, which can be incomplete."""
_SEGMENT = re.compile(rf"({MESSAGES}|{PAYLOAD})-[0-9]{{20}}\.log")
_LIVE_HEAD = (
    "# The configuration of a run with every default. `fedmq cluster --run FOLDER` resumes\n"
    "# this run; `fedmq cluster FOLDER/config.toml` starts a new run with the same settings.\n"
)
_SIMULATED_HEAD = (
    "# The configuration of a simulated run with every default. `fedmq simulate\n"
    "# FOLDER/config.toml` simulates it again, in another folder.\n"
)
_MAX_NAMED = 5
"""Number of runs that a broker names when it starts."""
_ENDING_S = 8.0
"""Seconds that the broker of a killed supervisor can take to end."""


def state_of(runs: Collection[RunHistory], *, once: bool) -> str:
    """Describe in one line the runs that a broker found in its ledger, and what it waits for."""
    if not runs:
        return "no run yet, waiting for an aggregator"
    lines = [
        f"run {each.run} has ended"
        if each.ended is not None
        else f"run {each.run} at version {each.version}, waiting for its aggregator"
        for each in runs
    ]
    if len(lines) > _MAX_NAMED:
        lines[_MAX_NAMED:] = [f"{len(lines) - _MAX_NAMED} more runs"]
    if all(each.ended is not None for each in runs):
        lines.append("nothing left to do" if once else "waiting for new runs")
    return "; ".join(lines)


def begun_at(folder: Path) -> float | None:
    """Return the start time of a folder's run, in seconds since 1970, or None if unknown."""
    return _read_own(folder / CONFIG_FILE)[1]


@dataclass
class Contents:
    """Contents of the folder of a run.

    id: id of the run, or "" if unknown.
    begun: start time in seconds since 1970, or None if unknown.
    run: the run in the ledger, or None if the ledger has no run.
    simulated: whether `fedmq simulate` wrote it, so that all times are virtual.
    """

    id: str = ""
    begun: float | None = None
    run: RunHistory | None = None
    simulated: bool = False


def look_into(folder: Path) -> Contents | None:
    """Return the contents of a run's folder; None if it is empty or missing.

    Raises:
        ConfigError: the folder cannot be read, is not that of a run, or has several runs.
        LedgerError: the ledger is damaged.
    """
    names = _names(folder)
    if not names:
        return None
    if not _is_run(folder, names):
        some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"--run: expected a new or empty folder, or the folder of a run; {folder} contains "
            f"{some}"
        )
    found = Contents(*_read_own(folder / CONFIG_FILE))
    found.simulated = bool(_SIMULATED.search(_text_of(folder / CONFIG_FILE)))
    try:
        runs = runs_of(read_entries(folder / LEDGER), found.begun)
    except LedgerDamage as error:
        raise error.advise(check_advice(folder)) from None
    if len(runs) > 1:
        raise ConfigError(
            f"--run: expected the ledger of one run, {folder} has {', '.join(runs)}: "
            "resume them with `fedmq broker`"
        )
    if runs:
        [(found.id, found.run)] = runs.items()
    return found


def _names(folder: Path) -> set[str]:
    try:
        return {each.name for each in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ConfigError(f"--run: cannot read {folder}: {reason_of(error)}") from None


def _is_run(folder: Path, names: set[str]) -> bool:
    """Return whether a folder is that of a run, even of one that has just begun."""
    if LEDGER in names and (folder / LEDGER).is_dir():
        inside = _names(folder / LEDGER)
        return inside <= {LOCK_FILE} or any(map(_SEGMENT.fullmatch, inside))
    if CONFIG_FILE in names:
        text = _text_of(folder / CONFIG_FILE)
        return not text or bool(_OWN.search(text) or _OLD.search(text))
    return names <= {_FRESH_FILE, SUPERVISOR_LOG, SIMULATION_LOG}


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {reason_of(error)}") from None


def _read_own(file: Path) -> tuple[str, float | None]:
    """Return the run's id, or "", and its start time, or None, from a configuration file."""
    text = _text_of(file)
    match = _OWN.search(text)
    if match is not None and not name_fault(match[1]):
        return match[1], float(match[2]) if match[2] else None
    old = _OLD.search(text)
    return (old[1] if old and not name_fault(old[1]) else ""), None


def usable_config(folder: Path) -> Path | None:
    """Return the configuration file in a run's folder if it is complete, else None."""
    file = folder / CONFIG_FILE
    try:
        tables = tomllib.loads(_text_of(file))
    except ValueError:
        return None
    needed = {name for name, field in Config.model_fields.items() if field.default is not None}
    return file if tables.keys() >= needed else None


def is_record(file: Path) -> bool:
    """Return whether a run wrote this configuration file, so that its run.id is in use."""
    if file == STDIN:
        return False
    return bool(_OWN.search(_text_of(file))) or (file.parent / LEDGER).is_dir()


def write_config(folder: Path, config: Config, begun: float, *, simulated: bool = False) -> None:
    """Write a run's complete configuration to its folder, without the id, so that it can be reused.

    Args:
        folder: of the run.
        config: of the run.
        begun: its start, in seconds since 1970.
        simulated: whether all its times are virtual.

    Raises:
        ConfigError: the file cannot be written.
    """
    without = config.model_copy(update={"run": config.run.model_copy(update={"id": ""})})
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun))
    text = (
        (_SIMULATED_HEAD if simulated else _LIVE_HEAD)
        + f'# run.id = "{config.run.id}"\n'
        + f"# begun = {float(begun)!r} ({when})\n"
        + ("# simulated = true\n" if simulated else "")
        + f"\n{without.to_toml()}"
    )
    try:
        with replacing(folder / CONFIG_FILE) as fresh:
            fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder / CONFIG_FILE}: {reason_of(error)}") from None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a run's folder if it is missing, and lock it against other supervisors and brokers.

    Raises:
        ConfigError: another process uses the folder (the message has its id), or the folder cannot
            be made.
    """
    try:
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        make_private_folder(folder)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--run: expected a folder, {folder} is not one") from None
    except OSError as error:
        raise ConfigError(f"--run: cannot make {folder}: {reason_of(error)}") from None
    try:
        if _is_locked(lock):
            raise ConfigError(f"--run: {folder} is in use by {_holder(lock, 'another cluster')}")
        _wait_for_broker(folder)
        yield
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):  # rmdir removes only empty folders
            for each in new:
                each.rmdir()


def _wait_for_broker(folder: Path) -> None:
    """Check that no broker writes to a folder; wait for the broker of a killed supervisor."""
    try:
        lock = os.open(folder / LEDGER / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # no ledger yet; for other reasons, the broker reports that it cannot lock it
    try:
        deadline = time.monotonic() + _ENDING_S
        while _is_locked(lock):
            pid = _pid_of_holder(lock)
            if not (pid and _is_orphan(pid)) or time.monotonic() > deadline:
                raise ConfigError(f"--run: {folder} is in use by {_holder(lock, 'another broker')}")
            time.sleep(0.05)
    finally:
        os.close(lock)


def _is_locked(lock: int) -> bool:
    """Lock a file; return whether another process has locked it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # the file system has no locks
    return False


def _holder(lock: int, what: str) -> str:
    pid = _pid_of_holder(lock)
    return f"{what}, process {pid}" if pid else what


def _pid_of_holder(lock: int) -> int | None:
    """Return the id of the process that locked a file, if /proc shows it."""
    inode = str(os.fstat(lock).st_ino)
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            match line.split():
                case [_, "FLOCK", _, "WRITE", pid, place, *_] if place.endswith(f":{inode}"):
                    return int(pid) if int(pid) > 0 else None
    return None


def _is_orphan(pid: int) -> bool:
    """Return whether a process is a supervisor's child, which ends when the supervisor is gone."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # the process has just ended
