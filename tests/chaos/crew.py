"""Real processes of a run, each started, killed and started again as a test wants."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.keyring import Keyring

HERE = Path(__file__).parent
FEDMQ = (sys.executable, "-P", "-m", "fedmq.nodes")
SMALL = {
    "problem.examples": 1000,
    "problem.model": "2nn",
    "algorithm.name": "chaos_models:Paced",
    "algorithm.pause_s": 0.05,
    "run.evaluate_every": 0,
    "worker.device": "cpu",
}
"""MNIST, small; 0.8 MB a model, so that blobs travel in chunks and not beside messages."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on for 0 s, which makes a close a reset."""


def wait_until(what: str, condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Look again and again; every wait of these tests ends here, or has a deadline of its own."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def free_port() -> int:
    """Return a port that no socket gets by chance while its broker is dead."""
    while True:
        port = random.randint(12_000, 30_000)  # noqa: S311 - below the ephemeral ones
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Process:
    """A command of ours: its log, its end, and how to start it once more."""

    pid: int
    log: Path
    code: Callable[[], int | None]
    again: Callable[[], Process]

    @property
    def alive(self) -> bool:
        return self.code() is None

    def send(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as a crash would, and wait until it is gone."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        self.wait(10)

    def wait(self, timeout_s: float = 30) -> int:
        wait_until(f"the end of {self.log.name}:\n{self.said()[-3000:]}", self._ended, timeout_s)
        return self.code() or 0

    def _ended(self) -> bool:
        return not self.alive

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def rss(self) -> float:
        """Resident memory in MB, without pages of files (torch's code, a ledger's cache)."""
        memory = psutil.Process(self.pid).memory_info()
        return (memory.rss - memory.shared) / 1e6


class Zygote:
    """See zygote.py."""

    def __init__(self, folder: Path) -> None:
        self._errors = (folder / "zygote.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            text=True,
        )

    def fork(self, arguments: list[str], folder: Path, log: Path) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "folder": str(folder), "log": str(log)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=20)
        self._errors.close()


@dataclass
class Crew:
    """The processes of one test.

    folder: where each has its log; the ledger is in run/ledger, the model in model/.
    keys: of the broker and its nodes; None for a broker without keys.
    """

    folder: Path
    zygote: Zygote
    port: int = field(default_factory=free_port)
    started: list[Process] = field(default_factory=list)
    keys: Keyring | None = None

    @property
    def ledger(self) -> Path:
        return self.folder / "run" / "ledger"

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def broker(self, lease_s: float = 5.0, *more: str, before: tuple[str, ...] = ()) -> Process:
        """Start the broker in a fresh interpreter: it imports no torch."""
        command = ("broker", "--bind", self.endpoint, "--run", str(self.folder / "run"))
        keys = self.keys.of_broker() if self.keys is not None else ()
        command = (*before, *FEDMQ, *command, "--lease", str(lease_s), *keys, *more)
        log = self.folder / "broker.log"
        with log.open("a") as output:
            popen = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=self.folder, start_new_session=True
            )
        return self._keep(
            Process(popen.pid, log, popen.poll, lambda: self.broker(lease_s, *more, before=before))
        )

    def aggregator(self, **settings: object) -> Process:
        """Start the aggregator; settings as in ``run__versions=5``, beside those of SMALL."""
        chosen = {**SMALL, **{key.replace("__", "."): each for key, each in settings.items()}}
        chosen = {"run.id": "chaos", **chosen}
        arguments = [f"--set={key}={value}" for key, value in chosen.items() if value is not None]
        return self.node("aggregator", "aggregator", "--run", "model", *arguments)

    def worker(self, name: str, clients: str, *more: str, endpoint: str = "") -> Process:
        arguments = ("--clients", clients, "--name", name, *more)
        if "--state" not in more:
            arguments = (*arguments, "--state", f"state-{name}")
        return self.node(name, "worker", *arguments, endpoint=endpoint)

    def node(self, name: str, command: str, *arguments: str, endpoint: str = "") -> Process:
        """Start any node by its command line."""
        log = self.folder / f"{name}.log"
        allow = ["--allow", "chaos_models"] if command == "worker" else []
        own = any(each in arguments for each in ("--keys", "--join-file"))
        keys = () if self.keys is None or own else self.keys.of_node(name)
        whole = [command, "--connect", endpoint or self.endpoint, *allow, *keys, *arguments]
        pid = self.zygote.fork(whole, self.folder, log)
        ended = Path(f"{log}.{pid}.code")

        def code() -> int | None:
            return int(ended.read_text()) if ended.exists() else None

        return self._keep(
            Process(pid, log, code, lambda: self.node(name, command, *arguments, endpoint=endpoint))
        )

    def _keep(self, process: Process) -> Process:
        self.started.append(process)
        return process

    def end(self) -> None:
        for each in self.started:
            each.send(signal.SIGCONT)
            each.send(signal.SIGKILL)
        for each in self.started:
            each.wait(10)


class Proxy:
    """A TCP relay before a broker, whose connections can be cut and slowed.

    rate: bytes a second, each way of each connection; None for as fast as it goes.
    """

    _BUFFER = 64 * 1024

    def __init__(self, port: int, rate: float | None = None) -> None:
        self.rate = rate
        self.cuts = 0
        self._to = port
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket()
        self._small(self._listener)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def connected(self) -> bool:
        return bool(self._open)

    def cut(self) -> None:
        """Reset every connection; what was on its way is lost."""
        with self._lock:
            self.cuts += bool(self._open)
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    each.shutdown(socket.SHUT_RD)  # wakes its pump, which closes it

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()

    def _small(self, each: socket.socket) -> None:
        """Keep little in the kernel: a slow line must be slow, not late."""
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._BUFFER)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._BUFFER)

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    near, _ = self._listener.accept()
                except OSError:
                    return
                far = socket.socket()
                self._small(far)
                try:
                    far.connect(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                    far.close()
                    continue
                with self._lock:
                    self._open |= {near, far}
                done = threading.Barrier(2)
                for a, b in ((near, far), (far, near)):
                    a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    thread = threading.Thread(target=self._pump, args=(a, b, done))
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, done: threading.Barrier) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self._BUFFER):
                if self.rate:
                    time.sleep(len(data) / self.rate)
                sink.sendall(data)
        for each, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                each.shutdown(how)
        done.wait()
        with self._lock:
            self._open.discard(source)
        source.close()
