"""Names of runs and of nodes: what they may look like.

They become names of files and folders, stand in addresses and in what is shown on terminals,
so both ends check them: the broker when a Hello arrives, a node before it says Hello and when
a Welcome names its run.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHOWN = 120


def name_fault(name: str) -> str:
    """Return what is wrong with the name of a run or a node, in one sentence; "" if nothing."""
    if _NAME.fullmatch(name):
        return ""
    return (
        "expected 1 to 100 ASCII letters, digits, '.', '_' and '-', the first a letter or a "
        f"digit, got {name[:_SHOWN]!r}"
    )
