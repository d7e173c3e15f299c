"""The Aggregator core: a schedule and an algorithm, folded over an inbox.

``handle(event) -> [action]``, and nothing else: no sockets, no clock (a message's time is
the time at which the broker wrote it down), no randomness of its own. The same inbox
gives the same actions, which is what makes a run recoverable and replayable: a restarted
aggregator starts from its last checkpoint, folds what came after, and what it says then
has the ids that it had before, so the broker knows it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from torch import Tensor

from fedmq.algorithms.base import examples_of
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.schedules import View
from fedmq.broker.errors import WireError
from fedmq.broker.state import CHECKPOINT, EVALUATOR, RECORD, TIMER, WORKER
from fedmq.broker.wire import Message
from fedmq.codecs.errors import CodecError
from fedmq.codecs.raw import Raw
from fedmq.nodes.checkpoint import Counts, Flight, Fold, pack_checkpoint, unpack_checkpoint
from fedmq.nodes.digests import model_digest
from fedmq.nodes.inbox import Done, Finish, Inbound, Post, Settle, steady
from fedmq.nodes.payload import Packed, numbers_of, pack, unpack
from fedmq.nodes.setup import Setup

FINAL_EVALUATION_S = 60.0
"""How long the end of a run waits for outstanding evaluations."""
_FINAL = "final evaluation"
_ROOM = 16
"""Times the size of the model: what the codecs need while they decode one like it."""
_LEAST_BYTES = 1 << 20


@dataclass(frozen=True)
class Start:
    """The node has been admitted; ``checkpoint``: the newest of the session before it."""

    checkpoint: Inbound | None = None


Action = Post | Done | Settle | Finish


@dataclass
class _Version:
    """What has been gathered towards the next version."""

    gathered: Any
    order: list[str] = field(default_factory=list)
    """Ids of the tasks sent, in cohort order."""
    held: dict[str, tuple[Inbound, float, int]] = field(default_factory=dict)
    """Results that wait for the ones before them: (message, weight, client)."""
    contributed: set[int] = field(default_factory=set)
    """In a synchronous round, clients whose result is in hand: nobody counts twice."""
    absorbed: int = 0
    weights: float = 0.0
    started: int = 0
    draws: int = 0
    deadline_passed: bool = False
    staleness: list[int] = field(default_factory=list)


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
        self.state = self._algorithm.start(setup.problem)
        model = sum(each.nbytes for each in self.tensors().values())
        self._most_bytes = max(_LEAST_BYTES, _ROOM * model)
        """That a result may take in memory while it is decoded."""
        self.version = 0
        self._current = _Version(self._algorithm.gather(self.state))
        self._flights: dict[str, Flight] = {}
        self._hosts: dict[int, str] = {}
        self._evaluators: set[str] = set()
        self._evaluating: set[str] = set()
        self._counts = Counts()
        self._running = False
        self._finishing = ""
        self._asked_final = False
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
            "hosts": self._hosts,
            "evaluating": sorted(self._evaluating),
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
        if event.seq <= self._position:
            return [Settle()]  # the checkpoint was made after it, and tells of it
        self._position, self._now = event.seq, event.at
        message = event.message
        reason = ""
        if not self._ended:
            match message.kind:
                case "joined":
                    self._joined(message, out)
                case "left":
                    self._left(message)
                case "tick":
                    self._tick(str(message.body.get("token")), out)
                case "failed" if message.re in self._evaluating:
                    reason = self._score(message)
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
        if message.body["role"] == EVALUATOR:
            self._evaluators.add(message.body["node"])
        elif message.body["role"] == WORKER:
            for low, high in message.body["clients"]:
                for client in range(low, high + 1):
                    self._hosts[client] = message.body["node"]
        wanted = self._settings.min_clients or self._setup.problem.clients
        if not self._running and len(self._hosts) >= wanted:
            self._running = True
            self._begin_version(out)

    def _left(self, message: Message) -> None:
        node = message.body["node"]
        self._evaluators.discard(node)
        for client in [client for client, host in self._hosts.items() if host == node]:
            del self._hosts[client]

    def _tick(self, token: str, out: list[Action]) -> None:
        if token == f"deadline/{self.version}":
            # Nobody is awaited any longer: if results are still missing, others are drawn.
            self._current.deadline_passed = True
            for flight in self._flights.values():
                flight.overdue |= flight.version == self.version
        elif token == _FINAL and self._finishing:
            self._end(out)

    def _refused(self, name: str) -> None:
        """One of our own messages could not be used by its recipient, or not be delivered."""
        self._evaluating.discard(name)
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
        if message.sender not in (flight.node, self._hosts.get(flight.client)):
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
            if numbers.get("reply", self._schedule.reply) != self._schedule.reply:
                raise ResultError(f"expected reply {self._schedule.reply!r}")
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
        return self._absorb(inbound, weight)

    def _absorb_in_order(self, out: list[Action], *, everything: bool = False) -> None:
        """Add up held results in cohort order, up to the first that is still out."""
        current = self._current
        if not current.held:
            return
        for name in current.order:
            if name in current.held:
                inbound, weight, client = current.held.pop(name)
                refused = self._absorb(inbound, weight)
                if refused:
                    current.contributed.discard(client)
                out.append(Done(inbound.seq, refused))
            elif not everything and name in self._flights and self._reachable(name):
                return

    def _absorb(self, inbound: Inbound, weight: float) -> str:
        """Add one result to the version; return why it was refused, or ""."""
        current = self._current
        try:
            stream = steady(inbound.stream) if inbound.stream is not None else None
            payload = unpack(inbound.message, inbound.read, stream, self._most_bytes)
            current.gathered = self._algorithm.absorb(current.gathered, self.state, payload, weight)
        except (ResultError, CodecError, WireError) as error:
            self._counts.refused += 1
            return str(error)
        current.absorbed += 1
        current.weights += weight
        self._counts.used += 1
        return ""

    def _score(self, message: Message) -> str:
        if message.re not in self._evaluating or message.sender not in self._evaluators:
            return f"no evaluation {message.re!r} is with {message.sender}"
        self._evaluating.discard(message.re)
        match message.body:
            case {"metrics": {"accuracy": float(accuracy)}}:
                pass
            case _ if message.kind == "failed":
                return ""
            case {"metrics": dict()}:
                return ""
            case _:
                return "expected metrics as a map of numbers"
        target = self._settings.target_accuracy
        if target is not None and accuracy >= target and not self._finishing:
            self._finishing = f"accuracy {accuracy:.4f} reached the target of {target:g}"
        return ""

    # ---- versions

    def _advance(self, out: list[Action]) -> None:
        """Commit and start whatever can be, until nothing changes."""
        while self._running and not self._finishing:
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
        return self._flights[name].client in self._hosts

    def _start_tasks(self, view: View, out: list[Action]) -> None:
        current = self._current
        clients = self._draw(self._schedule.wants(view))
        if clients and (current.deadline_passed or not current.started):
            self._ask_deadline(out)
        for client in clients:
            packed = self._pack_task(client)
            body = {
                **packed.body,
                "client": client,
                "model_version": self.version,
                "reply": self._schedule.reply,
            }
            name = self._post(out, "task", f"client/{client}", body, packed)
            self._flights[name] = Flight(client, self.version, self._hosts[client])
            current.order.append(name)
            current.started += 1

    def _draw(self, count: int) -> list[int]:
        """Return so many reachable clients that have no task, or all of them, in order."""
        if not count:
            return []
        busy = {flight.client for flight in self._flights.values()}
        idle = sorted(set(self._hosts) - busy - self._current.contributed)
        if len(idle) <= count:
            return idle
        current = self._current
        rng = derive_rng(self._settings.seed, "cohort", self.version, current.draws)
        current.draws += 1
        return sorted(int(client) for client in rng.choice(idle, count, replace=False))

    def _pack_task(self, client: int) -> Packed:
        if self._task_cache is not None and not self._algorithm.personal:
            return self._task_cache
        seed = derive_seed(self._settings.seed, "downlink", self.version, client)
        payload = self._algorithm.task(self.state, client)
        self._task_cache = pack(payload, self._setup.down, seed)
        return self._task_cache

    def _commit(self, out: list[Action]) -> None:
        current = self._current
        staleness = current.staleness
        divisor = self._schedule.divisor(current.weights, current.absorbed)
        self.state = self._algorithm.commit(self.state, current.gathered, divisor)
        self.version += 1
        self._task_cache = None
        self._current = _Version(self._algorithm.gather(self.state))
        body = {
            "version": self.version,
            "position": self._position,
            "results": current.absorbed,
            "weights": current.weights,
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
        fold = Fold(
            position=self._position,
            at=self._now,
            version=self.version,
            next_id=self._next_id + 1,
            flights=self._flights,
            hosts=self._hosts,
            evaluators=sorted(self._evaluators),
            evaluating=sorted(self._evaluating),
            evaluated=self._evaluated,
            counts=self._counts,
            running=self._running,
            finishing=self._finishing,
            ended=self._ended,
        )
        packed = pack_checkpoint(self._algorithm, self.state, fold)
        self._post(out, kind, CHECKPOINT, {**packed.body, **body}, packed)
        out.append(Settle())

    def _resume(self, inbound: Inbound, out: list[Action]) -> None:
        """Start from a checkpoint, and go on as the session before it did."""
        self.state, fold = unpack_checkpoint(self._algorithm, self._setup.problem, inbound)
        self._current = _Version(self._algorithm.gather(self.state))
        self._position, self.version, self._next_id = fold.position, fold.version, fold.next_id
        self._flights, self._hosts, self._counts = fold.flights, fold.hosts, fold.counts
        self._evaluators, self._evaluating = set(fold.evaluators), set(fold.evaluating)
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

    def _ask_deadline(self, out: list[Action]) -> None:
        deadline = self._schedule.deadline()
        if deadline is not None:
            body = {"token": f"deadline/{self.version}", "after_s": deadline}
            self._post(out, "timer", TIMER, body)

    def _evaluate(self, out: list[Action]) -> None:
        packed = pack(self._algorithm.examined(self.state), Raw(), 0)
        body = {**packed.body, "model_version": self.version}
        self._evaluated = self.version
        self._evaluating.add(self._post(out, "evaluate", EVALUATOR, body, packed))

    def _finish(self, out: list[Action]) -> None:
        if self._evaluated != self.version:
            self._evaluate(out)
        if not self._evaluating or not self._evaluators:
            self._end(out)
        elif not self._asked_final:
            self._asked_final = True
            body = {"token": _FINAL, "after_s": FINAL_EVALUATION_S}
            self._post(out, "timer", TIMER, body)

    def _end(self, out: list[Action]) -> None:
        self._ended = True
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
        name = f"{self._node}/{self._next_id}"
        self._next_id += 1
        message = Message(
            kind=kind,
            id=name,
            run=self._run,
            sender=self._node,
            to=to,
            body=dict(body),
            blobs=packed.blobs if packed else (),
        )
        out.append(Post(message, packed.data if packed else ()))
        return name
