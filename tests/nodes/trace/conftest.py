"""Fixtures: a run written by hand, and simulated runs with faults of every kind."""

import pytest
from click.testing import CliRunner

from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.network import Faults
from fedmq.nodes.cli.main import main
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from tests.nodes.trace import story
from tests.sim.history import setup_of


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Return the folder of the story, and its numbers by name; nobody may change it."""
    folder = tmp_path_factory.mktemp("story")
    return folder, story.write(folder / "ledger")


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Return a maker of simulated runs: folder, by schedule and seed."""
    made = {}

    def make(schedule, seed, *, trouble=True):
        if (schedule, seed, trouble) not in made:
            folder = tmp_path_factory.mktemp(f"run-{schedule}-{seed}")
            chances = Chances(Faults(loss=0.1, duplicate=0.1), crash=0.1, doom=0.1, cut=0.2)
            simulation = Simulation(
                setup_of(schedule, 1.0),
                2,
                folder,
                seed,
                chances if trouble else None,
                BrokerSettings(lease_s=3.0, beat_s=0.5, deliveries=1000),
            )
            assert simulation.run(40.0, 400.0)
            simulation.close()
            made[schedule, seed, trouble] = folder
        return made[schedule, seed, trouble]

    return make


@pytest.fixture
def fedmq():
    """Run a command; return its result: output (stdout), stderr, exit_code."""

    def run(*words, code=0):
        result = CliRunner().invoke(main, ["trace", *map(str, words)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output + result.stderr
        return result

    return run
