"""The aggregator's program: its core, and the link that carries out its actions."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import structlog
import torch
from msgspec import UNSET

from fedmq.algorithms.allowed import Allowed
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.toolkit import arithmetic
from fedmq.broker.errors import Rejected, RunOver
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import Hello
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.errors import ConfigError, RunFailed, own_code
from fedmq.nodes.messages.actions import AckUpTo, AggregatorAction, Commit, EndRun, Handled, Start
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.process.terminal import clients_in_words
from fedmq.nodes.run.agreement import Fingerprint, disagree
from fedmq.nodes.run.config import Config
from fedmq.nodes.run.config_difference import differing_keys
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.session import linked, log_rejected, new_session, node_key
from fedmq.nodes.run.setup import check_attainable, set_up
from fedmq.nodes.run.version_zero import version_zero
from fedmq.nodes.run_folder.model_files import remove_model, save_model

_QUIET_S, _REPEAT_S = 5.0, 60.0
"""Seconds without messages before the log names the awaited clients, and between repetitions."""


def run_aggregator(
    endpoint: str,
    config: Config,
    run: str,
    folder: Path | None = None,
    allowed: Allowed | None = None,
    give_up_s: float | None = None,
) -> str:
    """Run an aggregator until its run is over; return why it ended.

    Args:
        endpoint: address of the broker.
        config: the run's configuration.
        run: id of the run.
        folder: of the final model (`run_folder.model_files`) and the node's key; None for neither.
        allowed: user code that the configuration may name, as in `set_up`.
        give_up_s: seconds without the broker after which the node ends; None for never.

    Raises:
        ConfigError: the configuration is invalid, has an unattainable goal, or differs from that
            of the existing run.
        GaveUp: the broker was unavailable for ``give_up_s``.
        OwnCodeError: the problem, its model or the algorithm's first state cannot be made.
        RunFailed: the run ended without reaching its goal.
        Rejected: the broker does not admit this node.
        LinkClosed: the link ended before the run did.
        NodeError: the final model cannot be written; the ledger has it.
    """
    with own_code("problem.name"):
        setup = set_up(config, allowed, run)
        check_attainable(setup)
        torch.set_num_threads(config.worker.threads)
        version_0 = version_zero(setup.problem)
    hello = Hello(
        node=AGGREGATOR,
        role=AGGREGATOR,
        session=new_session(),
        key=node_key(folder / "nodes" / AGGREGATOR if folder is not None else None),
        run=run,
        config=setup.config.to_toml(),
        total_clients=setup.problem.clients,
    )
    computed = Computed(device=kind_of("cpu"), version_0=version_0)
    with own_code("algorithm.name"):
        core = Aggregator(setup, run, AGGREGATOR, computed)
        arithmetic.prepare(sum(each.numel() for each in core.tensors().values()))
    try:
        with linked(endpoint, hello, give_up_s) as link:
            _fold_until_over(link, core, setup.problem, folder, version_0)
    except Rejected as error:
        differ = differing_keys(hello.config, error.config)
        if error.code == "config" and differ:
            raise ConfigError(
                f"run {run} at {endpoint} has another configuration: {differ}; "
                "use the same configuration, or another run.id"
            ) from None
        raise
    except RunOver as end:
        if core.failed:
            raise RunFailed(str(end)) from None
        return str(end)


def _fold_until_over(
    link: NodeLink,
    core: Aggregator,
    problem: Problem,
    folder: Path | None,
    version_0: Fingerprint | None,
) -> NoReturn:
    """Pass the inbox to the core and carry out its actions; raise RunOver at the end of the run."""
    continued = link.welcome().continued
    start = Start(_checkpoint(link), continued=-1 if continued is UNSET else continued)
    actions: Sequence[AggregatorAction] = core.handle(start)
    if folder is not None:
        remove_model(folder)
    unsettled: list[int] = []
    wait_log, repeats = _WaitLog(), Repeats()
    disagreeing: set[str] = set()
    while True:
        for action in actions:
            match action:
                case PostMessage(message, data, consumes):
                    link.post(message, data, consumes)
                case Handled(seq, refused, code) if refused:
                    link.done([], {seq: refused}, {seq: code})
                case AckUpTo(but):
                    link.done([seq for seq in unsettled if seq not in but])
                    unsettled = [seq for seq in unsettled if seq in but]
                case Commit():
                    threading.Thread(target=_work, args=(link, action), daemon=True).start()
                case EndRun(reason, failed, error):
                    if failed:
                        structlog.get_logger().error("failed", reason=reason, exc_info=error)
                    if folder is not None and error is None:
                        # Before the run ends: a later session could not write it.
                        about = {"run": link.welcome().run, "version": str(core.version)}
                        save_model(folder, core.tensors(), problem, about)
                    link.over(reason)
        while not link.wait(_QUIET_S):
            wait_log.update(core.missing_clients())
        delivery = link.get()
        unsettled.append(delivery.seq)
        if delivery.message.kind == "refused":
            log_rejected(delivery.message, repeats)
        sender = delivery.message.sender
        if sender not in disagreeing and disagree(
            version_0, theirs := delivery.message.body.get("version_0")
        ):
            disagreeing.add(sender)
            log = structlog.get_logger()
            log.warning("a node starts from another model", by=sender, here=version_0, there=theirs)
        with link.away():
            actions = core.handle(delivery)


class _WaitLog:
    """Logs the clients that a run waits for: when they change, and every minute."""

    def __init__(self) -> None:
        self._logged: list[int] = []
        self._logged_at = -math.inf

    def update(self, missing: list[int]) -> None:
        """Log the missing clients if it is time."""
        now = time.monotonic()
        if missing and (missing != self._logged or now >= self._logged_at + _REPEAT_S):
            self._logged_at = now
            structlog.get_logger().warning(f"waiting for {clients_in_words(missing)}")
        self._logged = missing


def _work(link: NodeLink, commit: Commit) -> None:
    """Do the work of a commit in a thread, while the core handles its inbox."""
    torch.set_num_threads(torch.get_num_threads())  # torch's setting is per thread
    with contextlib.suppress(Exception):  # raised again when the core asks for the result
        commit.result()
    link.hand_in(commit.message)


def _checkpoint(link: NodeLink) -> Delivery | None:
    """Return the newest checkpoint of an earlier session, or None."""
    found = link.welcome().checkpoint
    if found is None:
        return None
    delivery = Delivery(found.seq, found.at, decode_message(found.message), source=link)
    log = structlog.get_logger()
    log.info("resuming from checkpoint", version=delivery.message.body.get("version"))
    return delivery
