"""End a command: signals, standard streams, exit code."""

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
    """Run a command and exit with the documented code.

    After a stop signal the command exits with code 130 and one line on standard error. If the
    reader of standard output has closed it, the process ends by SIGPIPE, as Unix tools do.
    """
    # In a process of its own, the handlers stay installed until the interpreter has ended.
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
                # After a signal, ignore errors: code that `Stopped` interrupts can raise anything.
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
