"""Tasks and results as bytes, for the processes that train in a simulated run.

A parcel is a header in msgpack, and the buffers of its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from msgspec import Struct

from fedmq.algorithms.allowed import Allowed
from fedmq.algorithms.base import Reply, Task
from fedmq.algorithms.values import ReturnedError
from fedmq.broker.errors import BrokerError
from fedmq.broker.rejections import Code
from fedmq.broker.wire.schema import Buffer
from fedmq.codecs.errors import CodecError
from fedmq.nodes.errors import NodeError, RunFailed, own_code
from fedmq.nodes.messages.payload_parts import PayloadPart, append_payload, take_payload
from fedmq.nodes.process.exception_text import RemoteTraceback, clip_text, described
from fedmq.nodes.process.logs import traceback_text
from fedmq.nodes.run.config import parse
from fedmq.nodes.run.devices import choose_device
from fedmq.nodes.run.setup import Setup, set_up
from fedmq.nodes.worker.core import Evaluate, Evaluated, Failed, Train, Trained
from fedmq.nodes.worker.training import RemoteError, RemoteReturnedError, compute

Parcel = tuple[bytes, ...]


@dataclass(frozen=True)
class Recipe:
    """What a process makes the objects of the run from.

    config: configuration of the run, as TOML.
    allowed: user code that it may name.
    """

    config: str
    allowed: Allowed


class _Job(Struct):
    kind: Literal["train", "evaluate"]
    client: int | None
    version: int
    reply: Reply
    seed: int
    uplink_seed: int
    task: PayloadPart
    local: PayloadPart | None


class _Trained(Struct, tag="trained"):
    payload: PayloadPart
    local: PayloadPart | None
    device: str


class _Evaluated(Struct, tag="evaluated"):
    metrics: dict[str, Any]
    device: str


class _Error(Struct, tag="error"):
    """An error of a user's code; ``returned``: it is a `ReturnedError`. Others: `RemoteError`."""

    returned: bool
    text: str
    name: str
    reason: str
    code: str
    where: str
    traceback: str


class _Fault(Struct, tag="fault"):
    """An error because of which every task would fail."""

    text: str


_Answer = _Trained | _Evaluated | _Error | _Fault


def encode_job(action: Train | Evaluate) -> Parcel:
    """Return a task as a parcel, for `run_job`."""
    buffers: list[Buffer] = []
    trains = isinstance(action, Train)
    return _parcel(
        _Job(
            kind="train" if trains else "evaluate",
            client=action.client,
            version=action.task.version,
            reply=action.task.reply,
            seed=action.seed,
            uplink_seed=action.uplink_seed if isinstance(action, Train) else 0,
            task=append_payload(action.task.payload, buffers),
            local=None if action.local is None else append_payload(action.local, buffers),
        ),
        buffers,
    )


def run_job(recipe: Recipe, parcel: Parcel) -> Parcel:
    """Compute a task in this process; return the answer, for `read_answer`.

    The first call makes the objects of the run, as the program of a worker does.
    """
    try:
        setup, device = _prepared(recipe)
    except Exception as error:  # noqa: BLE001 - a user's problem can raise anything
        text = str(error) if isinstance(error, NodeError) else described(error)
        return _parcel(_Fault(f"cannot set up a training process: {_printable(text)}"), ())
    try:
        event = compute(_read_job(parcel), setup, device)
    except (BrokerError, NodeError) as error:
        return _parcel(_Fault(_printable(str(error))), ())
    except KeyboardInterrupt as error:
        # The user's code raised it: these processes ignore SIGINT.
        raised = RuntimeError(f"raised {described(error)}").with_traceback(error.__traceback__)
        return _failed(raised, Failed.of(raised, setup))
    except Exception as error:  # noqa: BLE001 - a model can raise anything
        return _failed(error, Failed.of(error, setup))
    if isinstance(event, Evaluated):
        return _parcel(_Evaluated(dict(event.metrics), event.device), ())
    return _trained(event, setup)


def read_answer(parcel: Parcel) -> Trained | Evaluated:
    """Return the result in an answer.

    Raises:
        RemoteError: a user's code raised an error; its cause has the traceback.
        RemoteReturnedError: a method of the problem or the algorithm returned an invalid value.
        RunFailed: the process cannot compute any task.
    """
    head, *buffers = parcel
    match msgspec.msgpack.decode(head, type=_Answer):
        case _Trained(payload, local, device):
            found, rest = take_payload(payload, buffers)
            state = None if local is None else take_payload(local, rest)[0]
            return Trained(found, state, 0.0, device)
        case _Evaluated(metrics, device):
            return Evaluated(metrics, device)
        case _Fault(text):
            raise RunFailed(text)
        case _Error() as failed:
            kind = RemoteReturnedError if failed.returned else RemoteError
            error = kind(failed.text, failed.name, failed.reason, failed.code, failed.where)
            raise error from RemoteTraceback(failed.traceback)


def _trained(event: Trained, setup: Setup) -> Parcel:
    buffers: list[Buffer] = []
    try:
        payload = append_payload(event.payload, buffers)
    except CodecError as error:  # the codec of the uplink would fail, too
        return _failed(error, Failed(clip_text(str(error)), Code.UNUSABLE))
    try:
        local = None if event.local is None else append_payload(event.local, buffers)
    except CodecError as error:
        return _failed(error, Failed.of(error, setup))
    return _parcel(_Trained(payload, local, event.device), buffers)


def _failed(error: BaseException, failed: Failed) -> Parcel:
    returned = isinstance(error, ReturnedError)
    return _parcel(
        _Error(
            returned=returned,
            text=_printable(str(error) if returned else failed.reason),
            name=type(error).__name__,
            reason=failed.reason,
            code=failed.code,
            where=_printable(failed.where),
            traceback=_printable(traceback_text(error)),
        ),
        (),
    )


@functools.lru_cache(maxsize=1)
def _prepared(recipe: Recipe) -> tuple[Setup, str]:
    config = parse(recipe.config)
    with own_code("problem.name"):
        setup = set_up(config, recipe.allowed)
    torch.set_num_threads(config.worker.threads)
    return setup, choose_device(config.worker.device)


def _read_job(parcel: Parcel) -> Train | Evaluate:
    head, *buffers = parcel
    job = msgspec.msgpack.decode(head, type=_Job)
    payload, rest = take_payload(job.task, buffers)
    task = Task(job.version, payload, job.reply)
    local = None if job.local is None else take_payload(job.local, rest)[0]
    if job.kind == "evaluate":
        return Evaluate(task, job.client, local, job.seed)
    if job.client is None:
        raise ValueError("expected the client of a task to train, got none")
    return Train(job.client, task, local, job.seed, job.uplink_seed)


def _parcel(head: Struct, buffers: Sequence[Buffer]) -> Parcel:
    return (msgspec.msgpack.encode(head), *(bytes(each) for each in buffers))


def _printable(text: str) -> str:
    """Return a text that can be encoded: it may name any file."""
    return text.encode(errors="backslashreplace").decode()
