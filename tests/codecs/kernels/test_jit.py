import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedmq
from fedmq.codecs.kernels import jit

RUN = """
import json
from fedmq.codecs.kernels import native_selection, seeds
counts = native_selection.count(None, seeds.state(7, seeds.Purpose.MASK), 1000)
stats = native_selection.count.stats
hits, misses = (sum(each.values()) for each in (stats.cache_hits, stats.cache_misses))
print(json.dumps([counts.nonzero()[0].tolist(), hits, misses]))
"""


def run(root: Path) -> tuple[list[int], int, int]:
    """Return the filled bins of `count` in a new process, its cache hits and its compilations."""
    environment = {name: each for name, each in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    # -B: bytecode files have dates in whole seconds, and the test changes sources faster.
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-c", RUN],
        env={**environment, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    bins, hits, misses = json.loads(done.stdout)
    return bins, hits, misses


@pytest.mark.end_to_end
def test_a_change_in_a_helper_recompiles_its_kernels_and_otherwise_the_cache_is_used(
    tmp_path: Path,
) -> None:
    package = Path(fedmq.__file__).parent
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package / "codecs", tmp_path / "fedmq" / "codecs", ignore=skipped)
    for name in ("__init__.py", "_lazy.py"):
        shutil.copy(package / name, tmp_path / "fedmq")
    kernels = tmp_path / "fedmq" / "codecs" / "kernels"

    first, hits, misses = run(tmp_path)
    assert (hits, misses) == (0, 1)
    assert run(tmp_path) == (first, 1, 0)

    # A function of `native`, and a constant that it takes from `seeds`.
    for name, old, new in (
        ("native.py", "u32(h * _HASH_A)", "u32(h * _HASH_B)"),
        ("seeds.py", "HASH_A = 0x21F0AAAD", "HASH_A = 0x21F0AAAF"),
    ):
        source = (kernels / name).read_text()
        assert source.count(old) == 1
        (kernels / name).write_text(source.replace(old, new))
        changed, hits, misses = run(tmp_path)
        assert (hits, misses) == (0, 1)
        assert changed != first
        (kernels / name).write_text(source)
    # The cache holds the code of several versions.
    assert run(tmp_path) == (first, 1, 0)


def test_kernels_compile_without_a_writable_folder_for_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_folder(function: object) -> None:
        raise RuntimeError(f"cannot cache function {function}: no locator available")

    monkeypatch.setattr(jit, "_Cache", no_folder)
    assert jit.entry(lambda x: x + 1)(2) == 3


def test_without_a_home_no_cache_folder_named_tilde_is_created(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert jit._may_cache()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert not jit._may_cache()
