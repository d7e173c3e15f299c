"""How every command ends: signals, standard streams, and its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from fedmq.nodes.process import streams
from fedmq.nodes.process.signals import INTERRUPTED, this_process

FAILED = 1


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """Run a command; end with its exit code, or as Unix tools do if its output cannot be written.

    Stopped by a signal, it ends with exit code 130 and one sentence, whatever it was doing.
    """
    # Where the streams are the process's own, the signals stay taken while it ends, too.
    is_process = streams.set_up()
    try:
        with contextlib.ExitStack() as stack:
            try:
                if is_process:
                    this_process.install()
                else:
                    stack.enter_context(this_process.taken())
                try:
                    yield
                finally:
                    streams.flush()
            except BaseException:
                # After a signal, any error may be its doing: code that is cut in two by
                # `Stopped` raises what it likes.
                if not this_process.count:
                    raise
            finally:
                this_process.finish()
            if this_process.count:
                this_process.announce()
                sys.exit(INTERRUPTED)
    except streams.OutputFailed as error:
        if error.broken_pipe:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
        sys.stderr.write(f"fedmq: {error}\n")
        sys.exit(FAILED)
