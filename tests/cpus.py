"""The kinds of CPU that this one can be for torch (ATEN_CPU_CAPABILITY)."""

import functools
import os
import subprocess
import sys

X86 = ("default", "avx2", "avx512")
"""torch's capabilities on x86 processors, each of which has all before it."""


@functools.cache
def capabilities():
    """Return those that this CPU has, the least first; () where it is no x86 processor.

    torch takes the word of ATEN_CPU_CAPABILITY for it: asked for more than there is, it ends
    with an illegal instruction.
    """
    own = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run(
        [sys.executable, "-c", ask], env=own, capture_output=True, text=True, check=True
    )
    best = done.stdout.strip().lower()
    return X86[: X86.index(best) + 1] if best in X86 else ()
