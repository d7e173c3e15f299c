"""The program of a worker or evaluator: works on the tasks of its link until the run is over."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import structlog
import torch
from structlog.typing import FilteringBoundLogger

from fedmq.algorithms.allowed import NOTHING, Allowed
from fedmq.broker.access.curve import NodeKeys
from fedmq.broker.errors import RunOver
from fedmq.broker.link.events import Delivery
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.addresses import WORKER
from fedmq.broker.wire.schema import Hello
from fedmq.nodes.errors import ON_PURPOSE, exits_as_errors, own_code
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.run.config import parse
from fedmq.nodes.run.devices import choose_device
from fedmq.nodes.run.session import linked, log_rejected, new_session, node_key
from fedmq.nodes.run.setup import Setup, set_up
from fedmq.nodes.run.version_zero import version_zero
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Worker
from fedmq.nodes.worker.driver import WorkerDriver
from fedmq.nodes.worker.training import Compute, compute


def run_worker(
    endpoint: str,
    node: str,
    clients: Sequence[tuple[int, int]],
    role: str,
    run: str = "",
    folder: Path | None = None,
    states: Path | None = None,
    allowed: Allowed = NOTHING,
    give_up_s: float | None = None,
    secret: str = "",
    keys: NodeKeys | None = None,
    on_admission: Callable[[], None] | None = None,
) -> str:
    """Run a worker or the evaluator until its run is over; return why it ended.

    Args:
        endpoint: address of the broker.
        node: this node's name.
        clients: ranges of clients hosted here, both ends included.
        role: ``worker`` or ``evaluator``.
        run: id of the run; empty for the one that the broker serves.
        folder: stores the node's key and its last session; None keeps them in memory.
        states: stores the clients' local states, for this node and for a node that takes over its
            clients; by default ``folder``.
        allowed: user code that the run's configuration, which the broker sends, may name.
        give_up_s: seconds without the broker or the run after which the node ends; None for never.
        secret: proves the node's name without a folder and keys, see `node_key`.
        keys: of the node and the broker; None for a broker without keys.
        on_admission: see `linked`.

    Raises:
        GaveUp: the broker or the run was unavailable for ``give_up_s``.
        ConfigError: the run's configuration cannot be used here, names code that is not allowed,
            or its model differs from call to call.
        DataError: the data set is missing on this machine.
        OwnCodeError: the problem or its model cannot be made, or raises in a trial step.
        ProblemError: the problem's model changes its tensors in an unsupported way.
        ReturnedError: the problem or the algorithm returned invalid metrics at the first
            evaluation.
        Rejected: the broker does not admit this node.
    """
    hello = Hello(
        node=node,
        role=role,
        key=node_key(folder, secret, keys),
        session=new_session(folder),
        run=run,
        clients=tuple(clients),
    )
    try:
        with linked(endpoint, hello, give_up_s, keys, on_admission) as link:
            _take_part(link, hello, folder if states is None else states, allowed)
    except RunOver as end:
        return str(end)


def _take_part(link: NodeLink, hello: Hello, states: Path | None, allowed: Allowed) -> NoReturn:
    """Set up the run that the broker has admitted this node to, and work on its tasks."""
    welcome = link.welcome()
    with link.away():
        config = parse(welcome.config)
        with own_code("problem.name"):
            setup = set_up(config, allowed, welcome.run)
            torch.set_num_threads(config.worker.threads)
            device = choose_device(config.worker.device)
            version_0 = version_zero(setup.problem)
            if hello.role == WORKER:
                _check_problem(setup, hello.clients, device)
            else:
                setup.problem.test()
        # A run's id can be used again, and its tasks' ids with it; its identity cannot.
        folder = states / welcome.run / welcome.identity if states is not None else None
        store = ClientStateStore(folder)
        core = Worker(setup, welcome.run, hello.node, hello.clients, store, version_0)
    port = LinkedWorker(link, store, functools.partial(compute, setup=setup, device=device))
    work_until_over(WorkerDriver(core, setup, port).handle, link, port.log)


class LinkedWorker:
    """The `WorkerPort` of a node program: a link, and the files of the clients' states.

    Args:
        link: admitted by the broker.
        store: of the clients' states.
        compute: trains and evaluates.
        log: of this node.
    """

    def __init__(
        self,
        link: NodeLink,
        store: ClientStateStore,
        compute: Compute,
        log: FilteringBoundLogger | None = None,
    ) -> None:
        self.link, self.log = link, log or structlog.get_logger()
        self.post, self.done, self.pause, self.away = link.post, link.done, link.pause, link.away
        self.save, self.compute = store.put, compute
        self.now = time.perf_counter


def work_until_over(
    handle: Callable[[Delivery], None], link: NodeLink, log: FilteringBoundLogger
) -> NoReturn:
    """Handle deliveries one after the other, with `WorkerDriver.handle` or in another way.

    Raises:
        RunOver: at the end of the run.
        BrokerError, NodeError, ReturnedError: as in `run_worker`.
    """
    repeats = Repeats()
    while True:
        delivery = link.get()
        if delivery.message.kind == "refused":
            log_rejected(delivery.message, repeats, log)
        handle(delivery)


def _check_problem(setup: Setup, clients: Sequence[tuple[int, int]], device: str) -> None:
    """Read the data of the first client of each range; do a trial step on the first that works."""
    tried = False
    for low, _ in clients:
        try:
            with exits_as_errors():
                data = setup.problem.client(low)
        except ON_PURPOSE:
            raise
        except Exception:  # noqa: BLE001, S112 - this client's tasks fail; other clients may work
            continue
        if not tried:
            setup.algorithm.try_model(setup.problem, data, device)
            tried = True
