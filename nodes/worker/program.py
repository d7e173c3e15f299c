"""The program of a worker or evaluator: connects its core, its link and the training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog
import torch

from fedmq.algorithms.allowed import NOTHING, Allowed
from fedmq.algorithms.values import ReturnedError
from fedmq.broker.errors import BrokerError, RunOver
from fedmq.broker.link.events import PostMessage
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.addresses import WORKER
from fedmq.broker.wire.schema import Hello
from fedmq.nodes.errors import ON_PURPOSE, NodeError, StorageError, exits_as_errors, own_code
from fedmq.nodes.messages.actions import Handled
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.run.config import parse
from fedmq.nodes.run.devices import choose_device
from fedmq.nodes.run.session import linked, log_rejected, new_session, node_key
from fedmq.nodes.run.setup import Setup, set_up
from fedmq.nodes.run.version_zero import version_zero
from fedmq.nodes.worker.client_state import ClientStateStore, SavedClientState
from fedmq.nodes.worker.core import (
    Action,
    Evaluate,
    Event,
    Failed,
    Pause,
    SaveClientState,
    Saved,
    Train,
    Trained,
    Worker,
)
from fedmq.nodes.worker.training import carry_out

_FULL_RETRY_S = 1.0

_log = structlog.get_logger()


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
) -> str:
    """Run a worker or the evaluator until its run is over; return why it ended.

    Args:
        endpoint: address of the broker.
        node: this node's name.
        clients: ranges of clients hosted here, both ends included.
        role: ``worker`` or ``evaluator``.
        run: id of the run; empty for the one that the broker serves.
        folder: stores the node's key; None keeps it in memory.
        states: stores the clients' local states, for this node and for a node that takes over its
            clients; by default ``folder``.
        allowed: user code that the run's configuration, which the broker sends, may name.
        give_up_s: seconds without the broker or the run after which the node ends; None for never.

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
        session=new_session(),
        key=node_key(folder),
        run=run,
        clients=tuple(clients),
    )
    try:
        with linked(endpoint, hello, give_up_s) as link:
            _work_until_over(link, hello, folder if states is None else states, allowed)
    except RunOver as end:
        return str(end)


def _work_until_over(
    link: NodeLink, hello: Hello, states: Path | None, allowed: Allowed
) -> NoReturn:
    """Handle tasks one after the other; raise RunOver at the end of the run."""
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
    repeats = Repeats()
    while True:
        delivery = link.get()
        if delivery.message.kind == "refused":
            log_rejected(delivery.message, repeats)
        actions: list[Action] = list(core.handle(delivery))
        while actions:
            more = _work(link, setup, core, store, device, repeats, actions.pop(0))
            actions = [*more, *actions]


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


def _save(
    link: NodeLink, store: ClientStateStore, client: int, state: SavedClientState
) -> SavedClientState:
    """Save a client's state; retry while it cannot be written, as on a full disk.

    Raises:
        NodeError: the state that another node has saved is damaged.
    """
    while True:
        try:
            return store.put(client, state)
        except StorageError as error:
            _log.error("cannot save local state", reason=str(error))
            link.pause(_FULL_RETRY_S)


def _work(
    link: NodeLink,
    setup: Setup,
    core: Worker,
    store: ClientStateStore,
    device: str,
    repeats: Repeats,
    action: Action,
) -> list[Action]:
    """Carry out one action of a worker's core; return the actions that follow from it."""
    event: Event | None = None
    try:
        match action:
            case Train() | Evaluate():
                began = time.perf_counter()
                with link.away():
                    event = carry_out(action, setup, device)
                if isinstance(event, Trained):
                    elapsed = time.perf_counter() - began
                    event = msgspec.structs.replace(event, elapsed_s=elapsed)
            case Pause(seconds):
                link.pause(seconds)
            case SaveClientState(client, state):
                event = Saved(_save(link, store, client, state))
            case PostMessage(message, data, consumes):
                link.post(message, data, consumes)
            case Handled(seq, refused, code):
                link.done([seq], {seq: refused} if refused else {}, {seq: code})
    except (BrokerError, NodeError):
        raise  # not an error of the task: the link has ended, or local state cannot be saved
    except Exception as error:  # any error of a model fails only this task
        no_metrics = isinstance(error, ReturnedError) and isinstance(action, Evaluate)
        if no_metrics and not core.evaluations:
            raise  # at the first evaluation: every other would fail, too
        event = Failed.of(error, setup)
        if times := repeats.count((type(error), event.where), time.monotonic()):
            about = {"reason": event.reason, "where": event.where, "times": times}
            _log.error("task failed", **about, exc_info=error if times == 1 else None)
    return core.handle(event) if event is not None else []
