"""The Aggregator core: a schedule and an algorithm, folded over an inbox.

``handle(event) -> [action]``, without sockets, clock (a message's time is the time at which the
broker accepted it) or randomness of its own. The same inbox gives the same actions, so a run can
be recovered and replayed: a restarted aggregator starts from its last checkpoint and folds the
later messages. Its posts then have the same ids as before, so that the broker recognizes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fedmq.algorithms.base import OpaqueState
from fedmq.algorithms.schedules import ScheduleView
from fedmq.broker.errors import BrokerError
from fedmq.broker.link.events import Delivery
from fedmq.broker.rejections import Code, Rejection
from fedmq.broker.wire.addresses import CHECKPOINT, CONTINUED, RECORD, TIMER
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.checkpoint import pack_checkpoint, unpack_checkpoint
from fedmq.nodes.aggregator.evaluations import (
    Evaluations,
    accuracy_in,
    metrics_without_accuracy,
    requests,
)
from fedmq.nodes.aggregator.progress import CHECKS_SIZES
from fedmq.nodes.aggregator.state import AggregatorState
from fedmq.nodes.aggregator.version import DeferredResults
from fedmq.nodes.errors import NodeError, exits_as_errors, own_code
from fedmq.nodes.messages.actions import AckUpTo, AggregatorAction, Commit, EndRun, Handled, Start
from fedmq.nodes.messages.metrics import accuracy_of, metrics_fault
from fedmq.nodes.process.exception_text import explained, may_pass, modules_of
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.goal import Goal

FINAL_EVALUATION_S = 60.0
"""Seconds without an answer after which the end of a run stops waiting for evaluations."""
_FINAL = "final evaluation"
_RETRY = "retry"


class Aggregator(AggregatorState):
    """The core of one run's aggregator; `AggregatorState` lists its arguments."""

    def handle(self, event: Start | Delivery) -> list[AggregatorAction]:
        """Handle one event; return the actions to carry out, in order.

        An error of the algorithm's code ends the run: a restarted aggregator would meet it again.

        Raises:
            BrokerError: a blob cannot be read now.
            NodeError: the checkpoint does not fit.
        """
        try:
            with exits_as_errors():
                return self._handle(event)
        except (BrokerError, NodeError):
            raise
        except Exception as error:  # the algorithm can be a user's code
            if may_pass(error) or isinstance(error.__cause__, BrokerError):
                raise
            return self._break_off(error)

    def _handle(self, event: Start | Delivery) -> list[AggregatorAction]:
        out: list[AggregatorAction] = []
        if isinstance(event, Start):
            self._continues_at = event.continued
            if event.checkpoint is None:
                self._begin_run(event.run_record, out)
            else:
                self._resume(event.checkpoint, out)
            return out
        message = event.message
        if event.seq in self._deferred.awaited:
            self._deferred.add(event)
            self._advance(out)
            return out
        if event.seq <= self._position:
            return [AckUpTo(self._deferred.unsettled)]  # the checkpoint includes it
        self._position, self._now = event.seq, event.at
        self._progress.now = event.at
        self._note_received(message)
        why: Rejection | None = None
        if message.kind == CONTINUED:
            self._continued(message, out)
            self._advance(out)
        elif not self._ended:
            match message.kind:
                case "joined":
                    self._joined(message, out)
                case "left":
                    self._tasks.went_away(self._fleet.left(message))
                case "availability":
                    why = self._availability(message)
                    self._begin_if_all_joined(out)
                    self._advance(out, starts=message.body.get("more") is not True)
                    return [Handled.of(event.seq, why), *out]
                case "tick":
                    self._tick(str(message.body.get("token")), out)
                case "failed" if message.re in self._evaluations.asked:
                    why = self._score(message)
                case "result" | "failed" if self._committing is not None:
                    self._deferred.add(event)
                    return out
                case "result" | "failed":
                    self._results.take(event, out)
                    self._advance(out)
                    return out
                case "score":
                    why = self._score(message)
                case "refused":
                    self._refused(message)
                case kind:
                    why = Rejection(Code.UNKNOWN_KIND, f"an aggregator takes no {kind!r} messages")
            self._advance(out)
        return [Handled.of(event.seq, why), *out]

    def adopt(self, state: OpaqueState) -> None:
        """Replace the state of the current version, such as by the recorded one in a replay."""
        self._results.current.adopt(state)
        self._tasks.adopt()

    # ---- the run

    def _begin_run(self, recorded: Delivery | None, out: list[AggregatorAction]) -> None:
        """Post the run's record: its configuration and version 0."""
        body: dict[str, Any] = {"config": self._setup.config.to_toml()}
        if self._goal.max_wall_s is not None:
            self._set_wall_timer(0.0, out)  # its tick has the time of the run's start
        if self._computed.arithmetic < 2:  # a run of 0.1.0, whose record has no version 0
            self._post(out, "run", RECORD, body)
            return
        if recorded is not None:
            state, _ = unpack_checkpoint(self._algorithm, self._setup.problem, recorded)
            self._results.begin_version(state, 0)
        self._checkpoint("run", {**body, **self._computed.facts()}, out)

    # ---- the fleet

    def _joined(self, message: Message, out: list[AggregatorAction]) -> None:
        back, away = self._fleet.joined(message)
        self._tasks.came_back(back)
        self._tasks.went_away(away)
        self._begin_if_all_joined(out)

    def _begin_if_all_joined(self, out: list[AggregatorAction]) -> None:
        wanted = self._settings.min_clients or self._setup.problem.clients
        if not self._running and self._fleet.suffice(wanted):
            self._running = True
            self._evaluate_if_due(out)

    def _continued(self, message: Message, out: list[AggregatorAction]) -> None:
        """Handle the resumption of the run: wait for its nodes, and apply an extended goal."""
        self._tasks.went_away(self._fleet.all_gone())
        self._running, self._asked_final = False, None
        self._spent.stopped_s += message.body.get("stopped_s", 0.0)
        if not message.body["further"]:
            return
        self._goal, self._failed, self._error = Goal.of_continued(message.body), False, None
        self._finishing = self._goal.after(self.version)
        if self._goal.max_wall_s is not None:
            self._set_wall_timer(0.0, out)
        self._progress.start_over()
        self._progress.allow(self._goal.failures)
        if self._ended:  # tasks and evaluations from before the end get no answer
            self._ended = False
            self._tasks.resume({})
            self._evaluations = Evaluations()
            self._results.begin_version(self.state, self.version)

    def _tick(self, token: str, out: list[AggregatorAction]) -> None:
        if token == f"deadline/{self.version}":
            # Stop waiting for this version's tasks; draw other clients for missing results.
            self._results.current.pass_deadline()
            self._tasks.past_deadline(self.version)
        elif self._committing is not None and token == self._committing.token:
            commit, self._committing = self._committing, None
            self._committed(commit.result(), out)
        elif token == self._wall_timer:
            self._wall_time(out)
        elif token == _FINAL and self._finishing:
            if len(self._evaluations.asked) == self._asked_final:
                self._end(out)
            self._asked_final = None  # an answer came: wait again
        elif token == _RETRY:
            self._progress.timer_is_over(self._fleet)

    def _refused(self, message: Message) -> None:
        """Handle the rejection of one of our messages: not usable, or not deliverable."""
        name = str(message.body.get("id"))
        if name in self._evaluations.asked:
            self._evaluated_as(name, None)
        self._results.undelivered(name, message)

    def _score(self, message: Message) -> Rejection | None:
        name = message.re or ""
        if not self._evaluations.is_with(name, message.sender, self._fleet):
            text = f"no evaluation {message.re!r} is with {message.sender}"
            return Rejection(Code.UNKNOWN_TASK, text)
        accuracy, why = accuracy_in(message)
        if self._progress.rules >= CHECKS_SIZES and message.kind == "score":
            metrics = message.body.get("metrics")
            why = metrics_fault(metrics, self._setup.problem.metric_range)
            accuracy = None if why or not isinstance(metrics, dict) else accuracy_of(metrics)
        of_model = name not in self._evaluations.client_evaluations
        self._evaluated_as(name, accuracy)
        if self._progress.rules and of_model and (key := self._goal.needs_accuracy):
            found = metrics_without_accuracy(message) if why is None else None
            if found is not None:
                self._fail(f"{key}: expected accuracy among the metrics, got {found}")
            failed = str(message.body.get("reason")) if message.kind == "failed" else ""
            failed = why.reason if why is not None else failed
            if hopeless := self._progress.evaluated(failed, key):
                self._fail(hopeless)
        return why

    # ---- versions

    def _advance(self, out: list[AggregatorAction], *, starts: bool = True) -> None:
        """Commit versions and start tasks until neither is possible; ``starts``: tasks, too."""
        while self._running and not self._reaches_limit():
            if self._committing is not None or self._deferred.awaited:
                return
            for delivery in self._deferred.take():
                self._results.take(delivery, out)
            self._results.add_in_order(out)
            current = self._results.current
            # A held result may still be used.
            if self._progress.hopeless and not current.held:
                self._fail(self._progress.hopeless)
                break
            view = self._tasks.view(current)
            if current.is_ready(view) and current.held:
                self._results.add_in_order(out, everything=True)
                # A held result may have been rejected.
                view = self._tasks.view(current)
            if not current.is_ready(view):
                if starts:
                    self._start_tasks(view, out)
                return
            self._commit(out)
        # The end rejects deferred results: those of an earlier session must be here, too.
        if self._finishing and self._running and not (self._ended or self._deferred.awaited):
            self._finish(out)

    def _start_tasks(self, view: ScheduleView, out: list[AggregatorAction]) -> None:
        current = self._results.current
        wanted = self._schedule.num_to_start(view)
        clients = self._tasks.draw(wanted, current)
        # A round with clients at work continues without the clients that failed.
        if len(clients) < wanted and not (self._schedule.ordered and (clients or view.outstanding)):
            after = self._progress.timer(self._fleet)
            if after is not None:
                self._post(out, "timer", TIMER, {"token": _RETRY, "after_s": after})
        deadline = self._schedule.deadline()
        if deadline is not None and clients and (current.deadline_passed or not current.order):
            body = {"token": f"deadline/{self.version}", "after_s": deadline}
            self._post(out, "timer", TIMER, body)
        for client in clients:
            packed = self._tasks.pack(current, client)
            about = {"client": client, "model_version": self.version, "reply": current.reply}
            body = {**packed.body, **about}
            name = self._request(out, "task", f"client/{client}", body, packed)
            self._tasks.sent(name, client, self.version)
            current.sent(name)

    def _commit(self, out: list[AggregatorAction]) -> None:
        current = self._results.current
        if not self._algorithm.commits_in_background:
            self._committed(current.commit(), out)
            return
        # The commit runs beside the inbox; it takes effect at a tick in the inbox.
        token = f"commit/{self.version + 1}"
        timer = self._messages.write("timer", TIMER, {"token": token, "after_s": 0})
        self._committing = Commit(token, timer, current.commit)
        out.append(self._committing)

    def _committed(self, state: OpaqueState, out: list[AggregatorAction]) -> None:
        closed = self._results.current
        cohort = self._schedule.cohort(self._setup.problem.clients)
        self._results.begin_version(state, closed.version + 1)
        self._progress.version = self.version
        body = {
            "version": self.version,
            "position": self._position,
            **closed.facts(),
            **({} if cohort is None else {"cohort": cohort}),
            "model_digest": model_digest(self.tensors()),
            **msgspec.structs.asdict(self._results.counts),
        }
        if self._is_checkpoint_due():
            self._checkpoint("version", body, out)
        else:
            self._post(out, "version", RECORD, body)
        self._begin_version(out)

    def _begin_version(self, out: list[AggregatorAction]) -> None:
        """Begin a version, after a commit or after a restart from a checkpoint."""
        self._finishing = self._goal.after(self.version) or self._finishing
        self._evaluate_if_due(out)

    def _checkpoint(self, kind: str, body: Mapping[str, Any], out: list[AggregatorAction]) -> None:
        """Post a record from which a later session can start, and acknowledge what it includes."""
        self._checkpoint_at, self._since_checkpoint = self._now, 0
        unsettled = self._deferred.leave_unsettled()
        packed = pack_checkpoint(self._algorithm, self.state, self._fold())
        self._post(out, kind, CHECKPOINT, {**packed.body, **body}, packed)
        out.append(AckUpTo(unsettled))

    def _resume(self, delivery: Delivery, out: list[AggregatorAction]) -> None:
        """Restore the state from a checkpoint and continue."""
        # An error of a user's code here must not end the run from a state that is not restored.
        with own_code("algorithm.name"):
            state, fold = unpack_checkpoint(self._algorithm, self._setup.problem, delivery)
            self._computed.check(fold.arithmetic, delivery.message.run)
            self._progress.rules = fold.rules
            self._results.begin_version(state, fold.version)
        self._position = fold.position
        self._messages.next_id, self._results.counts = fold.next_id, fold.counts
        about = (fold.evaluators, fold.unavailable, fold.unreported or ())
        self._fleet.resume(fold.ranges(), *about)
        self._fleet.expects_evaluator = fold.expects_evaluator is True
        self._tasks.resume(fold.outstanding)
        self._evaluations = Evaluations(set(fold.evaluating), fold.client_evaluations, fold.scores)
        self._deferred = DeferredResults(awaited=set(fold.deferred), unsettled=tuple(fold.deferred))
        self._evaluated, self._running = fold.evaluated, fold.running
        self._finishing, self._ended, self._failed = fold.finishing, fold.ended, fold.failed
        self._asked_final = fold.asked_final or None
        self._now = self._checkpoint_at = fold.at
        self._progress.resume(fold.failures, fold.rules, self.version, self._now)
        self._goal, self._spent = fold.goal or self._goal, fold.spent
        self._wall_timer = fold.wall_timer
        self._progress.allow(self._goal.failures)
        if self._ended:
            self._report_end(out)
            return
        if fold.version or self._running:  # else the broker reports the connected nodes again
            self._begin_version(out)
            self._advance(out)

    def _evaluate_if_due(self, out: list[AggregatorAction]) -> None:
        every = self._settings.evaluate_every
        if every and self.version % every == 0 and self._evaluated != self.version:
            self._evaluate(out)

    def _evaluate(self, out: list[AggregatorAction]) -> None:
        self._evaluated = self.version
        clients = self._fleet.reachable.all().tolist()
        for to, body, packed, of in requests(self._algorithm, self.state, self.version, clients):
            self._evaluations.ask(self._request(out, "evaluate", to, body, packed), of)

    def _break_off(self, error: Exception) -> list[AggregatorAction]:
        """End the run at once, because the algorithm raised an error."""
        own = modules_of(self._algorithm, self._setup.problem)
        why = f"{self._algorithm.name} raised {explained(error, own)}"
        self._finishing, self._failed, self._error = why, True, error
        out: list[AggregatorAction] = []
        try:
            self._end(out)
        except Exception:  # noqa: BLE001 - the state cannot be saved either: keep the last checkpoint
            self._ended, out = True, []
            body = {"reason": why, "position": self._position, "failed": True}
            self._post(out, "finished", RECORD, body)
            self._report_end(out)
        return out

    def _finish(self, out: list[AggregatorAction]) -> None:
        if self._failed:
            self._end(out)
            return
        if self._evaluated != self.version:
            self._evaluate(out)
        if not self._evaluations.awaited(self._fleet):
            self._end(out)
        elif self._asked_final is None:
            self._asked_final = len(self._evaluations.asked)
            body = {"token": _FINAL, "after_s": FINAL_EVALUATION_S}
            self._post(out, "timer", TIMER, body)

    def _end(self, out: list[AggregatorAction]) -> None:
        self._ended, self._committing, self._asked_final = True, None, None
        self._results.end(self._deferred.take(), out)
        self._deferred = DeferredResults()
        about: dict[str, Any] = {"reason": self._finishing, "position": self._position}
        about |= {"failed": True} if self._failed else {}
        body = {**about, **msgspec.structs.asdict(self._results.counts)}
        self._checkpoint("finished", body, out)
        self._report_end(out)

    def _report_end(self, out: list[AggregatorAction]) -> None:
        if self._position >= self._continues_at:  # else a later message extends the run's goal
            out.append(EndRun(self._finishing, self._failed, self._error))
