"""The folder of a run: what it holds, who uses it, and its ``config.toml``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmq.broker.errors import LedgerDamage, check_advice
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, Accepted, AnyEntry, Ended, Opened
from fedmq.broker.ledger.lock import LOCK_FILE
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.wire.addresses import AGGREGATOR, BROKER, CONTINUED, name_fault
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import Config
from fedmq.nodes.run_folder.atomic_write import replacing
from fedmq.nodes.run_folder.summary import RunFold

CONFIG_FILE = "config.toml"
_FRESH_FILE = f"{CONFIG_FILE}.new"
SUPERVISOR_LOG = "cluster.log"
LEDGER = "ledger"

_OWN = re.compile(r'^# run\.id = "([^"\n]*)"(?:\n# begun = ([0-9]+\.[0-9]+))?', re.MULTILINE)
_OLD = re.compile(r'\A\[run\]\nid = "([^"\n]*)')
"""How the file of 0.1.0 begins, whole or not."""
_SEGMENT = re.compile(rf"({MESSAGES}|{PAYLOAD})-[0-9]{{20}}\.log")
_NAMED = 5
"""Runs that a broker names, of those that it finds."""
_ENDING_S = 8.0
"""How long the broker of a supervisor that was killed may take to end."""


@dataclass
class Recorded:
    """What a ledger tells of one run.

    config: the newest one, as TOML.
    version: the newest one.
    ended: why it did, or None.
    arithmetic: see `fedmq.nodes.aggregator.computed`; None as long as its aggregator has not begun.
    """

    id: str
    config: str
    version: int = 0
    ended: str | None = None
    arithmetic: int | None = None


class Runs:
    """The runs of a ledger, folded entry by entry.

    Attributes:
        found: by id, in the order in which they were opened.
    """

    def __init__(self) -> None:
        self.found: dict[str, Recorded] = {}

    def watch(self, entries: Iterator[AnyEntry]) -> Iterator[AnyEntry]:
        """Yield entries, and take each."""
        for entry in entries:
            self._take(entry)
            yield entry

    def _take(self, entry: AnyEntry) -> None:
        match entry:
            case Opened(run=name, config=config):
                self.found[name] = Recorded(name, config)
            case Ended(run=name, reason=reason):
                self.found[name].ended = reason
            case Accepted():
                message = entry.read()
                run = self.found.get(message.run)
                if run is None:
                    return
                if message.kind == "version" and message.sender == AGGREGATOR:
                    run.version = message.body.get("version", run.version)
                elif message.kind == "run" and message.sender == AGGREGATOR:
                    run.arithmetic = message.body.get("arithmetic", 1)
                elif message.kind == CONTINUED and message.sender == BROKER:
                    run.config, run.ended = message.body["config"], None


def recorded_runs(ledger: Path) -> list[Recorded]:
    """Return the runs of a ledger, in the order in which they were opened; none without one.

    Raises:
        LedgerError: the ledger is damaged.
    """
    runs = Runs()
    for _ in runs.watch(read_entries(ledger)):
        pass
    return list(runs.found.values())


def state_of(runs: Sequence[Recorded], *, once: bool) -> str:
    """Return what a broker finds in its ledger, and waits for, in one line."""
    if not runs:
        return "no run yet: waiting for an aggregator"
    lines = [
        f"run {each.id} has ended"
        if each.ended is not None
        else f"run {each.id} at version {each.version}, goes on when its aggregator comes"
        for each in runs
    ]
    if len(lines) > _NAMED:
        lines[_NAMED:] = [f"{len(lines) - _NAMED} more runs"]
    if all(each.ended is not None for each in runs):
        lines.append("nothing is left to be done" if once else "waiting for new runs")
    return "; ".join(lines)


def begun_at(folder: Path) -> float | None:
    """Return when the run of a folder was begun, in seconds since 1970, if something says so."""
    return _read_own(folder / CONFIG_FILE)[1]


@dataclass
class Contents:
    """What the folder of a run holds.

    id: of the run, or "" if nothing says so.
    begun: when it was begun, in seconds since 1970, or None if nothing says so.
    run: what its ledger tells of it, or None if there is nothing of it yet.
    fold: the same at length.
    """

    id: str = ""
    begun: float | None = None
    run: Recorded | None = None
    fold: RunFold | None = None


def look_into(folder: Path) -> Contents | None:
    """Return what the folder of a run holds; None if it is empty, or not there.

    Raises:
        ConfigError: it cannot be read, is not that of a run, or of several runs.
        LedgerError: its ledger is damaged.
    """
    names = _names(folder)
    if not names:
        return None
    if not _is_run(folder, names):
        some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"--run: expected a new or empty folder, or that of a run; in {folder} there is {some}"
        )
    found = Contents(*_read_own(folder / CONFIG_FILE))
    runs, fold = Runs(), RunFold(found.begun)
    try:
        fold.feed(runs.watch(read_entries(folder / LEDGER)))
    except LedgerDamage as error:
        raise error.advise(check_advice(folder)) from None
    if len(runs.found) > 1:
        raise ConfigError(
            f"--run: the ledger in {folder} is that of several runs, {', '.join(runs.found)}: "
            "`fedmq broker` goes on with them"
        )
    for run in runs.found.values():
        found.id, found.run, found.fold = run.id, run, fold
    return found


def _names(folder: Path) -> set[str]:
    try:
        return {each.name for each in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise ConfigError(f"--run: cannot read {folder}: {error.strerror}") from None


def _is_run(folder: Path, names: set[str]) -> bool:
    """Tell whether this is what a run leaves, be it at its very beginning."""
    if LEDGER in names and (folder / LEDGER).is_dir():
        inside = _names(folder / LEDGER)
        return inside <= {LOCK_FILE} or any(map(_SEGMENT.fullmatch, inside))
    if CONFIG_FILE in names:
        text = _text_of(folder / CONFIG_FILE)
        return not text or bool(_OWN.search(text) or _OLD.search(text))
    return names <= {_FRESH_FILE, SUPERVISOR_LOG}


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None


def _read_own(file: Path) -> tuple[str, float | None]:
    """Return the id of the run that wrote this configuration, and when; "" and None without."""
    text = _text_of(file)
    match = _OWN.search(text)
    if match is not None and not name_fault(match[1]):
        return match[1], float(match[2]) if match[2] else None
    old = _OLD.search(text)
    return (old[1] if old and not name_fault(old[1]) else ""), None


def usable_config(folder: Path) -> Path | None:
    """Return the configuration file in a run's folder, if it is a whole one."""
    file = folder / CONFIG_FILE
    try:
        tables = tomllib.loads(_text_of(file))
    except ValueError:
        return None
    return file if tables.keys() >= Config.model_fields.keys() else None


