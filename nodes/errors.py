"""What can go wrong in the programs.

::

    NodeError (Exception)
    +-- ConfigError    a configuration is unusable; the sentence names the key
    +-- StorageError   a disk takes nothing now, and may later
    +-- MessageError   a message from another node is unusable; holds the code
"""

from fedmq.algorithms.errors import ResultError
from fedmq.broker.errors import WireError
from fedmq.broker.rejections import Code, Rejection
from fedmq.codecs.errors import CodecError


class NodeError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(NodeError):
    """A configuration is unusable: which key, what was expected, what stood there."""


class StorageError(NodeError):
    """Something cannot be written now; it may be possible later, when a disk has room again."""


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
    return Rejection(code, str(error))
