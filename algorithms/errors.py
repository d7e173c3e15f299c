"""What can go wrong in learning, said in one sentence.

::

    AlgorithmError (ValueError)
    +-- ProblemError       a problem, model, data set or partition is unknown or does not fit
    |   +-- DataError      data are not where they should be; the sentence holds the remedy
    +-- ResultError        a client's result cannot be used (shape, NaN, foreign task)
"""

import enum


class Fault(enum.StrEnum):
    """Why a result cannot be used, for programs; nodes send it with the sentence."""

    UNUSABLE = "unusable"
    MALFORMED = "malformed"
    WRONG_SHAPE = "wrong-shape"
    NOT_FINITE = "not-finite"
    TOO_LARGE = "too-large"


class AlgorithmError(ValueError):
    """Root of every error that this package raises on purpose."""


class ProblemError(AlgorithmError):
    """A problem, model, data set or partition is unknown, or the parts do not fit together."""


class DataError(ProblemError):
    """A data set is not where it should be, or is damaged."""


class ResultError(AlgorithmError):
    """A client's result cannot be used; the message is the reason that its sender is told.

    Attributes:
        fault: the same for programs.
    """

    def __init__(self, reason: str, fault: Fault = Fault.UNUSABLE) -> None:
        super().__init__(reason)
        self.fault = fault
