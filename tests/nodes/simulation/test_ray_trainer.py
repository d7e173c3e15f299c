"""Tasks that a Ray cluster trains."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from fedmq.nodes.errors import ConfigError, RunFailed
from fedmq.nodes.simulation.ray_trainer import RayTrainer
from fedmq.nodes.simulation.trainers import InlineTrainer
from tests.nodes.simulation.training import (
    CASES,
    failing,
    recipe_of,
    results,
    setup_of,
)

ROOT = Path(__file__).parents[3]
# A thread of Ray's may fail while Ray ends.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception in thread ray_:pytest.PytestUnhandledThreadExceptionWarning"
)


@pytest.fixture(scope="module")
def cluster():
    """Start a Ray cluster of two nodes on 127.0.0.1, which ``RAY_ADDRESS`` names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        # Ray reads them when it is imported; the first keeps it from the host's other addresses.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
            patch.setenv(name, "0")
        patch.setenv("RAY_task_oom_retries", "1")
        utils = pytest.importorskip("ray.cluster_utils", reason="the extra ray is not installed")
        node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}
        # pytest's own folders are too long for Ray's sockets.
        with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
            head = {**node, "include_dashboard": False, "temp_dir": folder}
            made = utils.Cluster(initialize_head=True, head_node_args=head)
            made.add_node(**node)
            patch.setenv("RAY_ADDRESS", made.address)
            yield made
            made.shutdown()


@pytest.mark.end_to_end
def test_a_task_that_no_node_has_the_cpus_for(cluster):
    setup = setup_of(worker={"threads": 9})
    with pytest.raises(ConfigError, match=r"--on ray: expected .* 9 CPUs and 0 GPUs .* got 2 and"):
        RayTrainer(setup.config, setup.config.allowed)


@pytest.fixture(scope="module")
def trainer(cluster):
    """Return a trainer on the cluster, for any set-up that a test gives it."""
    handler = signal.getsignal(signal.SIGTERM)
    setup = setup_of()
    made = RayTrainer(setup.config, setup.config.allowed)
    assert signal.getsignal(signal.SIGTERM) == handler
    yield made
    made.close()


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", CASES)
def test_a_ray_cluster_gives_the_same_bytes(trainer, case, monkeypatch):
    setup = setup_of(case)
    monkeypatch.setattr(trainer, "_recipe", recipe_of(setup))
    assert results(trainer, setup) == results(InlineTrainer(setup, "cpu"), setup)


@pytest.mark.end_to_end
def test_a_task_whose_process_dies_each_time_ends_the_run(trainer, monkeypatch):
    setup, action = failing(4)
    monkeypatch.setattr(trainer, "_recipe", recipe_of(setup))
    # A process of Ray takes seconds to start.
    monkeypatch.setattr(trainer, "_task", trainer._task.options(max_retries=0))
    with pytest.raises(RunFailed, match=r"^Ray cannot compute a task of client 4: "):
        trainer.start(action)()


def test_without_ray(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "ray", None)
    setup = setup_of()
    with pytest.raises(ConfigError, match=r"Ray is not installed; pip install 'fedmq\[ray\]'"):
        RayTrainer(setup.config, setup.config.allowed)
