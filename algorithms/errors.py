"""What can go wrong in learning, said in one sentence.

::

    AlgorithmError (ValueError)
    +-- ProblemError       a problem, model, data set or partition is unknown or does not fit
    |   +-- DataError      data are not where they should be; the sentence holds the remedy
    +-- ResultError        a client's result cannot be used (shape, NaN, foreign task)
"""


class AlgorithmError(ValueError):
    """Root of every error that this package raises on purpose."""


class ProblemError(AlgorithmError):
    """A problem, model, data set or partition is unknown, or the parts do not fit together."""


class DataError(ProblemError):
    """A data set is not where it should be, or is damaged."""


class ResultError(AlgorithmError):
    """A client's result cannot be used; the message is the reason that its sender is told."""
