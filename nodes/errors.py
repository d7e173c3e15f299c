"""Errors of the node programs.

::

    NodeError (Exception)
    +-- ConfigError    invalid configuration; the message names the key
    |   +-- FolderInUse    another process uses the folder
    +-- StorageError   a file cannot be written now; a retry may succeed
    +-- MessageError   a message from another node cannot be used; has a code
    +-- OwnCodeError   code of a user's problem or algorithm raised an error
    +-- RunFailed      the run ended before it reached its goal
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from fedmq.algorithms.errors import AlgorithmError, ResultError
from fedmq.broker.errors import BrokerError, WireError
from fedmq.broker.rejections import Code, Rejection
from fedmq.codecs.errors import CodecError
from fedmq.nodes.process.exception_text import clip_text, described, explained, may_pass, place_in
from fedmq.nodes.process.signals import Stopped, this_process


class NodeError(Exception):
    """Base class of the errors that the node programs raise."""


class ConfigError(NodeError):
    """The configuration is invalid; the message names the key and the expected value."""


class FolderInUse(ConfigError):
    """Another process uses the folder of a run or a sweep."""


class StorageError(NodeError):
    """A file cannot be written now; a retry may succeed once the disk has space again."""


class OwnCodeError(NodeError):
    """Code of a user's problem or algorithm raised an error that a restart would not cure."""


class RunFailed(NodeError):
    """The run ended before it reached its goal; the message gives the reason.

    Attributes:
        run: the `fedmq.Run`, if a function such as `fedmq.run` raised the error and the run has a
            folder; else None.
    """

    def __init__(self, reason: str, run: Any = None) -> None:
        super().__init__(reason)
        self.run = run


class MessageError(NodeError):
    """A message from another node cannot be used.

    Attributes:
        code: machine-readable reason.
    """

    def __init__(self, reason: str, code: Code) -> None:
        super().__init__(reason)
        self.code = code


def rejection_of(error: Exception) -> Rejection:
    """Convert an error that a message caused into the message's rejection."""
    match error:
        case MessageError() | WireError():
            code = error.code
        case ResultError():
            code = Code(error.fault)
        case CodecError():
            code = Code.UNDECODABLE
        case _:
            code = Code.UNUSABLE
    # Errors of fedmq contain no data; an error of a user's algorithm may.
    return Rejection(code, clip_text(str(error)) if place_in(error) else str(error))


ON_PURPOSE = (NodeError, BrokerError, AlgorithmError, CodecError)
"""Base classes of fedmq's errors: their messages are complete sentences."""


@contextlib.contextmanager
def own_code(key: str) -> Iterator[None]:
    """Run a user's code; convert a permanent error to an `OwnCodeError`.

    Args:
        key: configuration key that names the code.

    Raises:
        OwnCodeError: the code raised an error that a restart would not cure.
    """
    try:
        with exits_as_errors():
            yield
    except ON_PURPOSE:
        raise
    except Exception as error:  # a user's code can raise anything
        if may_pass(error):
            raise
        raise OwnCodeError(f"{key}: {explained(error)}") from error


@contextlib.contextmanager
def exits_as_errors() -> Iterator[None]:
    """Run a user's code; convert ``exit()`` and other non-`Exception` errors to a `RuntimeError`.

    A stop signal passes through. So does Ctrl-C in a program that leaves SIGINT to Python.

    Raises:
        RuntimeError: replaces a SystemExit or similar; it names the original and has its traceback.
    """
    try:
        yield
    except (Exception, Stopped):
        raise
    except BaseException as error:
        by_signal = isinstance(error, KeyboardInterrupt) and not this_process.installed
        if by_signal or this_process.count:
            raise
        text = f"raised {described(error)}"
        raise RuntimeError(text).with_traceback(error.__traceback__) from None
