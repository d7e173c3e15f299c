"""What every test here has: processes that are gone at its end, whatever happened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.chaos.crew import Crew, Proxy, Zygote
from tests.chaos.ledgers import Watch

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True, scope="package")
def own_models() -> Iterator[None]:
    """A test that folds a ledger again finds chaos_models too, and leaves a core to others."""
    sys.path.append(HERE)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    sys.path.remove(HERE)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.close()


@pytest.fixture
def crew(tmp_path: Path, zygote: Zygote) -> Iterator[Crew]:
    crew = Crew(tmp_path, zygote)
    yield crew
    crew.end()


@pytest.fixture
def proxy(crew: Crew) -> Iterator[Proxy]:
    proxy = Proxy(crew.port)
    yield proxy
    proxy.close()


@pytest.fixture
def watch(crew: Crew) -> Watch:
    return Watch(crew.ledger)
