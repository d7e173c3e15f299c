"""The aggregator's program: its core, and the link that carries out what it says."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import structlog
import torch

from fedmq.broker.errors import RunOver
from fedmq.broker.headers import decode_message
from fedmq.broker.link_state import Delivery
from fedmq.broker.node_link import NodeLink
from fedmq.broker.state import AGGREGATOR
from fedmq.broker.wire import Hello
from fedmq.nodes.aggregator import Aggregator, Start
from fedmq.nodes.config import Config
from fedmq.nodes.inbox import AggregatorAction, Commit, Done, Finish, Inbound, Post, Settle
from fedmq.nodes.local import node_key
from fedmq.nodes.programs import inbound_of, linked, new_session
from fedmq.nodes.setup import set_up


def run_aggregator(endpoint: str, config: Config, run: str, folder: Path | None = None) -> str:
    """Run an aggregator until its run is over; return why it ended.

    Args:
        endpoint: where the broker listens.
        config: the run's configuration.
        run: id of the run.
        folder: where to leave the final model as ``model.npz``, and to keep the node's key;
            None keeps nothing.

    Raises:
        ConfigError: the configuration is unusable.
        Rejected: the broker does not admit this node.
        LinkClosed: the link ended before the run did.
    """
    setup = set_up(config)
    torch.set_num_threads(config.worker.threads)
    hello = Hello(
        node=AGGREGATOR,
        role=AGGREGATOR,
        session=new_session(),
        key=node_key(folder / "nodes" / AGGREGATOR if folder is not None else None),
        run=run,
        config=setup.config.to_toml(),
        total_clients=setup.problem.clients,
    )
    core = Aggregator(setup, run, AGGREGATOR)
    try:
        with linked(endpoint, hello) as link:
            _fold_until_over(link, core, folder)
    except RunOver as end:
        return str(end)


def _fold_until_over(link: NodeLink, core: Aggregator, folder: Path | None) -> NoReturn:
    """Give the core its inbox, and carry out what it says; raises RunOver in the end."""
    actions: Sequence[AggregatorAction] = core.handle(Start(_checkpoint(link)))
    unsettled: list[int] = []
    while True:
        with link.together():
            for action in actions:
                match action:
                    case Post(message, data, consumes):
                        link.post(message, data, consumes)
                    case Done(seq, refused) if refused:
                        link.done([], {seq: refused})
                    case Settle(but):
                        link.done([seq for seq in unsettled if seq not in but])
                        unsettled = [seq for seq in unsettled if seq in but]
                    case Commit():
                        threading.Thread(target=_work, args=(link, action), daemon=True).start()
                    case Finish(reason):
                        if folder is not None:
                            _save(folder, core)
                        link.over(reason)
        delivery = link.get()
        unsettled.append(delivery.seq)
        with link.away():
            actions = core.handle(inbound_of(link, delivery))


def _work(link: NodeLink, commit: Commit) -> None:
    """Do what takes long, while the core goes on with its inbox."""
    torch.set_num_threads(torch.get_num_threads())  # each thread has a number of its own
    with contextlib.suppress(Exception):  # the core meets it when it asks for the result
        commit.result()
    link.hand_in(commit.message)


def _save(folder: Path, core: Aggregator) -> None:
    """Leave the model; before the run is over, because then no session is started any more."""
    # numpy has no bfloat16; each of its values is one of float32.
    arrays = {
        name: (each.float() if each.dtype == torch.bfloat16 else each).numpy()
        for name, each in core.tensors().items()
    }
    np.savez(folder / "model.npz", allow_pickle=False, **arrays)


def _checkpoint(link: NodeLink) -> Inbound | None:
    """Return the checkpoint of the session before this one, if there was one."""
    found = link.welcome().checkpoint
    if found is None:
        return None
    delivery = Delivery(found.seq, found.at, decode_message(found.message), {})
    log = structlog.get_logger()
    log.info("goes on from a checkpoint", version=delivery.message.body.get("version"))
    return inbound_of(link, delivery)
