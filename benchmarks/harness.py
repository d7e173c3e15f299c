"""Start, pace, measure and kill the processes of both sides of a benchmark."""

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
"""Timeout for a process's next message; every step of a benchmark is shorter."""
_WARM_UP_S = 0.5
_FEW_BYTES = 4096
_REFERENCES = "zmq_relays"
"""The module with the references, which are not fedmq's own code."""


# ---- processes


class ProcessGroup:
    """Processes and a temporary folder; leaving the context kills and deletes them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedmq-broker-"))
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # also ends a stopped process
        for process in self._processes:
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, target: Callable[..., None], *args: Any, **named: Any) -> ChildProcess:
        """Run ``target(pipe, *args, **named)`` in a fresh interpreter."""
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, target, args, named), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        return ChildProcess(target.__name__, process.pid or 0, ours)


class ChildProcess:
    """The parent's handle of a process in a group."""

    def __init__(self, name: str, pid: int, pipe: Connection) -> None:
        self.name, self.pid, self._pipe = name, pid, pipe

    def has_message(self, within_s: float) -> bool:
        """Wait up to ``within_s`` seconds for a message from the process."""
        return self._pipe.poll(within_s)

    def receive(self, within_s: float = WAIT_S) -> Any:
        """Return the next message of the process."""
        try:
            if self.has_message(within_s):
                return json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise SystemExit(f"{self.name} failed") from None
        raise SystemExit(f"no message from {self.name} within {within_s:g} s")

    def send(self, value: Any) -> None:
        """Send a message to the process."""
        send_json(self._pipe, value)

    def memory(self, field: str) -> int:
        """Return a field of the process's memory, such as VmHWM, in bytes."""
        return memory(field, self.pid)


def memory(field: str, pid: int | str = "self") -> int:
    """Return a field of a process's memory, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"cannot find {field} in /proc/{pid}/status")


def send_json(pipe: Connection, value: Any) -> None:
    """Send a value as JSON to the other end."""
    pipe.send_bytes(json.dumps(value).encode())


def _child(
    pipe: Connection, target: Callable[..., None], args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Run the target; only fedmq's own targets get the process settings of its programs.

    fedmq's malloc settings would make frames of several MB slower for the references.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if target.__module__ != _REFERENCES:
        tune_process()
    quiet = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(wrapper_class=quiet)
    target(pipe, *args, **named)


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
        """Add a figure and its references; ``ratio`` is the smallest accepted one."""
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
    """Return whether the cost of a message of this size is per message, not per byte."""
    return size <= _FEW_BYTES


def pace(size: int) -> tuple[int, int, int]:
    """Return how a stream is paced, in messages: (window, batch, messages per credit).

    The sender posts in batches and has at most one window in flight; the receiver returns
    credit. That bounds every process's memory. TCP is not paced: it has its own flow control.
    """
    if is_small(size):
        return 8192, 256, 1024
    window = max(4, min(64, 64_000_000 // size))
    return window, 1, window // 4


def distinct(size: int, pool_size: int) -> Iterator[memoryview]:
    """Yield buffers with different contents; a buffer is reused after ``pool_size`` others."""
    first = bytearray(os.urandom(size))
    pool = [memoryview(first), *(memoryview(bytearray(first)) for _ in range(pool_size - 1))]
    for number in itertools.count():
        buffer = pool[number % pool_size]
        struct.pack_into("<Q", buffer, 0, number)
        yield buffer


def time_receiver(pipe: Connection, take: Callable[[], None], seconds: float) -> None:
    """Take messages for ``seconds`` after a warm-up; report "warm", then messages per second."""
    until = time.perf_counter() + _WARM_UP_S
    take()
    while time.perf_counter() < until:
        take()
    send_json(pipe, "warm")
    count, began = 0, time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds or count < 4:
        take()
        count += 1
        elapsed = time.perf_counter() - began
    send_json(pipe, count / elapsed)


def time_round_trips(pipe: Connection, exchange: Callable[[], None], seconds: float) -> None:
    """Report "ready"; after any message, make round trips and report their durations in ms."""
    send_json(pipe, "ready")
    pipe.recv_bytes()
    durations = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        exchange()
        durations.append((time.perf_counter() - began) * 1000)
        time.sleep(0.002)  # the probe itself must not be a load
    send_json(pipe, durations)
