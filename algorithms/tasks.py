"""What the two halves of an algorithm exchange: payloads, tasks and results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fedmq.algorithms.errors import Fault, ResultError
from fedmq.algorithms.problems.base import MOST_EXAMPLES, Examples, Problem
from fedmq.codecs.text import shorten

Reply = Literal["update", "model"]
"""What a client sends: the change of its model, or the model itself."""


@dataclass(frozen=True)
class Payload:
    """Content of a task, a result or a saved state.

    weights: tensors that the configured codec may encode with loss.
    exact: tensors that are carried unchanged.
    numbers: small values, in the message's header.
    features: activations by sample, as `fedmq.codecs.features` describes them: ``features``
        float32 [n, c, ...], ``ids`` int64 [n], optionally ``labels`` int64 [n].
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
    """Work for a client.

    version: version of the model that the payload was made from.
    reply: what the client must send.
    """

    version: int
    payload: Payload
    reply: Reply = "update"


@dataclass(frozen=True)
class TrainResult:
    """Return value of `train`.

    payload: what the client sends.
    num_examples: n_k, the number of examples it was trained on, 1 to 10^9. It is sent as ``n``
        among the payload's numbers.
    local_state: what the client keeps for its next task, if anything.
    """

    payload: Payload
    num_examples: int
    local_state: Payload | None = None


@dataclass(frozen=True)
class Bounds:
    """How large the values of a model, or of its update, may be in a result.

    times: largest magnitude of a value, as a multiple of 1 plus the largest one in the model.
    norm: largest L2 norm of an update; None for any.
    """

    times: float = math.inf
    norm: float | None = None


UNBOUNDED = Bounds()


@dataclass(frozen=True)
class Result:
    """What a client's `train` returned, as it reached the aggregator.

    client: its number; the aggregator knows it from the task.
    staleness: versions committed since its task was made.
    num_examples: n_k, see `TrainResult`.
    bounds: of its values.
    """

    client: int
    staleness: int
    payload: Payload
    num_examples: int
    bounds: Bounds = UNBOUNDED


@dataclass(frozen=True)
class Client:
    """A client, as `train` and `evaluate_client` see it.

    index: the client's number, 0 to K-1.
    problem: problem that is learned.
    data: this client's training examples.
    local: local state that its last task returned, None before the first. A worker saves it
        before it sends the result, so that it survives a restart.
    seed: seed of everything random in this task.
    device: torch device to train on.
    project: projects a gradient (tensors by name, as in the result's weights) in place onto the
        updates that the uplink's codec can send (structured updates); None if it sends all.
    """

    index: int
    problem: Problem
    data: Examples
    local: Payload | None
    seed: int
    device: str = "cpu"
    project: Callable[[Mapping[str, Tensor]], None] | None = None


def examples_of(numbers: Mapping[str, Any], most: int = MOST_EXAMPLES) -> int:
    """Return n_k, the number of examples a result was trained on.

    Raises:
        ResultError: ``n`` is not a whole number from 1 to ``most``.
    """
    n = numbers.get("n")
    if type(n) is not int or not 1 <= n <= MOST_EXAMPLES:
        text = f"expected n, the number of examples, from 1 to 10^9, got {shorten(n)}"
        raise ResultError(text, Fault.MALFORMED)
    if n > most:
        text = f"expected at most {most} examples (run.max_examples), got {n}"
        raise ResultError(text, Fault.TOO_LARGE)
    return n
