"""The aggregator's program: its core, and the link that carries out what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedmq.broker.dealer import NodeLink
from fedmq.broker.errors import LinkClosed
from fedmq.broker.state import AGGREGATOR
from fedmq.broker.wire import Hello
from fedmq.nodes.aggregator import Action, Aggregator, Start
from fedmq.nodes.config import Config
from fedmq.nodes.inbox import Done, Finish, Post, Tick
from fedmq.nodes.programs import inbound_of, linked, new_session
from fedmq.nodes.setup import set_up


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
    with linked(endpoint, hello) as link:
        actions: Sequence[Action] = core.handle(Start())
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
            inbound = inbound_of(link, link.get())
            with link.away():
                actions = core.handle(inbound)
        reason = _wait_for_end(link)
    if folder is not None:
        arrays = {name: each.numpy() for name, each in core.tensors().items()}
        np.savez(folder / "model.npz", allow_pickle=False, **arrays)
    return reason


def _tell_done(link: NodeLink, actions: Sequence[Action]) -> None:
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
