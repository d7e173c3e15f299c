"""The Worker core, also used by the evaluator: handles one task at a time.

``handle(event) -> [action]``, without sockets, clock or training. The program carries out `Train`
and `Evaluate`, and reports back `Trained`, `Evaluated` or `Failed`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from fedmq.algorithms.base import Client, Payload, Reply, Task
from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.rng import derive_rng, derive_seed
from fedmq.algorithms.values import metrics_of
from fedmq.broker.errors import WireError
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.rejections import Code
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.schema import Blob, Message
from fedmq.codecs.errors import CodecError
from fedmq.codecs.registry import decode
from fedmq.codecs.text import shorten
from fedmq.nodes.errors import MessageError, rejection_of
from fedmq.nodes.messages.actions import Handled
from fedmq.nodes.messages.metrics import sendable
from fedmq.nodes.messages.payloads import Packed, pack, unpack
from fedmq.nodes.messages.tensor_tables import fitted
from fedmq.nodes.process.exception_text import clip_text, described, modules_of, place_in
from fedmq.nodes.run.agreement import Fingerprint
from fedmq.nodes.run.setup import Setup
from fedmq.nodes.run.stragglers import slowdown
from fedmq.nodes.worker.client_state import ClientStateStore, SavedClientState

MAX_SLOWDOWN_S = 3600.0


class Trained(Struct, frozen=True):
    """A task was trained: its result and the client's new local state, if it has any.

    device: kind of device, see `devices.kind_of`; the same kind trains to the same bytes.
    """

    payload: Payload
    local: Payload | None
    elapsed_s: float
    device: str = ""


class Evaluated(Struct, frozen=True):
    """A model was evaluated. ``device``: as in `Trained`."""

    metrics: Mapping[str, float]
    device: str = ""


class Saved(Struct, frozen=True):
    """A client's state was saved; ``kept`` has the result to post, see `ClientStateStore.put`."""

    kept: SavedClientState


class Failed(Struct, frozen=True):
    """A task failed.

    reason, code: why, and the code of the reason.
    where: file and line of the user's code that raised the error, or "".
    """

    reason: str
    code: str = Code.TRAINING_FAILED
    where: str = ""

    @classmethod
    def of(cls, error: BaseException, setup: Setup) -> Failed:
        """Return the failure for an exception: text of bounded length, without data."""
        own = modules_of(setup.problem, setup.algorithm)
        return cls(described(error), where=place_in(error, own))


Event = Delivery | Trained | Saved | Evaluated | Failed


class Train(Struct, frozen=True):
    """Train a task for a client, from its local state, with all randomness from ``seed``.

    uplink_seed: seed of the uplink's codec; a client trains only what a structured one can send.
    """

    client: int
    task: Task
    local: Payload | None
    seed: int
    uplink_seed: int = 0

    def at(self, setup: Setup, device: str) -> Client:
        """Return the `Client` that the algorithm trains.

        Raises:
            ProblemError: the client has no examples.
        """
        problem, project = setup.problem, None
        data = problem.client(self.client)
        if not len(data):
            name = type(problem).__name__
            raise ProblemError(f"{name}.client: expected at least one example, got none")
        if setup.up.structured:
            project = functools.partial(setup.up.project, seed=self.uplink_seed)
        return Client(self.client, problem, data, self.local, self.seed, device, project)


class Evaluate(Struct, frozen=True):
    """Evaluate a task's model on the test data, or as a client with its data and local state."""

    task: Task
    client: int | None = None
    local: Payload | None = None
    seed: int = 0

    def metrics(self, setup: Setup, device: str) -> Mapping[str, float]:
        """Return the metrics that the algorithm computes.

        Raises:
            ReturnedError: the algorithm returned no map of names to numbers.
        """
        problem, algorithm = setup.problem, setup.algorithm
        who = type(algorithm).__name__
        if self.client is None:
            return metrics_of(algorithm.evaluate(self.task, problem, device), f"{who}.evaluate")
        data = problem.client(self.client)
        place = Client(self.client, problem, data, self.local, self.seed, device)
        found = algorithm.evaluate_client(self.task, place)
        return metrics_of(found, f"{who}.evaluate_client")


class Pause(Struct, frozen=True):
    """Wait before the next action: this worker simulates a straggler."""

    seconds: float


class SaveClientState(Struct, frozen=True):
    """Save a client's local state, then report `Saved`, so that the task's result is posted."""

    client: int
    kept: SavedClientState


Action = Train | Evaluate | Pause | SaveClientState | PostMessage | Handled


class _Before(Struct, frozen=True):
    """Task and memory of a client's `SavedClientState` at the start of the current task."""

    task: str
    memory: Payload | None


