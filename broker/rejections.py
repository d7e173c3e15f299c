"""Why a message was rejected: a code for programs, a sentence for people."""

from __future__ import annotations

import enum

from msgspec import Struct

MAX_CODE = 40
"""Characters of a code; other nodes may use codes that are not listed here."""


class Code(enum.StrEnum):
    """The reasons that programs know; each side of a link may use more."""

    UNKNOWN = ""
    """From an older peer or ledger, which has only the sentence."""

    # ---- posts that the broker does not accept
    UNREADABLE = "unreadable"
    """The bytes are no message of this protocol."""
    NOT_OWN = "not-own"
    """It carries the name of another node or run."""
    RESERVED_KIND = "reserved-kind"
    """Only the broker sends messages of this kind."""
    TOO_DEEP = "too-deep"
    NOT_ALLOWED = "not-allowed"
    """This role may not write to this address."""
    NO_ADDRESS = "no-address"
    DUPLICATE_ID = "duplicate-id"
    """Another message of this id was here before."""
    BAD_BLOB = "bad-blob"
    """The bytes of a blob are not what its name says, or too many."""
    MISSING_BLOB = "missing-blob"
    """The sender does not hold a blob that it names."""

    # ---- messages that cannot be delivered
    DEAD_LETTER = "dead-letter"
    """Several sessions ended while they worked on it."""
    LOST = "lost"
    """Its bytes did not survive a failure of power."""

    # ---- messages that their recipient cannot use
    UNKNOWN_KIND = "unknown-kind"
    MALFORMED = "malformed"
    """A field is missing, or is not what it must be."""
    UNDECODABLE = "undecodable"
    """No codec makes tensors of the bytes."""
    WRONG_CLIENT = "wrong-client"
    """The client is not hosted by this node."""
    UNKNOWN_TASK = "unknown-task"
    """No such task or evaluation is out."""
    WRONG_NODE = "wrong-node"
    """The task or evaluation is with another node."""
    STALE = "stale"
    """More versions behind than the schedule allows."""
    LATE = "late"
    """After its round, where late results are not used."""
    WRONG_SHAPE = "wrong-shape"
    """Names, shapes or dtypes of the tensors are not the model's."""
    NOT_FINITE = "not-finite"
    TOO_LARGE = "too-large"
    """Values are so large that sums of them would overflow."""
    UNUSABLE = "unusable"
    """The algorithm cannot use it, for another reason than these."""
    RUN_OVER = "run-over"
    """It came while the last version was being committed."""

    # ---- tasks that failed, from the worker that had them
    DROPPED = "dropped"
    """The client dropped out on demand: ``worker.drop``."""
    TRAINING_FAILED = "training-failed"


class Rejection(Struct, frozen=True):
    """Why a message was rejected."""

    code: Code
    reason: str


_BEFORE_CODES = {
    "too stale": Code.STALE,
    "no task ": Code.UNKNOWN_TASK,
    "no evaluation ": Code.UNKNOWN_TASK,
    "task ": Code.WRONG_NODE,
    "the result holds NaN ": Code.NOT_FINITE,
    "the result holds values ": Code.TOO_LARGE,
    "the run is over": Code.RUN_OVER,
    "parked: ": Code.DEAD_LETTER,
    "its bytes were lost ": Code.LOST,
    "dropped on demand": Code.DROPPED,
}


def code_of(code: str, reason: str) -> str:
    """Return the code of a recorded rejection.

    Version 0.1.0 recorded sentences only: where there is no code, this is the one place that
    tells by the beginnings of its sentences. Those that nothing depends on stay unknown.
    """
    if code:
        return code
    found = (known for start, known in _BEFORE_CODES.items() if reason.startswith(start))
    return next(found, Code.UNKNOWN)


def failure_code_of(code: str, reason: str) -> str:
    """Return the code of a recorded failure of a task; without one, of what a user's code says."""
    if code:
        return code
    dropped = code_of("", reason) == Code.DROPPED
    return Code.DROPPED if dropped else Code.TRAINING_FAILED
