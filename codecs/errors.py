"""What can go wrong between tensors and bytes.

::

    CodecError (ValueError)
    +-- SpecError      a spec string cannot be read, or names something unknown
    +-- DecodeError    a message cannot be turned back into tensors
"""


class CodecError(ValueError):
    """Root of every error that this package raises on purpose."""


class SpecError(CodecError):
    """A spec such as ``cast(float16)`` is malformed, or a name or parameter in it is unknown."""


class DecodeError(CodecError):
    """Encoded tensors are damaged, hostile, or of an unknown codec."""
