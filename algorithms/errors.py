"""What can go wrong in learning, said in one sentence.

::

    AlgorithmError (ValueError)
    +-- ProblemError       a problem, model, data set or partition is unknown or does not fit
    |   +-- DataError      data are not where they should be; the sentence holds the remedy
    +-- ResultError        a client's result cannot be used (shape, NaN, foreign task)
    +-- NotAllowed         a configuration names code that nobody here has allowed
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


class NotAllowed(AlgorithmError):
    """A configuration names code that nobody at this machine has allowed; nothing was imported.

    Attributes:
        name: what it names, ``module:attribute``.
        module: the module that would have to be allowed.
    """

    def __init__(self, name: str, module: str) -> None:
        super().__init__(
            f"{name!r} would run code of module {module!r}, which is not allowed here; "
            f"if you trust it, add --allow {module}"
        )
        self.name = name
        self.module = module
