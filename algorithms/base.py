"""What a federated algorithm is: a server half and a client half, both pure.

An algorithm is a frozen dataclass whose fields are its hyper-parameters. The aggregator
calls `start`, `task`, `new_accumulator`, `accumulate` and `commit`; a worker calls `train`; the
evaluator calls `evaluate`, or each client `evaluate_client`. Nothing here knows of
messages, schedules, clocks or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict
from torch import Tensor

from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.problems.base import Examples, Problem
from fedmq.codecs.text import shorten

Reply = Literal["update", "model"]
"""What the schedule needs from a client: how its model changed, or the model itself."""


@dataclass(frozen=True)
class Payload:
    """What a task or a result carries.

    weights: tensors that the configured codec may write with loss.
    exact: tensors that must arrive as they are.
    numbers: small facts, in the message's header.
    features: activations by sample, as `fedmq.codecs.features` describes them: ``features``
        float32 [n, c, ...], ``ids`` int64 [n], and perhaps ``labels`` int64 [n].
    logits: outputs by sample or by label, as `fedmq.codecs.logits` describes them:
        ``logits`` float32 [n, classes], and ``ids`` int64 [n] or ``counts`` int64 [classes].
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, int | float | str] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What a client is asked to work on.

    version: of the model that the payload was made from.
    reply: what the schedule needs back.
    """

    version: int
    payload: Payload
    reply: Reply = "update"


@dataclass(frozen=True)
class Result:
    """What a client's `train` returned, as it reached the aggregator.

    client: whose it is; known to the aggregator, not the client's word.
    staleness: versions committed since its task was made.
    """

    client: int
    staleness: int
    payload: Payload


@dataclass(frozen=True)
class Client:
    """Where a client half runs.

    index: the client's number, 0 to K-1.
    problem: what is learned.
    data: this client's training examples.
    local: what this client kept from its last task, or None at first; a worker saves it
        before it sends the result, so that it survives a restart.
    seed: of everything random in this task.
    device: torch device to train on.
    project: projects a gradient, tensors by name as in the result's weights, in place onto
        what the uplink's codec can send (structured updates); None where it sends all.
    """

    index: int
    problem: Problem
    data: Examples
    local: Payload | None
    seed: int
    device: str = "cpu"
    project: Callable[[Mapping[str, Tensor]], None] | None = None


@dataclass(frozen=True)
class Algorithm(ABC):
    """A federated algorithm. Subclasses are frozen dataclasses, one paper a file.

    One that draws at the aggregator has a field ``seed``, None by default: the run's.

    State and Gathered are the subclass's own types; states are never changed in place,
    so that a version that is still on the wire stays what it was.
    """

    name: ClassVar[str]
    schedules: ClassVar[frozenset[str]]
    """Names of the schedules under which the algorithm makes sense."""
    task_per_client: ClassVar[bool] = False
    """Whether `task` depends on the client; if not, a version's task is encoded once."""
    commits_in_background: ClassVar[bool] = False
    """Whether `commit` may take long, for example because it trains a model: it is then done
    beside the inbox, and results that come meanwhile count towards the next version."""
    reproducible: ClassVar[bool] = False
    """Whether what the aggregator computes is the same to the bit on every machine
    (`fedmq.algorithms.toolkit.arithmetic`): a trace then replays exactly anywhere. Else it replays
    exactly on the kind of CPU that it was recorded on, and within a tolerance on others. A
    subclass that computes more at the aggregator inherits the promise and has to keep it."""
    fixed_reply: ClassVar[Reply | None] = None
    """What clients send whatever the schedule asks for; None: as it asks."""
    server_hparams: ClassVar[frozenset[str]] = frozenset()
    """Hyper-parameters that act only where results are absorbed and committed, and not at
    clients: under others, the results of a recorded run still mean something."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    # ---- at the aggregator

    @abstractmethod
    def start(self, problem: Problem) -> Any:
        """Return the state of version 0."""

    @abstractmethod
    def task(self, state: Any, client: int) -> Payload:
        """Return what this client is sent."""

    @property
    def evaluated_by(self) -> Literal["model", "clients"]:
        """Return where a version is evaluated.

        ``model``: by the evaluator, on the problem's test data. ``clients``: by each client,
        with what it keeps, on its own test data.
        """
        return "model"

    def evaluation_task(self, state: Any, client: int = 0) -> Payload:
        """Return what the evaluator, or this client, is sent for an evaluation."""
        return self.task(state, client)

    def result_bytes(self, state: Any) -> int:
        """Return how large the tensors of an honest result can be, in bytes.

        A result that needs many times as much while it is decoded is refused.
        """
        return sum(each.nbytes for each in self.tensors(state).values())

    @abstractmethod
    def new_accumulator(self, state: Any) -> Any:
        """Return an empty accumulator for the results of one version."""

    @abstractmethod
    def accumulate(self, gathered: Any, state: Any, result: Result, weight: float) -> Any:
        """Add one result to the accumulator; memory does not grow with their number.

        Args:
            gathered: from `new_accumulator` or the last `accumulate`.
            state: of the current version; one older while a `commit` that `trains` goes on.
            result: what a client's `train` returned.
            weight: how much it counts, as the schedule decides.

        Raises:
            ResultError: the result cannot be used; ``gathered`` is as it was.
        """

    @abstractmethod
    def commit(self, state: Any, gathered: Any, divisor: float) -> Any:
        """Return the state of the next version. ``divisor``: what the weighted sum is over.

        One that `trains` runs in a thread of its own: it must not touch what others use.
        """

    @abstractmethod
    def save(self, state: Any) -> Payload:
        """Return everything that is in a state, for a checkpoint."""

    @abstractmethod
    def load(self, problem: Problem, saved: Payload) -> Any:
        """Return the state that `save` was given.

        Raises:
            ResultError: it is not a state of this algorithm and problem.
        """

    @abstractmethod
    def tensors(self, state: Any) -> Mapping[str, Tensor]:
        """Return the model in a state, for its digest and for saving."""

    # ---- at the client

    @abstractmethod
    def train(self, task: Task, client: Client) -> tuple[Payload, Payload | None]:
        """Return the result, with ``n`` (examples) in its numbers, and the new local state."""

    def evaluate_client(self, task: Task, client: Client) -> Mapping[str, float]:
        """Return this client's metrics, ``accuracy`` among them; what it keeps stays as it is.

        Of algorithms that are evaluated by ``clients``. ``task`` holds what `evaluation_task`
        returned, and ``client.local`` what this client kept, None if it never trained.
        """
        raise NotImplementedError(f"{self.name} is not evaluated by clients")

    def try_model(self, problem: Problem, data: Examples, device: str) -> None:  # noqa: B027 - an algorithm with models of its own has nothing to try
        """Try one step of training, of which nothing is kept, before the first task.

        Args:
            problem: whose model is tried.
            data: a client's training examples.
            device: torch device to train on.

        Raises:
            ProblemError: the model does to its tensors what cannot be followed. Whatever else
                goes wrong is left to the task that meets it.
        """

    # ---- at the evaluator

    def evaluate(self, task: Task, problem: Problem, device: str) -> Mapping[str, float]:
        """Return the metrics of the task's model on the problem's test data."""
        raise NotImplementedError(f"{self.name} is not evaluated by an evaluator")

    # ---- for a client that never took part

    def personalise(self, state: Any, version: int, client: Client) -> Mapping[str, float]:
        """Return the metrics of a new client that starts from this state, on its test data.

        By default what `evaluate_client` makes of a client that has kept nothing.
        """
        return self.evaluate_client(
            Task(version, self.evaluation_task(state, client.index)), client
        )


def examples_of(numbers: Mapping[str, Any]) -> int:
    """Return n_k, the number of examples a result was trained on.

    Raises:
        ResultError: it is not a whole number from 1 to 10^9.
    """
    n = numbers.get("n")
    if type(n) is not int or not 1 <= n <= 10**9:
        text = f"expected n, the number of examples, from 1 to 10^9, got {shorten(n)}"
        raise ResultError(text, Fault.MALFORMED)
    return n
