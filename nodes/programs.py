"""The node programs: a core, a link, and the work that the core asks for."""

from __future__ import annotations

import contextlib
import functools
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from fedmq.broker.dealer import NodeLink
from fedmq.broker.errors import LinkClosed
from fedmq.broker.link import Delivery
from fedmq.broker.state import AGGREGATOR, WORKER
from fedmq.broker.wire import Hello
from fedmq.nodes.config import Config, parse
from fedmq.nodes.inbox import Done, Finish, Inbound, Post, Tick

_PATIENCE_S = 3.0


class Stopped(BaseException):
    """A signal asked this process to stop; not an Exception, so that training lets it through."""


@contextlib.contextmanager
def stop_on_signals(*signals: signal.Signals) -> Iterator[None]:
    """Raise `Stopped` in the main thread when one of these signals comes."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def new_session() -> str:
    """Return a session id: a restart of a node is told from a reconnect by it."""
    return f"{time.time_ns():x}-{secrets.token_hex(4)}"


def run_aggregator(endpoint: str, config: Config, run: str, folder: Path | None = None) -> str:
    """Run an aggregator until its run is over; return why it ended.

    Args:
        endpoint: where the broker listens.
        config: the run's configuration.
        run: id of the run.
        folder: where to leave the final model as ``model.npz``; None leaves none.

    Raises:
        ConfigError: the configuration is unusable.
        Rejected: the broker does not admit this node.
        LinkClosed: the link ended before the run did.
    """
    import numpy as np
    import torch

    from fedmq.nodes.aggregator import Aggregator, Start
    from fedmq.nodes.setup import set_up

    setup = set_up(config)
    torch.set_num_threads(config.worker.threads)
    hello = Hello(
        node=AGGREGATOR,
        role=AGGREGATOR,
        session=new_session(),
        run=run,
        config=setup.config.to_toml(),
        total_clients=setup.problem.clients,
    )
    core = Aggregator(setup, run, AGGREGATOR)
    with _linked(endpoint, hello) as link:
        actions: Sequence[Any] = core.handle(Start())
        while True:
            with link.together():
                _tell_done(link, actions)
                for action in actions:
                    match action:
                        case Post(message, data, consumes):
                            link.post(message, data, consumes)
                        case Tick(token, after_s):
                            link.tick(token, after_s)
                        case Finish(reason):
                            link.over(reason)
            if any(isinstance(action, Finish) for action in actions):
                break
            inbound = _inbound(link, link.get())
            with link.away():
                actions = core.handle(inbound)
        reason = _wait_for_end(link)
    if folder is not None:
        arrays = {name: each.numpy() for name, each in core.tensors().items()}
        np.savez(folder / "model.npz", allow_pickle=False, **arrays)
    return reason


def run_worker(
    endpoint: str, node: str, clients: Sequence[tuple[int, int]], role: str, run: str = ""
) -> str:
    """Run a worker or the evaluator until its run is over; return why it ended.

    Args:
        endpoint: where the broker listens.
        node: this node's name.
        clients: ranges of clients hosted here, both ends included.
        role: ``worker`` or ``evaluator``.
        run: id of the run; empty for the one that the broker serves.

    Raises:
        ConfigError: the run's configuration cannot be used here.
        DataError: the data set is not here.
        Rejected: the broker does not admit this node.
    """
    import torch

    from fedmq.nodes.setup import choose_device, set_up
    from fedmq.nodes.worker import Worker

    hello = Hello(node=node, role=role, session=new_session(), run=run, clients=tuple(clients))
    with _linked(endpoint, hello) as link:
        welcome = link.welcome()
        with link.away():
            config = parse(welcome.config)
            setup = set_up(config)
            torch.set_num_threads(config.worker.threads)
            device = choose_device(config.worker.device)
            if role == WORKER:
                for low, _ in clients:
                    setup.problem.client(low)
            else:
                setup.problem.test()
            core = Worker(setup, welcome.run, node, clients)
        while True:
            try:
                delivery = link.get()
            except LinkClosed as end:
                return str(end)
            actions: list[Any] = list(core.handle(_inbound(link, delivery)))
            while actions:
                actions = [*_work(link, setup, core, device, actions.pop(0)), *actions]


def _work(link: NodeLink, setup: Any, core: Any, device: str, action: Any) -> list[Any]:
    """Carry out one action of a worker's core; return the actions that follow from it."""
    from fedmq.algorithms.base import Client
    from fedmq.nodes.worker import Evaluate, Evaluated, Failed, Pause, Train, Trained

    log = structlog.get_logger()
    event: Any = None
    try:
        match action:
            case Train(client, task, local, seed):
                began = time.perf_counter()
                with link.away():
                    data = setup.problem.client(client)
                    place = Client(client, setup.problem, data, local, seed, device)
                    payload, kept = setup.algorithm.train(task, place)
                event = Trained(payload, kept, time.perf_counter() - began)
            case Evaluate(task):
                with link.away():
                    metrics = setup.algorithm.evaluate(task, setup.problem, device)
                event = Evaluated(metrics)
            case Pause(seconds):
                link.pause(seconds)
            case Post(message, data, consumes):
                link.post(message, data, consumes)
            case Done(seq, refused):
                link.done([] if refused else [seq], {seq: refused} if refused else {})
    except Exception as error:  # whatever a user's model raises fails this one task only
        log.exception("task failed")
        event = Failed(f"{type(error).__name__}: {error}"[:2000])
    return core.handle(event) if event is not None else []


@contextlib.contextmanager
def _linked(endpoint: str, hello: Hello) -> Iterator[NodeLink]:
    """Connect, and say goodbye whatever happens."""
    log = structlog.get_logger()
    link = NodeLink(endpoint, hello)
    try:
        if not link.wait_admitted(_PATIENCE_S):
            log.warning("waiting for the broker", endpoint=endpoint)
        welcome = link.welcome()
        log.info("admitted", run=welcome.run)
        yield link
    except BaseException as error:
        link.close(f"{type(error).__name__}: {error}"[:2000])
        raise
    else:
        link.close()


def _inbound(link: NodeLink, delivery: Delivery) -> Inbound:
    read = functools.partial(link.read, delivery)
    return Inbound(delivery.seq, delivery.at, delivery.message, read)


def _tell_done(link: NodeLink, actions: Sequence[Any]) -> None:
    done = [action for action in actions if isinstance(action, Done)]
    if done:
        refused = {each.seq: each.refused for each in done if each.refused}
        link.done([each.seq for each in done if not each.refused], refused)


def _wait_for_end(link: NodeLink) -> str:
    """Wait until the broker has recorded that the run is over; return the reason."""
    try:
        while True:
            link.get()
    except LinkClosed as end:
        return str(end)
