"""An aggregator's checkpoint: the states of the algorithm and of the fold in one message.

The ledger stores it like any other message, so a restarted aggregator needs only its broker. Its
tensors are usually those of the next task, so they are sent once.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Struct, UnsetType

from fedmq.algorithms.base import AnyAlgorithm, OpaqueState
from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.problems.base import Problem
from fedmq.broker.link.events import Delivery
from fedmq.broker.wire.schema import Blob
from fedmq.codecs.errors import CodecError
from fedmq.nodes.aggregator.evaluations import ClientEvaluation
from fedmq.nodes.aggregator.progress import Failures
from fedmq.nodes.errors import NodeError
from fedmq.nodes.messages.payloads import RAW, Packed, pack, unpack
from fedmq.nodes.run.goal import Goal, Spent


class OutstandingTask(Struct):
    """An outstanding task: its client, the version it was made from, the node it was sent to."""

    client: int
    version: int
    node: str
    past_deadline: bool = msgspec.field(name="overdue", default=False)


class Counts(Struct):
    """Counts of results and failed tasks so far.

    used: results in a version; before the end of the run, also in the next version.
    stale: results too many versions behind, or after their round.
    refused: results rejected for another reason.
    dropped: tasks that failed.
    unused: valid results in no version when the run ended.
    """

    used: int = 0
    stale: int = 0
    refused: int = 0
    dropped: int = 0
    unused: int = 0


class Fold(Struct):
    """State of an aggregator between two versions, besides the algorithm's state.

    position, at: number and time of the last message in the fold.
    hosts: node of each client; empty since the rules `progress.COMPACT_CHECKPOINTS`.
    nodes: since those, the ranges of clients that each node hosts, both ends included.
    unavailable: bitmap of clients that are not available; empty if all are.
    unreported: workers that have yet to report which of their clients are available.
    deferred: numbers of earlier messages that are not handled yet.
    arithmetic: version of the arithmetic, see `fedmq.nodes.aggregator.computed`.
    failures: failures since the last used result, see `fedmq.nodes.aggregator.progress`.
    rules: version of the rules by which failures are counted.
    failed: whether the run ends without reaching its goal.
    goal: the run's goal; missing in checkpoints of 0.1.0.
    spent: what the run has used of the goal's limits.
    wall_timer: token of the timer that ends the run, or "".
    expects_evaluator: whether a resumed run had an evaluator before.
    asked_final: if a timer limits the wait for the final evaluation, the number of outstanding
        evaluations when it was set.
    """

    position: int
    at: float
    version: int
    next_id: int
    outstanding: dict[str, OutstandingTask] = msgspec.field(name="flights")
    hosts: dict[int, str]
    evaluators: list[str]
    evaluating: list[str]
    evaluated: int
    counts: Counts
    running: bool
    finishing: str
    ended: bool
    client_evaluations: dict[str, ClientEvaluation] = msgspec.field(
        name="examinations", default_factory=dict
    )
    scores: dict[int, list[float]] = {}
    deferred: list[int] = msgspec.field(name="waiting", default_factory=list)
    arithmetic: int = 1
    failures: Failures = msgspec.field(default_factory=Failures)
    failed: bool = False
    rules: int = 0
    goal: Goal | UnsetType = UNSET
    spent: Spent = msgspec.field(default_factory=Spent)
    wall_timer: str = ""
    expects_evaluator: bool | UnsetType = UNSET
    asked_final: int | UnsetType = UNSET
    nodes: dict[str, list[tuple[int, int]]] = {}
    unavailable: bytes = b""
    unreported: list[str] | UnsetType = UNSET

    def ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Return the ranges of clients that each node hosts."""
        found = {name: [*ranges] for name, ranges in self.nodes.items()}
        for client, node in self.hosts.items():
            found.setdefault(node, []).append((client, client))
        return found


def pack_checkpoint(algorithm: AnyAlgorithm, state: OpaqueState, fold: Fold) -> Packed:
    """Return a checkpoint as a message's body and blobs."""
    packed = pack(algorithm.save(state), RAW, 0, f"{type(algorithm).__name__}.save")
    data = msgspec.msgpack.encode(fold)
    return Packed(packed.body, (*packed.blobs, Blob.of(data)), (*packed.data, data))


def unpack_checkpoint(
    algorithm: AnyAlgorithm, problem: Problem, delivery: Delivery
) -> tuple[OpaqueState, Fold]:
    """Return the algorithm's state and the fold.

    Raises:
        NodeError: the message is no checkpoint of this problem and algorithm.
    """
    try:
        state = algorithm.load(problem, unpack(delivery.message, delivery.read))
        data = delivery.read(len(delivery.message.blobs) - 1)
        return state, msgspec.msgpack.decode(data, type=Fold)
    except (CodecError, AlgorithmError, msgspec.MsgspecError) as error:
        name = delivery.message.id
        raise NodeError(
            f"checkpoint {name} does not fit the model or the algorithm ({error}): use those that "
            "the run was started with, or start a new run in a new folder"
        ) from None
