"""A trainer whose processes are those of a Ray cluster, on any number of machines."""

from __future__ import annotations

import logging
import os
import signal
import threading
from concurrent.futures import Future
from typing import Any

from fedmq.algorithms.allowed import Allowed
from fedmq.nodes.errors import ConfigError, RunFailed
from fedmq.nodes.process.exception_text import clip_text
from fedmq.nodes.run.config import Config
from fedmq.nodes.simulation.trainers import QueuedTrainer
from fedmq.nodes.simulation.training_jobs import Parcel, Recipe, run_job

_AHEAD = 4
"""Tasks for each process that are submitted before their results are asked for."""
_ADDRESS = "RAY_ADDRESS"
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes Ray listen on 127.0.0.1 only, on every system; Ray reads it when it is imported."""
_REPEATS = 1
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it reports its use to nobody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it warns of a change to come
    "RAY_task_oom_retries": str(_REPEATS),  # by default without an end
}


class RayTrainer(QueuedTrainer):
    """Computes tasks on the Ray cluster at ``RAY_ADDRESS``, or on one of its own on this machine.

    Each task is a Ray task with ``worker.threads`` CPUs, and one GPU if ``worker.device`` names
    one. A process of the cluster makes the objects of the run with its first task; it needs fedmq
    and the user's code. Ray repeats a task once if its process or machine is lost.

    Args:
        config: of the run.
        allowed: user code that it may name.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, config: Config, allowed: Allowed) -> None:
        self._ray = _connected()
        share = float(config.worker.threads)
        there = self._ray.cluster_resources()
        processes = int(there.get("CPU", 1.0) // share)
        gpus = 1 if config.worker.device.startswith("cuda") else 0
        if processes < 1 or there.get("GPU", 0.0) < gpus:
            self.close()
            raise ConfigError(
                f"--on ray: expected a cluster with {share:g} CPUs and {gpus} GPUs for a task, got "
                f"{there.get('CPU', 0.0):g} and {there.get('GPU', 0.0):g}"
            )
        super().__init__(_AHEAD * processes)
        self._recipe = self._ray.put(Recipe(config.to_toml(), allowed))
        self._task = self._ray.remote(num_cpus=share, num_gpus=gpus, max_retries=_REPEATS)(run_job)

    def close(self) -> None:
        """Give up all tasks; leave the cluster, or end the own one."""
        self._ray.shutdown()

    def submit(self, job: Parcel, who: str) -> Future[Parcel]:
        """Give a job to the cluster; see `QueuedTrainer.submit`."""
        answer: Future[Parcel] = Future()

        def done(found: Future[Parcel]) -> None:
            error = found.exception()
            if error is None:
                answer.set_result(found.result())
            else:
                reason = clip_text(str(error) or type(error).__name__)
                answer.set_exception(RunFailed(f"Ray cannot compute a task of {who}: {reason}"))

        self._task.remote(self._recipe, job).future().add_done_callback(done)
        return answer


def _connected() -> Any:
    """Return the module ``ray``, connected to a cluster.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """
    address = os.environ.get(_ADDRESS)
    for name, value in {**_SETTINGS, **({} if address else _ON_LOOPBACK)}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--on ray: Ray is not installed; pip install 'fedmq[ray]' installs it"
        ) from None
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options["include_dashboard"] = False
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at {_ADDRESS}={address}" if address else "Ray on this machine"
        raise ConfigError(f"--on ray: cannot use {where}: {clip_text(str(error))}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
    return ray
