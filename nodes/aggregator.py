"""The Aggregator core: a schedule and an algorithm, folded over an inbox.

``handle(event) -> [action]``, and nothing else: no sockets, no clock (a message's time is
the time at which the broker wrote it down), no randomness of its own. The same inbox
gives the same actions, which is what makes a run recoverable and replayable: a restarted
aggregator starts from its last checkpoint, folds what came after, and what it says then
has the ids that it had before, so the broker knows it again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor

from fedmq.algorithms.base import examples_of
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.rng import derive_seed
from fedmq.algorithms.schedules import View
from fedmq.broker.state import CHECKPOINT, EVALUATOR, RECORD, TIMER
from fedmq.broker.wire import Message
from fedmq.codecs.errors import CodecError
from fedmq.nodes.checkpoint import (
    Counts,
    Flight,
    Fold,
    pack_checkpoint,
    unpack_checkpoint,
)
from fedmq.nodes.digests import model_digest
from fedmq.nodes.evaluations import Evaluations, Examination, accuracy_in
from fedmq.nodes.gathering import Gathering, Waiting, room_for
from fedmq.nodes.inbox import Commit, Done, Finish, Inbound, Post, Settle
from fedmq.nodes.members import Members
from fedmq.nodes.payload import RAW, Packed, numbers_of, pack
from fedmq.nodes.setup import Setup

FINAL_EVALUATION_S = 60.0
"""How long the end of a run waits for an answer to any of the evaluations that are out."""
_FINAL = "final evaluation"


@dataclass(frozen=True)
class Start:
    """The node has been admitted; ``checkpoint``: the newest of the session before it."""

    checkpoint: Inbound | None = None


Action = Post | Done | Settle | Finish | Commit


class Aggregator:
    """The state of one run at its aggregator.

    Args:
        setup: what is learned, how, and when.
        run: id of the run.
        node: this node's name.
    """

    def __init__(self, setup: Setup, run: str, node: str) -> None:
        self._setup = setup
        self._settings = setup.config.run
        self._run, self._node = run, node
        self._algorithm, self._schedule = setup.algorithm, setup.schedule
        self._reply = self._algorithm.sends or self._schedule.reply
        self.state = self._algorithm.start(setup.problem)
        self._most_bytes = room_for(self._algorithm, self.state)
        self.version = 0
        self._current = Gathering(self._algorithm.gather(self.state))
        self._flights: dict[str, Flight] = {}
        self._members = Members()
        self._evaluations = Evaluations()
        self._committing: tuple[Gathering, Commit] | None = None
        self._waiting = Waiting()
        self._counts = Counts()
        self._running = False
        self._finishing = ""
        self._asked_final: int | None = None
        self._ended = False
        self._evaluated = -1
        self._next_id = 0
        self._position = -1
        self._now = 0.0
        self._checkpoint_at = -math.inf
        self._task_cache: Packed | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the current model by name."""
        return self._algorithm.tensors(self.state)

    def parts(self) -> dict[str, Any]:
        """Return all that this core is made of, by name, for whoever looks for a difference."""
        current = self._current
        return {
            "position": self._position,
            "version": self.version,
            "state": self.state,
            "gathered": current.gathered,
            "weights": current.weights,
            "results": current.absorbed,
            "staleness": current.staleness,
            "held": sorted(current.held),
            "tasks": self._flights,
            "hosts": self._members.hosts,
            "evaluating": sorted(self._evaluations.asked),
            "examinations": self._evaluations.examinations,
            "scores": self._evaluations.scores,
            "committing": self._committing[1].token if self._committing else "",
            "waiting": list(self._waiting.numbers()),
            "counts": self._counts,
            "next_id": self._next_id,
        }

    def handle(self, event: Start | Inbound) -> list[Action]:
        """Take one event; return what is to be done, in order."""
        out: list[Action] = []
        if isinstance(event, Start):
            if event.checkpoint is None:
                self._post(out, "run", RECORD, {"config": self._setup.config.to_toml()})
            else:
                self._resume(event.checkpoint, out)
            return out
        message = event.message
        if event.seq in self._waiting.missing:
            self._waiting.add(event)
            self._advance(out)
            return out
        if event.seq <= self._position:
            return [Settle(self._waiting.untold)]  # the checkpoint tells of it
        self._position, self._now = event.seq, event.at
        reason = ""
        if not self._ended:
            match message.kind:
                case "joined":
                    self._joined(message, out)
                case "left":
                    self._members.left(message)
                case "tick":
                    self._tick(str(message.body.get("token")), out)
                case "failed" if message.re in self._evaluations.asked:
                    reason = self._score(message)
                case "result" | "failed" if self._committing is not None:
                    self._waiting.add(event)
                    return out
                case "result" | "failed":
                    held = self._result(event, out)
                    if held is None:
                        self._advance(out)
                        return out
                    reason = held
                case "score":
                    reason = self._score(message)
                case "refused":
                    self._refused(str(message.body.get("id")))
                case kind:
                    reason = f"an aggregator takes no {kind!r} messages"
            self._advance(out)
        out.insert(0, Done(event.seq, reason))
        return out

    # ---- the fleet

    def _joined(self, message: Message, out: list[Action]) -> None:
        self._members.joined(message)
        wanted = self._settings.min_clients or self._setup.problem.clients
        if not self._running and len(self._members.hosts) >= wanted:
            self._running = True
            self._begin_version(out)

    def _tick(self, token: str, out: list[Action]) -> None:
        if token == f"deadline/{self.version}":
            # Nobody is awaited any longer: if results are still missing, others are drawn.
            self._current.deadline_passed = True
            for flight in self._flights.values():
                flight.overdue |= flight.version == self.version
        elif self._committing is not None and token == self._committing[1].token:
            (closed, commit), self._committing = self._committing, None
            self._committed(closed, commit.result(), out)
        elif token == _FINAL and self._finishing:
            if len(self._evaluations.asked) == self._asked_final:
                self._end(out)
            self._asked_final = None  # while answers come, it goes on

    def _refused(self, name: str) -> None:
        """One of our own messages could not be used by its recipient, or not be delivered."""
        if name in self._evaluations.asked:
            self._evaluated_as(name, None)
        if self._flights.pop(name, None) is not None:
            self._counts.dropped += 1

    # ---- results

    def _result(self, inbound: Inbound, out: list[Action]) -> str | None:
        """Take a result: "" if used or not needed, a reason if refused, None if held."""
        message = inbound.message
        flight = self._flights.get(message.re or "")
        if flight is None or message.re is None:
            self._counts.refused += 1
            return f"no task {message.re!r} is out"
        if message.sender not in (flight.node, self._members.hosts.get(flight.client)):
            self._counts.refused += 1
            return f"task {message.re!r} is not with {message.sender}"
        del self._flights[message.re]
        if message.kind == "failed":
            self._counts.dropped += 1
            return ""
        staleness = self.version - flight.version
        try:
            numbers = numbers_of(message)
            n = examples_of(numbers)
            if numbers.get("reply", self._reply) != self._reply:
                raise ResultError(f"expected reply {self._reply!r}")
        except (ResultError, CodecError) as error:
            self._counts.refused += 1
            return str(error)
        weight = self._schedule.weight(n, staleness)
        if weight is None:
            self._counts.stale += 1
            return f"too stale: {staleness} versions behind"
        self._current.staleness.append(staleness)
        if self._schedule.ordered and not staleness:
            self._current.held[message.re] = (inbound, weight, flight.client)
            self._current.contributed.add(flight.client)
            self._absorb_in_order(out)
            return None
        return self._absorb(inbound, weight, flight.client, staleness)

    def _absorb_in_order(self, out: list[Action], *, everything: bool = False) -> None:
        """Add up held results in cohort order, up to the first that is still out."""
        current = self._current
        if not current.held:
            return
        for name in current.order:
            if name in current.held:
                inbound, weight, client = current.held.pop(name)
                refused = self._absorb(inbound, weight, client, 0)
                if refused:
                    current.contributed.discard(client)
                out.append(Done(inbound.seq, refused))
            elif not everything and name in self._flights and self._reachable(name):
                return

    def _absorb(self, inbound: Inbound, weight: float, client: int, staleness: int) -> str:
        """Add one result to the version; return why it was refused, or ""."""
        about = client, staleness
        reason = self._current.absorb(
            self._algorithm, self.state, inbound, weight, about, self._most_bytes
        )
        self._counts.refused += bool(reason)
        self._counts.used += not reason
        return reason

    def _score(self, message: Message) -> str:
        name = message.re or ""
        if not self._evaluations.is_with(name, message.sender, self._members):
            return f"no evaluation {message.re!r} is with {message.sender}"
        accuracy, reason = accuracy_in(message)
        self._evaluated_as(name, accuracy)
        return reason

    def _evaluated_as(self, name: str, accuracy: float | None) -> None:
        """An evaluation is over; the run may be too."""
        known = self._evaluations.end(name, accuracy)
        target = self._settings.target_accuracy
        met = known is not None and target is not None and known >= target
        if met and not self._finishing:
            self._finishing = f"accuracy {known:.4f} reached the target of {target:g}"

    # ---- versions

    def _advance(self, out: list[Action]) -> None:
        """Commit and start whatever can be, until nothing changes."""
        while self._running and not self._finishing:
            if self._committing is not None or self._waiting.missing:
                return
            self._take_waiting(out)
            self._absorb_in_order(out)
            view = self._view()
            if self._schedule.closes(view) and self._current.held:
                self._absorb_in_order(out, everything=True)
                view = self._view()  # a held result may have been refused
            if not self._schedule.closes(view):
                self._start_tasks(view, out)
                return
            self._commit(out)
        if self._finishing and not self._ended:
            self._finish(out)

    def _take_waiting(self, out: list[Action]) -> None:
        """Take the results that came while the version before this one was being committed."""
        waiting, self._waiting.here = self._waiting.here, {}
        for seq, inbound in waiting.items():
            reason = self._result(inbound, out)
            if reason is not None:
                out.append(Done(seq, reason))

    def _view(self) -> View:
        reachable = [name for name in self._flights if self._reachable(name)]
        current = self._current
        return View(
            clients=self._setup.problem.clients,
            flying=len(reachable),
            started=current.started,
            outstanding=sum(
                flight.version == self.version and not flight.overdue
                for flight in map(self._flights.__getitem__, reachable)
            ),
            results=current.absorbed + len(current.held),
            deadline_passed=current.deadline_passed,
        )

    def _reachable(self, name: str) -> bool:
        return self._flights[name].client in self._members.hosts

    def _start_tasks(self, view: View, out: list[Action]) -> None:
        current = self._current
        clients = self._draw(self._schedule.wants(view))
        deadline = self._schedule.deadline()
        if deadline is not None and clients and (current.deadline_passed or not current.started):
            body = {"token": f"deadline/{self.version}", "after_s": deadline}
            self._post(out, "timer", TIMER, body)
        for client in clients:
            packed = self._pack_task(client)
            about = {"client": client, "model_version": self.version, "reply": self._reply}
            body = {**packed.body, **about}
            name = self._post(out, "task", f"client/{client}", body, packed)
            self._flights[name] = Flight(client, self.version, self._members.hosts[client])
            current.order.append(name)
            current.started += 1

    def _draw(self, count: int) -> list[int]:
        """Return so many reachable clients that have no task, or all of them, in order."""
        if not count:
            return []
        busy = {flight.client for flight in self._flights.values()}
        idle = sorted(set(self._members.hosts) - busy - self._current.contributed)
        return self._current.draw(idle, count, self._settings.seed, self.version)

    def _pack_task(self, client: int) -> Packed:
        if self._task_cache is not None and not self._algorithm.personal:
            return self._task_cache
        seed = derive_seed(self._settings.seed, "downlink", self.version, client)
        task = self._algorithm.task(self.state, client)
        self._task_cache = pack(task, self._setup.downlink, seed)
        return self._task_cache

    def _commit(self, out: list[Action]) -> None:
        closed = self._current
        divisor = self._schedule.divisor(closed.weights, closed.absorbed)
        work = functools.partial(self._algorithm.commit, self.state, closed.gathered, divisor)
        if not self._algorithm.trains:
            self._committed(closed, work(), out)
            return
        # It is done beside the inbox, and a tick in the inbox says from where on it counts.
        token = f"commit/{self.version + 1}"
        commit = Commit(token, self._message("timer", TIMER, {"token": token, "after_s": 0}), work)
        self._committing = closed, commit
        out.append(commit)

    def _committed(self, closed: Gathering, state: Any, out: list[Action]) -> None:
        self.state = state
        staleness = closed.staleness
        self.version += 1
        self._task_cache = None
        self._current = Gathering(self._algorithm.gather(self.state))
        body = {
            "version": self.version,
            "position": self._position,
            "results": closed.absorbed,
            "weights": closed.weights,
            "mean_staleness": sum(staleness) / len(staleness) if staleness else 0.0,
            "max_staleness": max(staleness, default=0),
            "model_digest": model_digest(self.tensors()),
            **msgspec.structs.asdict(self._counts),
        }
        if self._now - self._checkpoint_at >= self._settings.checkpoint_s:
            self._checkpoint("version", body, out)
        else:
            self._post(out, "version", RECORD, body)
        self._go_on(out)

    def _go_on(self, out: list[Action]) -> None:
        """What follows a commit, whether it was just now or before a restart."""
        if self.version >= self._settings.versions:
            self._finishing = f"{self.version} versions committed"
        self._begin_version(out)

    def _checkpoint(self, kind: str, body: Mapping[str, Any], out: list[Action]) -> None:
        """Post a record from which the next session can start; what came before is settled."""
        self._checkpoint_at = self._now
        self._waiting.untold = self._waiting.numbers()
        fold = Fold(
            position=self._position,
            at=self._now,
            version=self.version,
            next_id=self._next_id + 1,
            flights=self._flights,
            hosts=self._members.hosts,
            evaluators=sorted(self._members.evaluators),
            evaluating=sorted(self._evaluations.asked),
            evaluated=self._evaluated,
            examinations=self._evaluations.examinations,
            scores=self._evaluations.scores,
            waiting=list(self._waiting.untold),
            counts=self._counts,
            running=self._running,
            finishing=self._finishing,
            ended=self._ended,
        )
        packed = pack_checkpoint(self._algorithm, self.state, fold)
        self._post(out, kind, CHECKPOINT, {**packed.body, **body}, packed)
        out.append(Settle(self._waiting.untold))

    def _resume(self, inbound: Inbound, out: list[Action]) -> None:
        """Start from a checkpoint, and go on as the session before it did."""
        self.state, fold = unpack_checkpoint(self._algorithm, self._setup.problem, inbound)
        self._current = Gathering(self._algorithm.gather(self.state))
        self._position, self.version, self._next_id = fold.position, fold.version, fold.next_id
        self._flights, self._members.hosts, self._counts = fold.flights, fold.hosts, fold.counts
        self._members.evaluators = set(fold.evaluators)
        self._evaluations = Evaluations(set(fold.evaluating), fold.examinations, fold.scores)
        self._waiting = Waiting(missing=set(fold.waiting), untold=tuple(fold.waiting))
        self._evaluated, self._running = fold.evaluated, fold.running
        self._finishing, self._ended = fold.finishing, fold.ended
        self._now = self._checkpoint_at = fold.at
        if self._ended:
            out.append(Finish(self._finishing))
            return
        self._go_on(out)
        self._advance(out)

    def _begin_version(self, out: list[Action]) -> None:
        every = self._settings.evaluate_every
        if every and self.version % every == 0:
            self._evaluate(out)

    def _evaluate(self, out: list[Action]) -> None:
        self._evaluated = self.version
        if self._algorithm.evaluated == "model":
            packed = pack(self._algorithm.examined(self.state), RAW, 0)
            body = {**packed.body, "model_version": self.version}
            self._evaluations.ask(self._post(out, "evaluate", EVALUATOR, body, packed))
            return
        for client in sorted(self._members.hosts):
            packed = pack(self._algorithm.examined(self.state, client), RAW, 0)
            body = {**packed.body, "client": client, "model_version": self.version}
            name = self._post(out, "evaluate", f"client/{client}", body, packed)
            self._evaluations.ask(name, Examination(client, self.version))

    def _finish(self, out: list[Action]) -> None:
        if self._evaluated != self.version:
            self._evaluate(out)
        if not self._evaluations.awaited(self._members):
            self._end(out)
        elif self._asked_final is None:
            self._asked_final = len(self._evaluations.asked)
            body = {"token": _FINAL, "after_s": FINAL_EVALUATION_S}
            self._post(out, "timer", TIMER, body)

    def _end(self, out: list[Action]) -> None:
        self._ended = True
        for seq, inbound in self._waiting.here.items():
            self._flights.pop(inbound.message.re or "", None)
            failed = inbound.message.kind == "failed"
            self._counts.dropped += failed
            self._counts.refused += not failed
            out.append(Done(seq, "" if failed else "the run is over"))
        self._waiting = Waiting()
        about = {"reason": self._finishing, "position": self._position}
        body = {**about, **msgspec.structs.asdict(self._counts)}
        self._checkpoint("finished", body, out)
        out.append(Finish(self._finishing))

    def _post(
        self,
        out: list[Action],
        kind: str,
        to: str,
        body: Mapping[str, Any],
        packed: Packed | None = None,
    ) -> str:
        message = self._message(kind, to, body, packed)
        out.append(Post(message, packed.data if packed else ()))
        return message.id

    def _message(
        self, kind: str, to: str, body: Mapping[str, Any], packed: Packed | None = None
    ) -> Message:
        name = f"{self._node}/{self._next_id}"
        self._next_id += 1
        about = {"kind": kind, "id": name, "run": self._run, "sender": self._node, "to": to}
        return Message(**about, body=dict(body), blobs=packed.blobs if packed else ())
