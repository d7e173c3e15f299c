"""Fixtures: the folder of a run that was simulated in memory, and commands that copy it."""

from pathlib import Path

import pytest

from fedmq.broker.ledger.reader import read_entries
from fedmq.nodes.api import running
from fedmq.nodes.run_folder.folder import write_config
from fedmq.nodes.run_folder.summary_file import write_summary
from fedmq.nodes.simulation.virtual_run import Simulation
from tests.nodes.api.commands import Commands
from tests.sim.history import setup_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Return the folder of a finished run; nobody may change it."""
    made = tmp_path_factory.mktemp("run")
    setup = setup_of(0, 1.0)
    simulation = Simulation(setup, 2, made / "ledger", 1)
    assert simulation.run(40.0, 400.0)
    simulation.close()
    begun = next(iter(read_entries(made / "ledger"))).at
    write_config(made, setup.config, begun)
    write_summary(made, begun)
    return made


@pytest.fixture
def commands(monkeypatch, tmp_path: Path, folder: Path) -> Commands:
    monkeypatch.chdir(tmp_path)
    made = Commands(folder)
    monkeypatch.setattr(running, "ChildCommand", made)
    return made
