"""A node in a simulated run: its real program, in a greenlet, on a virtual machine."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from structlog.typing import FilteringBoundLogger

from fedmq.broker.errors import LinkClosed, Rejected
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.node import VirtualPort
from fedmq.broker.virtual.validation import validated
from fedmq.broker.wire.addresses import AGGREGATOR, AVAILABILITY
from fedmq.broker.wire.schema import Hello, Message, Range
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.aggregator.program import QUIET_S, LinkedAggregator, fold_until_over
from fedmq.nodes.process.logs import SILENT
from fedmq.nodes.run.agreement import Fingerprint
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.session import admitted
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.worker import training
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Worker
from fedmq.nodes.worker.driver import WorkerDriver
from fedmq.nodes.worker.program import LinkedWorker, work_until_over
from fedmq.nodes.worker.training import Compute


class VirtualNode(ABC):
    """One session of a node.

    Args:
        port: its process, and its end of the network.
        machine: where the process runs.
        hello: of the session.
        draw_s: draws how long a task or a commit takes, in seconds.
        log: of the node.

    Attributes:
        port, hello: as given.
        link: its link.
        ended: why the program ended by itself; None if it runs, or was killed.
    """

    def __init__(
        self,
        port: VirtualPort,
        machine: Machine,
        hello: Hello,
        draw_s: Callable[[], float],
        log: FilteringBoundLogger = SILENT,
    ) -> None:
        self.port, self.hello, self.log = port, hello, log
        self.ended: LinkClosed | Rejected | None = None
        self._machine, self._draw_s = machine, draw_s
        self.link = NodeLink(port, hello)
        port.run(self._run)

    def hand_in(self, message: Message) -> None:
        """Post a message that has nothing to do with the run."""
        self.link.hand_in(message)

    def _run(self) -> None:
        try:
            with admitted(self.link, self.hello, self.log):
                self.work(self.link)
        except (LinkClosed, Rejected) as error:
            self.ended = error

    @abstractmethod
    def work(self, link: NodeLink) -> None:
        """Run the node's program until its link ends."""


class VirtualAggregator(VirtualNode):
    """A session of an aggregator.

    Args:
        setup: objects of the run.
        folder: where it saves the final model; None to save none.
        version_0: see `version_zero`.
        quiet_s: see `LinkedAggregator`.
        checked: whether its core validates its state after each event.

    Attributes:
        core: folds the inbox.
        finished: why it has ended the run, or "".
    """

    def __init__(
        self,
        port: VirtualPort,
        machine: Machine,
        hello: Hello,
        draw_s: Callable[[], float],
        setup: Setup,
        folder: Path | None = None,
        log: FilteringBoundLogger = SILENT,
        version_0: Fingerprint | None = None,
        *,
        quiet_s: float = QUIET_S,
        checked: bool = True,
    ) -> None:
        super().__init__(port, machine, hello, draw_s, log)
        self._setup, self._folder, self._version_0 = setup, folder, version_0
        self._quiet_s = quiet_s
        computed = Computed(device=kind_of("cpu"), version_0=version_0)
        core = Aggregator(setup, hello.run, hello.node, computed)
        self.core = validated(core) if checked else core
        self.finished = ""

    def work(self, link: NodeLink) -> None:
        """Run the program of `run_aggregator`."""

        def over(reason: str) -> None:
            if self.port.up:
                self.finished = reason
            link.over(reason)

        about = (link, self._setup.problem, self._folder, self.log, self._beside)
        port = LinkedAggregator(*about, self._quiet_s)
        port.over = over
        fold_until_over(self.core, port, self._version_0)

    def _beside(self, work: Callable[[], None]) -> None:
        self._machine.after(self._draw_s(), work)


class VirtualWorker(VirtualNode):
    """A session of a worker, or of the evaluator.

    Args:
        setup: objects of the run.
        store: the clients' states, which survive the process.
        compute: trains and evaluates; by default in this process.
        version_0: see `version_zero`.
        checked: whether its core validates its state after each event.

    Attributes:
        core: handles the tasks.
        store: as given.
    """

    def __init__(
        self,
        port: VirtualPort,
        machine: Machine,
        hello: Hello,
        draw_s: Callable[[], float],
        setup: Setup,
        store: ClientStateStore,
        compute: Compute | None = None,
        log: FilteringBoundLogger = SILENT,
        version_0: Fingerprint | None = None,
        *,
        checked: bool = True,
    ) -> None:
        super().__init__(port, machine, hello, draw_s, log)
        self._setup, self.store = setup, store
        self._compute = compute or functools.partial(training.compute, setup=setup, device="cpu")
        core = Worker(setup, hello.run, hello.node, hello.clients, store, version_0)
        self.core = validated(core) if checked else core
        self._reports = itertools.count(1)

    def work(self, link: NodeLink) -> None:
        """Run the program of `run_worker`; each task takes a drawn time."""
        port = LinkedWorker(link, self.store, self._compute, self.log)
        port.now, port.away = self._machine.monotonic, self._training
        work_until_over(WorkerDriver(self.core, self._setup, port).handle, link, self.log)

    def report(self, back: Sequence[Range] = (), away: Sequence[Range] = ()) -> None:
        """Post that some of its clients, in ranges, are available again or not any more."""
        if not self.hello.clients:
            return  # the evaluator
        body = {"back": [*map(list, back)], "away": [*map(list, away)]}
        name = f"{self.hello.session}/availability/{next(self._reports)}"
        run, sender = self.hello.run, self.hello.node
        self.hand_in(
            Message(kind=AVAILABILITY, id=name, run=run, sender=sender, to=AGGREGATOR, body=body)
        )

    def report_one(self, rng: random.Random) -> None:
        """Report a drawn client, as available again or not any more."""
        for low, high in rng.sample(self.hello.clients, min(1, len(self.hello.clients))):
            client = rng.randint(low, high)
            self.report(**{rng.choice(["back", "away"]): [(client, client)]})

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        with self.link.away():
            yield
            self.port.pass_time(self._draw_s())


def apart() -> contextlib.AbstractContextManager[object]:
    """Keep torch's mode, which is the thread's, from other programs while one waits."""
    return _USUAL if torch.is_grad_enabled() else torch.enable_grad()


_USUAL: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
