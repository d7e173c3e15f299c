"""What can go wrong in the programs.

::

    NodeError (Exception)
    +-- ConfigError    a configuration is unusable; the sentence names the key
"""


class NodeError(Exception):
    """Root of every error that this package raises on purpose."""


class ConfigError(NodeError):
    """A configuration is unusable: which key, what was expected, what stood there."""
