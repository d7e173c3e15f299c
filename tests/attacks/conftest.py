"""Marks the kinds of attacks that the product does not withstand yet: see waiting.txt."""

from pathlib import Path

import pytest

WAITING = set(Path(__file__).with_name("waiting.txt").read_text().splitlines())


def pytest_collection_modifyitems(items):
    for item in items:
        if item.fspath.dirname.endswith("attacks") and item.name.partition("[")[2][:-1] in WAITING:
            item.add_marker(
                pytest.mark.xfail(strict=False, reason="waits for keys, rights, limits")
            )
