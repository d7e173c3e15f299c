"""What runs, paces and measures the processes of either side, and ends them whatever happens."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing as mp
import os
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import structlog
from rich.table import Column, Table

from fedmq.broker.process import tune_process

WAIT_S = 120.0
"""Longer than anything here takes: who is silent for so long has failed."""
_WARM_UP_S = 0.5
_FEW_BYTES = 4096
_REFERENCES = "relays"
"""The module of the targets that are not fedmq's own."""


# ---- processes


class Crew:
    """Processes and a temporary folder that are gone at the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedmq-broker-"))
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # ends one that is stopped, too
        for process in self._processes:
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, target: Callable[..., None], *args: Any) -> Member:
        """Run ``target(pipe, *args)`` in a fresh interpreter."""
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, target, args), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        return Member(target.__name__, process.pid or 0, ours)


class Member:
    """A process of a crew, as its parent sees it."""

    def __init__(self, name: str, pid: int, pipe: Connection) -> None:
        self.name, self.pid, self._pipe = name, pid, pipe

    def has_spoken(self, within_s: float) -> bool:
        """Wait a while for the process to say something."""
        return self._pipe.poll(within_s)

    def hear(self, within_s: float = WAIT_S) -> Any:
        """Return what the process says next."""
        try:
            if self.has_spoken(within_s):
                return json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise SystemExit(f"{self.name} has failed") from None
        raise SystemExit(f"{self.name} said nothing for {within_s:g} s")

    def tell(self, value: Any) -> None:
        """Say something to the process."""
        say(self._pipe, value)

    def memory(self, field: str) -> int:
        """Return a field of the process's memory, such as VmHWM, in bytes."""
        return memory(field, self.pid)


def memory(field: str, pid: int | str = "self") -> int:
    """Return a field of a process's memory, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"the system does not tell {field}")


def say(pipe: Connection, value: Any) -> None:
    """Say something to the other end."""
    pipe.send_bytes(json.dumps(value).encode())


def _child(pipe: Connection, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run the target; fedmq's own are set up as its programs are, the references are not.

    (What fedmq asks of malloc would make frames of several MB slower for the references.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if target.__module__ != _REFERENCES:
        tune_process()
    quiet = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(wrapper_class=quiet)
    target(pipe, *args)


# ---- figures


@dataclass
class Report:
    """The figures, as a table for people and by name for programs."""

    table: Table = field(
        default_factory=lambda: Table(
            Column("", no_wrap=True), "fedmq", "reference", "ratio", "bare TCP", "limit"
        )
    )
    figures: dict[str, float] = field(default_factory=dict)
    missed: bool = False

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        reference: float | None = None,
        tcp: float | None = None,
        ratio: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a figure and its references; ``ratio`` is the least to the reference."""
        missed = at_most is not None and value > at_most
        self.figures[f"broker.{name}.fedmq"] = value
        share = None
        if reference is not None:
            share = value / reference if reference else 0.0
            self.figures[f"broker.{name}.reference"] = reference
            self.figures[f"broker.{name}.ratio"] = share
            missed |= ratio is not None and share < ratio
        if tcp is not None:
            self.figures[f"broker.{name}.tcp"] = tcp
        limit = "" if at_most is None else f"<= {at_most:g}"
        if ratio is not None:
            limit = f">= {ratio:g} x"
        self.table.add_row(
            f"{name} ({unit})",
            *("" if each is None else f"{each:,.3g}" if each < 1000 else f"{each:,.0f}"
              for each in (value, reference, share, tcp)),
            f"{limit} {'missed' if missed else 'met'}" if limit else "",
        )  # fmt: skip
        self.missed |= missed


# ---- streams


def is_small(size: int) -> bool:
    """Tell whether messages are so small that their bytes do not count."""
    return size <= _FEW_BYTES


def pace(size: int) -> tuple[int, int, int]:
    """Return how a stream is paced, in messages: (window, batch, acknowledgement).

    At most a window is on the way, posted a batch at a time, and the receiver says when it
    has another few: that bounds every process's memory. The same for all but TCP, which
    has its own way.
    """
    if is_small(size):
        return 8192, 256, 1024
    window = max(4, min(64, 64_000_000 // size))
    return window, 1, window // 4


def distinct(size: int, kept: int) -> Iterator[memoryview]:
    """Yield buffers of which no two are alike; each is used again after ``kept`` others."""
    first = bytearray(os.urandom(size))
    pool = [memoryview(first), *(memoryview(bytearray(first)) for _ in range(kept - 1))]
    for number in itertools.count():
        buffer = pool[number % kept]
        struct.pack_into("<Q", buffer, 0, number)
        yield buffer


def clocked(pipe: Connection, take: Callable[[], None], seconds: float) -> None:
    """Take messages for a while after a warm-up; say "warm", then how many came in a second."""
    until = time.perf_counter() + _WARM_UP_S
    take()
    while time.perf_counter() < until:
        take()
    say(pipe, "warm")
    count, began = 0, time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds or count < 4:
        take()
        count += 1
        elapsed = time.perf_counter() - began
    say(pipe, count / elapsed)


def pings(pipe: Connection, exchange: Callable[[], None], seconds: float) -> None:
    """Say "here"; once told to, make round trips for a while and say how long each took, in ms."""
    say(pipe, "here")
    pipe.recv_bytes()
    durations = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        exchange()
        durations.append((time.perf_counter() - began) * 1000)
        time.sleep(0.002)  # a probe, not a load of its own
    say(pipe, durations)
