"""Settings that a run could never meet: refused before it begins, and not waited for."""

from __future__ import annotations

from collections.abc import Collection

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.setup import Setup


def check_attainable(setup: Setup, workers: Collection[str] = ()) -> None:
    """Refuse a configuration under which a run could not reach its end.

    Only for runs that begin: what was recorded under such a configuration can still be replayed.

    Args:
        setup: made from it.
        workers: names of all workers, where they are known.

    Raises:
        ConfigError: the sentence says which key, what was expected, and what stood there.
    """
    config, clients = setup.config, setup.problem.clients
    least = setup.schedule.least_clients()
    if least is not None and least[1] > clients:
        key, wanted = least
        raise ConfigError(
            f"schedule.{key}: expected at most problem.clients, {clients}, got {wanted}"
        )
    run = config.run
    if run.target_accuracy is not None and not run.evaluate_every:
        raise ConfigError(
            "run.evaluate_every: expected at least 1 where run.target_accuracy is to end the run "
            "early, got 0: only the last version would be evaluated"
        )
    if all(config.worker.straggling(name).drop >= 1 for name in workers or [""]):
        raise ConfigError("worker.drop: expected less than 1, got 1: every result would be lost")
