"""A run with crashes in virtual time, and its record folded and trained again."""

from fedmq.broker.inspection.trace import Trace
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.simulation.virtual_run import Chances, Simulation


def check_recorded_run(setup, folder, versions, nodes=("worker-0", "worker-1")):
    """Record a run; assert that the fold, and every task of these nodes, come to the same bits.

    Returns the replay, at its end.
    """
    simulation = Simulation(setup, 2, folder, 5, Chances(train_s=0.3, crash=0.1))
    assert simulation.run(10.0, 400.0)
    simulation.close()
    trace = Trace(folder)
    replay = Replay(trace, setup=setup)
    for _ in replay.steps():
        pass
    assert replay.core.version == versions
    assert model_digest(replay.core.tensors()) == model_digest(simulation.aggregator.core.tensors())
    for node in nodes:
        tasks = list(Retraining(trace, setup, node).train_all())
        assert tasks
        assert all(each.matches for each in tasks)
    return replay