class Worker:
    """The state of a worker (or evaluator) node.

    Args:
        setup: objects of the run.
        run: id of the run.
        node: this node's name.
        clients: ranges of clients hosted here, both ends included.
        kept: local states of the clients; read here, written by the program.
        version_0: see `fedmq.nodes.run.version_zero`; part of every answer.

    Attributes:
        evaluations: number of evaluations in this session.
    """

    def __init__(
        self,
        setup: Setup,
        run: str,
        node: str,
        clients: Sequence[tuple[int, int]] = (),
        kept: ClientStateStore | None = None,
        version_0: Fingerprint | None = None,
    ) -> None:
        self._setup = setup
        self._run, self._node = run, node
        self._clients = clients
        self._version_0 = {"version_0": version_0} if version_0 is not None else {}
        self._straggling = setup.config.worker.straggling(node)
        self._queue: deque[Delivery] = deque()
        self._current: Delivery | None = None
        self._client_states = kept if kept is not None else ClientStateStore()
        self.evaluations = 0
        self._before: _Before | None = None
        """State of the current task's client at the start of the task."""

    def handle(self, event: Event) -> list[Action]:
        """Handle one event; return the actions to carry out, in order."""
        out: list[Action] = []
        match event:
            case Delivery():
                self._queue.append(event)
            case Trained():
                self._trained(event, out)
            case Saved(kept):
                self._post_result(kept, out)
            case Evaluated(metrics, device):
                self.evaluations += 1
                body = {"metrics": sendable(metrics), "device": device, **self._version_0}
                self._answer("score", {**body, **self._started_from()}, out)
            case Failed():
                self._fail(event, out)
        while self._current is None and self._queue:
            self._begin(self._queue.popleft(), out)
        return out

    def validate_state(self) -> None:
        """Check the state between two events; tests and simulations do after each event.

        Raises:
            AssertionError: the state contradicts itself; the message says how.
        """
        numbers = [each.seq for each in self._queue]
        if self._current is None and numbers:
            raise AssertionError(f"messages {numbers} wait, but there is no current task")
        if self._current is not None:
            numbers.insert(0, self._current.seq)
            if (kind := self._current.message.kind) not in ("task", "evaluate"):
                raise AssertionError(f"message {numbers[0]} is the current task, but a {kind!r}")
        if any(a >= b for a, b in itertools.pairwise(numbers)):
            raise AssertionError(f"messages are not in the order of their numbers: {numbers}")

    def _begin(self, delivery: Delivery, out: list[Action]) -> None:
        message, kind = delivery.message, delivery.message.kind
        try:
            if kind in ("task", "evaluate") and message.sender != AGGREGATOR:
                text = f"only {AGGREGATOR} sends tasks, this one is from {message.sender}"
                raise MessageError(text, Code.NOT_ALLOWED)
            if kind == "task":
                client = self._client_of(message)
                kept = self._client_states.get(client)
                if kept is not None and kept.task == message.id:
                    # Trained by an earlier session, perhaps of another node, that ended before
                    # its result was acknowledged.
                    self._current = delivery
                    self._post_result(kept, out)
                    return
                task = _read_task(delivery)
                seed = derive_seed(self._setup.config.run.seed, "train", client, message.id)
                self._before = _before(kept)
                uplink = self._uplink_seed(client, message)
                out.append(Train(client, task, kept.local if kept else None, seed, uplink))
            elif kind == "evaluate":
                out.append(self._evaluate(delivery))
            elif kind == "refused":
                out.append(Handled(delivery.seq))
                return
            else:
                raise MessageError(f"a worker takes no {kind!r} messages", Code.UNKNOWN_KIND)
        except (MessageError, ValueError, WireError) as error:  # CodecError is a ValueError
            out.append(Handled.of(delivery.seq, rejection_of(error)))
            return
        self._current = delivery

    def _evaluate(self, delivery: Delivery) -> Evaluate:
        message, task = delivery.message, _read_task(delivery)
        if "client" not in message.body:
            seed = derive_seed(self._setup.config.run.seed, "evaluate", message.id)
            return Evaluate(task, seed=seed)
        client = self._client_of(message)
        kept = self._client_states.get(client)
        self._before = _before(kept)
        seed = derive_seed(self._setup.config.run.seed, "evaluate", client, message.id)
        return Evaluate(task, client, kept.local if kept else None, seed)

    def _client_of(self, message: Message) -> int:
        client = message.body.get("client")
        if type(client) is not int or not any(a <= client <= b for a, b in self._clients):
            text = f"client {shorten(client)} is not hosted by {self._node}"
            raise MessageError(text, Code.WRONG_CLIENT)
        return client

    def _trained(self, event: Trained, out: list[Action]) -> None:
        message = self._task.message
        client = message.body["client"]
        if self._straggles(message.id, event.elapsed_s, out):
            self._fail(Failed("dropped on demand", Code.DROPPED), out)
            return
        try:
            packed, memory = self._pack(event.payload, client, message)
        except CodecError as error:
            self._fail(Failed(clip_text(str(error)), Code.UNUSABLE), out)
            return
        except Exception as error:  # noqa: BLE001 - `train` can return anything
            self._fail(Failed.of(error, self._setup), out)
            return
        body = {
            **packed.body,
            "client": client,
            "model_version": message.body["model_version"],
            "elapsed_s": event.elapsed_s,
            "device": event.device,
            **self._started_from(),
            **self._version_0,
        }
        reply = self._reply("result", body, packed.blobs)
        if event.local is None and memory is None:
            kept = SavedClientState(message.id, self._task.seq, None, reply, packed.data, None)
            self._post_result(kept, out)
        else:
            whole = fitted(reply, packed.data)
            kept = SavedClientState(message.id, self._task.seq, event.local, *whole, memory)
            out.append(SaveClientState(client, kept))

    def _post_result(self, kept: SavedClientState, out: list[Action]) -> None:
        """Post a saved result, which another node may have saved for this client."""
        body = {**kept.message.body, **self._version_0}
        message = msgspec.structs.replace(kept.message, sender=self._node, body=body)
        # Fitted again: the node that saved the result may have a shorter name.
        out.append(PostMessage(*fitted(message, kept.data), (self._task.seq,)))
        self._current = None

    def _uplink_seed(self, client: int, task: Message) -> int:
        return derive_seed(self._setup.config.run.seed, "uplink", client, task.id)

    def _pack(self, payload: Payload, client: int, task: Message) -> tuple[Packed, Payload | None]:
        """Encode a result; also return the error-feedback residual, if the codec keeps one."""
        codecs, codec = self._setup.uplink, self._setup.up
        seed = self._uplink_seed(client, task)
        if not codec.error_feedback:
            return pack(payload, codecs, seed), None
        weights = dict(payload.weights)
        if self._before is not None and self._before.memory is not None:
            for name, left in self._before.memory.weights.items():
                # Residuals of 0.1.0 include tensors that are not trained, and another release of
                # a user's algorithm may send other tensors.
                if name in weights and weights[name].shape == left.shape:
                    weights[name] = weights[name] + left
        packed = pack(dataclasses.replace(payload, weights=weights), codecs, seed)
        sent = decode(codec.encode(weights, seed))
        return packed, Payload({name: each - sent[name] for name, each in weights.items()})

    def _started_from(self) -> dict[str, str]:
        """Return the task after which the client's state was saved that the current one uses."""
        if "client" not in self._task.message.body:
            return {}  # the evaluator's
        return {"after": self._before.task if self._before is not None else ""}

    def _straggles(self, task: str, elapsed_s: float, out: list[Action]) -> bool:
        """Simulate a straggler, if configured; return whether to drop the result."""
        wanted = self._straggling
        if wanted.slowdown == 1 and not wanted.drop:
            return False
        rng = derive_rng(self._setup.config.run.seed, "straggling", self._node, task)
        factor = slowdown(wanted.slowdown)(rng)
        if factor > 1:
            out.append(Pause(min((factor - 1) * elapsed_s, MAX_SLOWDOWN_S)))
        return bool(rng.random() < wanted.drop)

    def _fail(self, why: Failed, out: list[Action]) -> None:
        where = {"where": why.where} if why.where else {}
        self._answer("failed", {"reason": why.reason, "code": why.code, **where}, out)

    def _answer(self, kind: str, body: Mapping[str, Any], out: list[Action]) -> None:
        out.append(PostMessage(self._reply(kind, body, ()), (), (self._task.seq,)))
        self._current = None

    @property
    def _task(self) -> Delivery:
        """Return the current task."""
        if self._current is None:
            raise RuntimeError("expected a current task for the answer")
        return self._current

    def _reply(self, kind: str, body: Mapping[str, Any], blobs: tuple[Blob, ...]) -> Message:
        asked = self._task.message
        # The id is derived from the task's, so that the broker recognizes a repeated answer.
        about = {"run": self._run, "sender": self._node, "to": AGGREGATOR, "re": asked.id}
        name = f"{asked.id}/{kind}"
        return Message(kind=kind, id=name, **about, body=dict(body), blobs=blobs)


def _read_task(delivery: Delivery) -> Task:
    body = delivery.message.body
    match body:
        case {"model_version": int(version)}:
            reply: Reply = "model" if body.get("reply") == "model" else "update"
            return Task(version, unpack(delivery.message, delivery.read), reply)
    raise MessageError("expected model_version in the task", Code.MALFORMED)


def _before(kept: SavedClientState | None) -> _Before | None:
    # Without the last result, which may be large.
    return _Before(kept.task, kept.memory) if kept is not None else None