def is_record(file: Path) -> bool:
    """Tell whether a configuration file was left by a run: its id is that of what has been."""
    return bool(_OWN.search(_text_of(file))) or (file.parent / LEDGER).is_dir()


def write_config(folder: Path, config: Config, begun: float) -> None:
    """Leave a run's configuration in its folder: complete, and without the id, to run it again.

    A reader finds the old file or the new one, even after a crash.

    Raises:
        ConfigError: it cannot be written.
    """
    without = config.model_copy(update={"run": config.run.model_copy(update={"id": ""})})
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun))
    text = (
        "# The configuration of a run, every default filled in. `fedmq cluster --run FOLDER` goes\n"
        "# on with the run; `fedmq cluster FOLDER/config.toml` begins a new one that is the same.\n"
        f'# run.id = "{config.run.id}"\n'
        f"# begun = {float(begun)!r} ({when})\n\n{without.to_toml()}"
    )
    try:
        with replacing(folder / CONFIG_FILE) as fresh:
            fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder / CONFIG_FILE}: {error.strerror}") from None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a run's folder if need be, and keep other supervisors and brokers out of it.

    Raises:
        ConfigError: another process uses it; the sentence has its number. Or it cannot be made.
    """
    try:
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--run: expected a folder, got {folder}, which is none") from None
    except OSError as error:
        raise ConfigError(f"--run: cannot make {folder}: {error.strerror}") from None
    try:
        if _is_taken(lock):
            raise ConfigError(f"--run: {folder} is in use by {_holder(lock, 'another cluster')}")
        _wait_for_broker(folder)
        yield
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):  # unless something is in them now
            for each in new:
                each.rmdir()


def _wait_for_broker(folder: Path) -> None:
    """Check that no broker writes in a folder; that of a supervisor which was killed is ending."""
    try:
        lock = os.open(folder / LEDGER / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # there is none; or the broker itself will say why it cannot be locked
    try:
        deadline = time.monotonic() + _ENDING_S
        while _is_taken(lock):
            pid = _pid_of_holder(lock)
            if not (pid and _is_orphan(pid)) or time.monotonic() > deadline:
                raise ConfigError(f"--run: {folder} is in use by {_holder(lock, 'another broker')}")
            time.sleep(0.05)  # the broker of a killed supervisor is ending
    finally:
        os.close(lock)


def _is_taken(lock: int) -> bool:
    """Lock a file; tell whether another process has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks: nothing is known
    return False


def _holder(lock: int, what: str) -> str:
    pid = _pid_of_holder(lock)
    return f"{what}, process {pid}" if pid else what


def _pid_of_holder(lock: int) -> int | None:
    """Return which process has locked a file, where the system tells."""
    inode = str(os.fstat(lock).st_ino)
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            match line.split():
                case [_, "FLOCK", _, "WRITE", pid, place, *_] if place.endswith(f":{inode}"):
                    return int(pid) if int(pid) > 0 else None
    return None


def _is_orphan(pid: int) -> bool:
    """Tell whether a process is a supervisor's child: if that is gone, it ends by itself."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # it has just ended
