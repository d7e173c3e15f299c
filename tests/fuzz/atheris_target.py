"""Fuzz one decoder for as long as one likes, guided by the branches that it takes.

::

    pip install atheris
    python tests/fuzz/atheris_target.py NAME --corpus DIR      # valid inputs to start from
    python tests/fuzz/atheris_target.py NAME DIR -max_total_time=60 -max_len=4096

NAME is a key of `DECODERS` (without one, they are listed); what follows goes to libFuzzer.
The decoders of a ledger write files: with ``TMPDIR`` on a file system in memory they are
five times as fast. What it finds is written to ``crash-*`` here, and runs again as
``python tests/fuzz/atheris_target.py NAME crash-...``.
"""

import importlib
import sys
import warnings
from pathlib import Path
from random import Random

# Not at the front: the folders there have names of the standard library.
sys.path.append(str(Path(__file__).parents[2]))


def main() -> None:
    """Write a corpus, or fuzz."""
    name, *rest = sys.argv[1:] or [""]
    if "--corpus" in rest[:1] and len(rest) == 2:
        importlib.import_module("tests.fuzz.seeds").write_corpus(name, Path(rest[1]))
        return
    # torch and pydantic first, without instruments: what is fuzzed is what reads bytes.
    for module in ("torch", "pydantic", "msgpack", "msgspec", "xxhash"):
        importlib.import_module(module)
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["fedmq", "tomllib"]):
        decoders = importlib.import_module("tests.fuzz.decoders")
    spoil = importlib.import_module("tests.fuzz.mutations").spoil
    if name not in decoders.DECODERS:
        sys.exit(f"expected one of {', '.join(decoders.DECODERS)}, got {name!r}")
    # The grammar of arguments warns of strange literals; an error would hide what follows.
    warnings.simplefilter("ignore")
    joined = name in decoders.JOINED

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """Change bytes as libFuzzer does, or values, which get further into a decoder."""
        rng = Random(seed)  # noqa: S311 - libFuzzer's own seed
        if rng.random() < 0.3:
            return bytes(atheris.Mutate(data, most))
        return bytes(spoil(rng, data, data, pieces=joined)[:most])

    atheris.Setup([sys.argv[0], *rest], decoders.DECODERS[name], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
