"""The aggregator's program: folds the inbox of its link until the run is over."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import structlog
import torch
from msgspec import UNSET
from structlog.typing import FilteringBoundLogger

from fedmq.algorithms.allowed import Allowed
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.toolkit import arithmetic
from fedmq.broker.access.curve import NodeKeys
from fedmq.broker.errors import Rejected, RunOver
from fedmq.broker.link.events import Delivery
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.encoding import decode_message
from fedmq.broker.wire.schema import Hello
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.aggregator.driver import AggregatorDriver
from fedmq.nodes.aggregator.fleet import Ranges
from fedmq.nodes.errors import ConfigError, RunFailed, own_code
from fedmq.nodes.messages.actions import AggregatorAction, Commit, Handled, Start
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.process.terminal import ranges_in_words
from fedmq.nodes.run.agreement import Fingerprint, disagree
from fedmq.nodes.run.config import Config
from fedmq.nodes.run.config_difference import differing_keys
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.session import linked, log_rejected, new_session, node_key
from fedmq.nodes.run.setup import check_attainable, set_up
from fedmq.nodes.run.version_zero import version_zero
from fedmq.nodes.run_folder.model_files import remove_model, save_model

QUIET_S, _REPEAT_S = 5.0, 60.0
"""Seconds without messages before the log names the awaited clients, and between repetitions."""


def run_aggregator(
    endpoint: str,
    config: Config,
    run: str,
    folder: Path | None = None,
    allowed: Allowed | None = None,
    give_up_s: float | None = None,
    secret: str = "",
    keys: NodeKeys | None = None,
    on_admission: Callable[[], None] | None = None,
) -> str:
    """Run an aggregator until its run is over; return why it ended.

    Args:
        endpoint: address of the broker.
        config: the run's configuration.
        run: id of the run.
        folder: of the final model (`run_folder.model_files`), the node's key and its last session;
            None stores none of them.
        allowed: user code that the configuration may name, as in `set_up`.
        give_up_s: seconds without the broker after which the node ends; None for never.
        secret: proves the node's name without a folder and keys, see `node_key`.
        keys: of the node and the broker; None for a broker without keys.
        on_admission: see `linked`.

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
    own = folder / "nodes" / AGGREGATOR if folder is not None else None
    hello = Hello(
        node=AGGREGATOR,
        role=AGGREGATOR,
        key=node_key(own, secret, keys),
        session=new_session(own),
        run=run,
        config=setup.config.to_toml(),
        total_clients=setup.problem.clients,
    )
    computed = Computed(device=kind_of("cpu"), version_0=version_0)
    with own_code("algorithm.name"):
        core = Aggregator(setup, run, AGGREGATOR, computed)
        arithmetic.prepare(sum(each.numel() for each in core.tensors().values()))
    try:
        with linked(endpoint, hello, give_up_s, keys, on_admission) as link:
            fold_until_over(core, LinkedAggregator(link, setup.problem, folder), version_0)
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


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()


class LinkedAggregator:
    """The `AggregatorPort` of a node program: a link, and files for the model.

    Args:
        link: admitted by the broker.
        problem: makes the module of the final model.
        folder: of the final model; None to save none.
        log: of this node.
        beside: runs a function while the inbox is handled.
        quiet_s: time without messages before the log names the awaited clients, in seconds.
    """

    def __init__(
        self,
        link: NodeLink,
        problem: Problem,
        folder: Path | None = None,
        log: FilteringBoundLogger | None = None,
        beside: Callable[[Callable[[], None]], None] = _in_thread,
        quiet_s: float = QUIET_S,
    ) -> None:
        self.link, self.log = link, log or structlog.get_logger()
        self.post, self.done, self.over = link.post, link.done, link.over
        self._problem, self._folder, self._beside = problem, folder, beside
        self.quiet_s = quiet_s

    def begin_commit(self, commit: Commit) -> None:
        """Do the work of a commit beside the inbox, then post its message."""
        self._beside(functools.partial(self._commit, commit))

    def _commit(self, commit: Commit) -> None:
        torch.set_num_threads(torch.get_num_threads())  # torch's setting is per thread
        with contextlib.suppress(Exception):  # raised again when the core asks for the result
            commit.result()
        self.link.hand_in(commit.message)

    def log_failure(self, reason: str, error: Exception | None) -> None:
        """Log that the run ends without reaching its goal."""
        self.log.error("failed", reason=reason, exc_info=error)

    def save_model(self, core: Aggregator) -> None:
        """Save the final model."""
        if self._folder is not None:
            about = {"run": self.link.welcome().run, "version": str(core.version)}
            save_model(self._folder, core.tensors(), self._problem, about)

    def remove_model(self) -> None:
        """Remove the final model of an earlier session: the run continues."""
        if self._folder is not None:
            remove_model(self._folder)


def fold_until_over(
    core: Aggregator, port: LinkedAggregator, version_0: Fingerprint | None
) -> NoReturn:
    """Pass the inbox to the core and carry out its actions.

    Raises:
        RunOver: at the end of the run.
        BrokerError, NodeError: as in `run_aggregator`.
    """
    link, log = port.link, port.log
    driver = AggregatorDriver(core, port)
    continued = link.welcome().continued
    checkpoint = _checkpoint(port)
    start = Start(checkpoint, continued=-1 if continued is UNSET else continued)
    actions = driver.handle(start)
    port.remove_model()
    wait_log, repeats = _WaitLog(log), Repeats()
    disagreeing: set[str] = set()
    while True:
        driver.carry_out(actions)
        while not link.wait(port.quiet_s):
            wait_log.update(core.missing_clients())
        delivery = link.get()
        message = delivery.message
        if message.kind == "refused":
            log_rejected(message, repeats, log)
        theirs = message.body.get("version_0")
        if message.sender not in disagreeing and disagree(version_0, theirs):
            disagreeing.add(message.sender)
            about = {"by": message.sender, "here": version_0, "there": theirs}
            log.warning("a node starts from another model", **about)
        with link.away():
            actions = driver.handle(delivery)
        if message.kind == "score":
            _log_rejected_score(message.sender, actions, repeats, log)


def _log_rejected_score(
    sender: str, actions: Sequence[AggregatorAction], repeats: Repeats, log: FilteringBoundLogger
) -> None:
    """Log that a score does not count; for each sender and code once, and then a count."""
    for each in actions:
        if not isinstance(each, Handled) or not each.refused:
            continue
        if times := repeats.count((sender, each.code), time.monotonic()):
            log.warning("score rejected", by=sender, reason=each.refused, times=times)


class _WaitLog:
    """Logs the clients that a run waits for: when they change, and every minute."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._logged: Ranges = []
        self._logged_at = -math.inf

    def update(self, missing: Ranges) -> None:
        """Log the missing clients if it is time."""
        now = time.monotonic()
        if missing and (missing != self._logged or now >= self._logged_at + _REPEAT_S):
            self._logged_at = now
            self._log.warning(f"waiting for {ranges_in_words(missing)}")
        self._logged = missing


def _checkpoint(port: LinkedAggregator) -> Delivery | None:
    """Return the newest checkpoint of an earlier session, or None."""
    found = port.link.welcome().checkpoint
    if found is None:
        return None
    delivery = Delivery(found.seq, found.at, decode_message(found.message), source=port.link.blobs)
    port.log.info("resuming from checkpoint", version=delivery.message.body.get("version"))
    return delivery
