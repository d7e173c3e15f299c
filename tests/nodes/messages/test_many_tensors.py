"""A model of more tensors than fit into a header: training, recovery, replay, trace."""

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.wire.schema import MAX_MESSAGE_BYTES
from fedmq.nodes.cli.main import main
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from fedmq.nodes.trace.groups import groups_of
from tests.algorithms.tiny import Tiny
from tests.own_code import ALLOW, OWN_CODE

pytestmark = pytest.mark.slow

LAYERS = 120


class Wide(nn.Module):
    """Many small parallel layers with names as long as torchvision's."""

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict(
            {
                f"denseblock{n}_transition_denselayer": nn.Sequential(
                    nn.Linear(2, 2), nn.BatchNorm1d(2)
                )
                for n in range(LAYERS)
            }
        )

    def forward(self, x):
        return torch.stack([each(x) for each in self.features.values()]).mean(dim=0)


class Many(Tiny):
    """Two clients that train, and one that never trains."""

    held_out = 1

    def module(self):
        return nn.Sequential(Wide(), nn.Linear(2, 2))

    def client(self, index):
        return self.points(100 + index, 10)

    def client_test(self, index):
        return self.points(200 + index, 10)


def setup_of(name, schedule, codec, **algorithm):
    return set_up(
        build(
            {
                "run": {"id": "run", "versions": 2, "evaluate_every": 1, "checkpoint_s": 0.0},
                "problem": {"name": f"{__name__}:Many"},
                "algorithm": {"name": name, **algorithm},
                "schedule": schedule,
                "codec": {"up": codec},
            }
        ),
        OWN_CODE,
    )


RUNS = {
    "fedavg": ({"name": "buffered", "size": 2, "concurrency": 2}, "quantize(4)", {"epochs": 1}),
    "fedper": ({"name": "rounds", "fraction": 1.0}, "raw", {"epochs": 1, "head": 1}),
    "fedavg-topk": (
        {"name": "buffered", "size": 2, "concurrency": 2},
        "limit(0) | topk(0.5)",
        {"epochs": 1},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Use the threads of ``fedmq replay``: BatchNorm's sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """Return (setup, folder) of a run in which processes crash and resume from checkpoints."""
    schedule, codec, options = RUNS[request.param]
    setup = setup_of(request.param.partition("-")[0], schedule, codec, **options)
    folder = tmp_path_factory.mktemp("run")
    simulation = Simulation(setup, 2, folder, 4, Chances(train_s=0.3, crash=0.2))
    assert simulation.run(10.0, 400.0)
    simulation.close()
    return setup, folder


def fedmq(*words, code=0):
    result = CliRunner().invoke(main, [*map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def with_tables(folder):
    trace = Trace(folder)
    for entry in trace.entries():
        message = getattr(entry, "read", lambda: None)()
        if message is not None and any(each.table for each in groups_of(message)[0]):
            yield entry.seq, message, len(entry.message)


def test_every_kind_of_message_that_names_tensors_has_a_table(run):
    _, folder = run
    found = list(with_tables(folder))
    assert {"run", "version", "task", "evaluate", "result"} <= {m.kind for _, m, _ in found}
    assert all(size < MAX_MESSAGE_BYTES / 8 for _, _, size in found)


def test_the_run_replays_and_its_tasks_train_to_the_same_bytes(run):
    setup, folder = run
    assert "match the record\n" in fedmq("replay", folder, *ALLOW)
    assert "match the record\n" in fedmq("replay", folder, "--from-checkpoint", *ALLOW)
    trace = Trace(folder)
    answers = [
        each
        for node in ("worker-0", "worker-1")
        for each in Retraining(trace, setup, node).train_all()
    ]
    assert answers
    assert [each.message.re for each in answers if not each.matches] == []


def test_the_trace_shows_the_tensors(run):
    _, folder = run
    shown = {message.kind: seq for seq, message, _ in with_tables(folder)}
    for kind, seq in shown.items():
        output = fedmq("trace", "show", folder, seq)
        assert "names and shapes: " in output, kind
        assert "features.denseblock7_transition_denselayer.0.weight" in output, kind
        assert "cannot be decoded" not in output, kind
    assert "differ" not in fedmq("trace", "diff", folder, folder)
    assert "all intact" in fedmq("trace", "stats", folder)


def test_new_clients_start_from_its_end(run):
    setup, folder = run
    personal = setup.algorithm.name == "fedper"
    output = fedmq("personalise", folder, *ALLOW, code=0 if personal else 2)
    assert ("worst tenth" in output) is personal
