"""What can go wrong in the programs.

::

    NodeError (Exception)
    +-- ConfigError    a configuration is unusable; the sentence names the key
    +-- StorageError   a disk takes nothing now, and may later
    +-- MessageError   a message from another node is unusable; holds the code
    +-- OwnCodeError   a problem's or an algorithm's own code raised something
    +-- RunFailed      a run has ended without reaching its end
"""

import contextlib
from collections.abc import Iterator

from fedmq.algorithms.errors import AlgorithmError, ResultError
from fedmq.broker.errors import BrokerError, WireError
from fedmq.broker.rejections import Code, Rejection
from fedmq.codecs.errors import CodecError
from fedmq.nodes.process.exception_text import clip_text, described, explained, may_pass, place_in
from fedmq.nodes.process.signals import Stopped, this_process


class NodeError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(NodeError):
    """A configuration is unusable: which key, what was expected, what stood there."""


class StorageError(NodeError):
    """Something cannot be written now; it may be possible later, when a disk has room again."""


class OwnCodeError(NodeError):
    """Code of a user's problem or algorithm raised something that it would raise again."""


class RunFailed(NodeError):
    """A run has ended without reaching its end; the message says why."""


class MessageError(NodeError):
    """A message from another node cannot be used.

    Attributes:
        code: why, for programs.
    """

    def __init__(self, reason: str, code: Code) -> None:
        super().__init__(reason)
        self.code = code


def rejection_of(error: Exception) -> Rejection:
    """Return why a message is rejected that raised this error."""
    match error:
        case MessageError() | WireError():
            code = error.code
        case ResultError():
            code = Code(error.fault)
        case CodecError():
            code = Code.UNDECODABLE
        case _:
            code = Code.UNUSABLE
    # Sentences of this project name no values; what a user's algorithm raises may.
    return Rejection(code, clip_text(str(error)) if place_in(error) else str(error))


ON_PURPOSE = (NodeError, BrokerError, AlgorithmError, CodecError)
"""Roots of the errors that this project raises: their messages are whole sentences."""


@contextlib.contextmanager
def own_code(key: str) -> Iterator[None]:
    """Run code of a user's; what it raises and would raise again becomes one sentence.

    Args:
        key: of the configuration, which names that code.

    Raises:
        OwnCodeError: it raised something that a restart does not cure.
    """
    try:
        with exits_as_errors():
            yield
    except ON_PURPOSE:
        raise
    except Exception as error:  # a user's code may raise anything
        if may_pass(error):
            raise
        raise OwnCodeError(f"{key}: {explained(error)}") from error


@contextlib.contextmanager
def exits_as_errors() -> Iterator[None]:
    """Run code of a user's; ``exit()`` in it raises an error like any other, and ends no process.

    So does whatever else is raised past ``except Exception``. A signal passes, and Ctrl-C in a
    program that leaves SIGINT to Python.

    Raises:
        RuntimeError: in the place of a SystemExit and the like; it names that, and where it came
            from is in its traceback.
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
