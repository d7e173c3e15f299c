"""End this process when the process that started it has ended."""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT_VARIABLE = "FEDMQ_PARENT"
"""Environment variable with the id of the process to follow; a command removes it at its start."""
_LOOK_S = 0.5


def follow_parent() -> None:
    """Send this process SIGTERM once its parent has ended, if the environment names the parent.

    A command that Python code started must not go on by itself: nobody would see it or stop it.
    """
    named = os.environ.pop(PARENT_VARIABLE, "")
    if named.isdecimal():
        threading.Thread(
            target=_follow, args=(int(named),), name="parent watch", daemon=True
        ).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:  # an orphan gets another parent
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
