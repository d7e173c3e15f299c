"""Errors of learning; each message is one sentence.

::

    AlgorithmError (ValueError)
    +-- ProblemError       a problem, model, data set or partition is unknown or unsuitable
    |   +-- DataError      a data set is missing or damaged; the message has the remedy
    +-- ResultError        a client's result cannot be used (shape, NaN, another task)
    +-- NotAllowed         a configuration names code that is not allowed on this machine
"""

import enum


class Fault(enum.StrEnum):
    """Code for why a result cannot be used; nodes send it beside the message."""

    UNUSABLE = "unusable"
    MALFORMED = "malformed"
    WRONG_SHAPE = "wrong-shape"
    NOT_FINITE = "not-finite"
    TOO_LARGE = "too-large"


class AlgorithmError(ValueError):
    """Base class of all errors that this package raises on purpose."""


class ProblemError(AlgorithmError):
    """A problem, model, data set or partition is unknown, or two of them do not fit together."""


class DataError(ProblemError):
    """A data set is missing or damaged."""


class ResultError(AlgorithmError):
    """A client's result cannot be used; the message is the reason that its sender gets.

    Attributes:
        fault: the reason as a code.
    """

    def __init__(self, reason: str, fault: Fault = Fault.UNUSABLE) -> None:
        super().__init__(reason)
        self.fault = fault


class NotAllowed(AlgorithmError):
    """A configuration names code that is not allowed on this machine; nothing was imported.

    Attributes:
        name: the code, ``module:attribute``.
        module: the module to allow.
    """

    def __init__(self, name: str, module: str) -> None:
        super().__init__(
            f"{name!r} would run code of module {module!r}, which is not allowed here; "
            f"if you trust it, add --allow {module}"
        )
        self.name = name
        self.module = module
