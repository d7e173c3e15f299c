"""An aggregator's checkpoint: its algorithm's state, and the fold's, as one message.

It goes into the ledger like any other message, so a restarted aggregator needs nothing
but its broker; and its tensors are usually those of the next task, so they cross once.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Struct, UnsetType

from fedmq.algorithms.base import AnyAlgorithm, OpaqueState
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.problems.base import Problem
from fedmq.broker.wire.schema import Blob
from fedmq.codecs.errors import CodecError
from fedmq.nodes.aggregator.evaluations import ClientEvaluation
from fedmq.nodes.aggregator.progress import Failures
from fedmq.nodes.errors import NodeError
from fedmq.nodes.messages.actions import Inbound
from fedmq.nodes.messages.payloads import RAW, Packed, pack, unpack
from fedmq.nodes.run.goal import Goal


class OutstandingTask(Struct):
    """A task that is out: for which client, made from which version, sent to which node."""

    client: int
    version: int
    node: str
    past_deadline: bool = msgspec.field(name="overdue", default=False)


class Counts(Struct):
    """What became of the results so far.

    used: in a version; at the end of a run, and before it, in the version in the making too.
    stale: too many versions behind, or after their round. refused: for any other reason.
    dropped: tasks that failed. unused: good, but in no version when the run ended.
    """

    used: int = 0
    stale: int = 0
    refused: int = 0
    dropped: int = 0
    unused: int = 0


class Fold(Struct):
    """What an aggregator knows between two versions, besides the algorithm's state.

    position, at: number and time of the last message that this is the fold of.
    deferred: numbers of the messages before it that are not handled yet.
    arithmetic: by which it was made, see `fedmq.nodes.aggregator.computed`.
    failures: that were not followed by a used result; see `fedmq.nodes.aggregator.progress`.
    failed: the run ends without reaching its end. rules: by which failures are counted.
    goal: what the run was to reach; not in the checkpoints of 0.1.0.
    expects_evaluator: whether the run was taken up again, and had an evaluator before.
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
    expects_evaluator: bool | UnsetType = UNSET


def pack_checkpoint(algorithm: AnyAlgorithm, state: OpaqueState, fold: Fold) -> Packed:
    """Return a checkpoint as what goes into a message."""
    packed = pack(algorithm.save(state), RAW, 0, f"{type(algorithm).__name__}.save")
    data = msgspec.msgpack.encode(fold)
    return Packed(packed.body, (*packed.blobs, Blob.of(data)), (*packed.data, data))


def unpack_checkpoint(
    algorithm: AnyAlgorithm, problem: Problem, inbound: Inbound
) -> tuple[OpaqueState, Fold]:
    """Return the algorithm's state and the fold.

    Raises:
        NodeError: the message is no checkpoint of this problem and algorithm.
    """
    try:
        state = algorithm.load(problem, unpack(inbound.message, inbound.read))
        data = inbound.read(len(inbound.message.blobs) - 1)
        return state, msgspec.msgpack.decode(data, type=Fold)
    except (CodecError, ResultError, msgspec.MsgspecError) as error:
        name = inbound.message.id
        raise NodeError(
            "the model, or the algorithm, is not the one that this run was begun with: checkpoint "
            f"{name} does not fit it ({error}). Change it back, or begin a new run in a new folder"
        ) from None
