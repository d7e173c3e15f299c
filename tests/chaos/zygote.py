"""Forks nodes off a process that has imported torch, so that one starts in 0.2 s, not in 3.

A script, not a module: it reads one JSON object a line, {arguments, folder, log}, answers
with the pid of a process that runs ``fedmq ARGUMENTS`` there, and leaves its exit code in
``LOG.PID.code``. When its standard input ends, it kills what is left of them.
"""

import gc
import json
import os
import selectors
import signal
import sys
from pathlib import Path

import fedmq.nodes.cluster.preload  # noqa: F401 - it is what is shared
from fedmq.nodes.cli.main import main

HERE = Path(__file__).parent


def run(arguments: list[str], folder: str, log: str) -> None:
    """Be a node; does not return."""
    os.setsid()
    os.chdir(folder)
    with Path(log).open("a") as file, Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path.append(str(HERE))  # for chaos_models.py
    code = 1
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Fork on demand, until there is no more demand."""
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    living: dict[int, tuple[int, str]] = {}
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                line = sys.stdin.buffer.readline()
                if not line:
                    for pid, _log in living.values():
                        os.kill(pid, signal.SIGKILL)
                    return
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    selector.close()
                    run(**request)
                handle = os.pidfd_open(pid)
                living[handle] = (pid, request["log"])
                selector.register(handle, selectors.EVENT_READ)
                print(pid, flush=True)  # noqa: T201 - the answer
            else:
                handle = key.fd
                selector.unregister(handle)
                os.close(handle)
                pid, log = living.pop(handle)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                fresh = Path(f"{log}.{pid}.new")
                fresh.write_text(str(code))
                fresh.replace(f"{log}.{pid}.code")


if __name__ == "__main__":
    serve()
