"""The errors of this package.

::

    CodecError (ValueError)
    +-- SpecError      a spec is malformed or names something unknown
    +-- DecodeError    encoded tensors cannot be decoded
"""


class CodecError(ValueError):
    """Base class of this package's errors; raised if tensors cannot be encoded."""


class SpecError(CodecError):
    """A spec such as ``cast(float16)`` is malformed, or a name or parameter in it is unknown."""


class DecodeError(CodecError):
    """Encoded tensors are damaged, hostile, or need an unknown codec."""
