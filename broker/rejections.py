"""Reasons for rejections: a code for programs, a sentence for people."""

from __future__ import annotations

import enum

from msgspec import Struct

MAX_CODE = 40
"""Most characters of a code; other nodes may use codes that are not listed here."""


class Code(enum.StrEnum):
    """The codes that this version knows; the other end of a link may use others."""

    UNKNOWN = ""
    """From an older node or ledger, which has only the sentence."""

    # ---- posts that the broker does not accept
    UNREADABLE = "unreadable"
    """The bytes are not a message of this protocol."""
    NOT_OWN = "not-own"
    """The message names another sender or run."""
    RESERVED_KIND = "reserved-kind"
    """Only the broker sends messages of this kind."""
    TOO_DEEP = "too-deep"
    NOT_ALLOWED = "not-allowed"
    """This role may not send to this address."""
    NOT_ASKED = "not-asked"
    """The node answers a message that was not delivered to it, or that it has answered before."""
    LIMIT = "limit"
    """A limit of the broker is exceeded; the reason names its setting."""
    NO_ADDRESS = "no-address"
    DUPLICATE_ID = "duplicate-id"
    """Another message with this id was accepted or rejected before."""
    BAD_BLOB = "bad-blob"
    """The bytes of a blob do not match its digest or size, or exceed a limit."""
    MISSING_BLOB = "missing-blob"
    """The sender does not have a blob that its message names."""

    # ---- messages that cannot be delivered
    DEAD_LETTER = "dead-letter"
    """Several sessions ended while they handled the message."""
    LOST = "lost"
    """The message's bytes were lost in a power failure."""

    # ---- messages that their recipient cannot use
    UNKNOWN_KIND = "unknown-kind"
    MALFORMED = "malformed"
    """A field is missing or invalid."""
    UNDECODABLE = "undecodable"
    """No codec can decode the bytes."""
    WRONG_CLIENT = "wrong-client"
    """This node does not host the client."""
    UNKNOWN_TASK = "unknown-task"
    """No such task or evaluation is outstanding."""
    WRONG_NODE = "wrong-node"
    """The task or evaluation is assigned to another node."""
    STALE = "stale"
    """The result is more versions behind than the schedule allows."""
    LATE = "late"
    """The result came after its round, and the schedule does not use late results."""
    WRONG_SHAPE = "wrong-shape"
    """Names, shapes or dtypes of the tensors differ from the model's."""
    NOT_FINITE = "not-finite"
    TOO_LARGE = "too-large"
    """Values, or their number of examples, are larger than a result of this run may have."""
    OUT_OF_RANGE = "out-of-range"
    """A metric has a value that is impossible, such as an accuracy above 1."""
    UNUSABLE = "unusable"
    """The algorithm cannot use the message for another reason."""
    RUN_OVER = "run-over"
    """The result came while the last version was being committed."""

    # ---- failed tasks, reported by their worker
    DROPPED = "dropped"
    """The client dropped out on demand: ``worker.drop``."""
    TRAINING_FAILED = "training-failed"


class RejectCode(enum.StrEnum):
    """The codes with which a broker rejects a connection or a node; they end the node's session."""

    VERSION = "version"
    """Another major version of the protocol."""
    UNREADABLE = "unreadable"
    """The bytes are not a frame of this protocol."""
    UNEXPECTED = "unexpected"
    """Nodes, or nodes with this role, do not send frames of this kind."""
    KEY = "key"
    """The key is not authorised for this, or was revoked."""
    INVITE = "invite"
    """The invite has expired, has no uses left, or was revoked."""
    NAME = "name"
    """The name is invalid, or is another node's."""
    ROLE = "role"
    RUN = "run"
    """No such run, or it may not be opened."""
    CLIENT = "client"
    """Clients out of range, hosted elsewhere, or more than the key may host."""
    CONFIG = "config"
    """The run has another configuration."""
    SESSION = "session"
    """The session's id is invalid."""
    REPLACED = "replaced"
    """A newer session of the node is connected."""
    LIMIT = "limit"
    """A limit of the broker is reached; the reason names its setting."""


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

    Version 0.1.0 recorded only sentences. Those that programs depend on are recognised by their
    beginning, here and nowhere else; the others have the code UNKNOWN.
    """
    if code:
        return code
    found = (known for start, known in _BEFORE_CODES.items() if reason.startswith(start))
    return next(found, Code.UNKNOWN)


def failure_code_of(code: str, reason: str) -> str:
    """Return the code of a recorded failure of a task; a 0.1.0 ledger has only the reason."""
    if code:
        return code
    dropped = code_of("", reason) == Code.DROPPED
    return Code.DROPPED if dropped else Code.TRAINING_FAILED
