"""A problem's model is the same at every call; nodes that start from another model are found."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems.registry import load_problem
from fedmq.algorithms.toolkit.returned import result_of
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.cluster.view import closing_table, line
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.messages.actions import Start
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.replay.workers import Retraining
from fedmq.nodes.run.agreement import disagree
from fedmq.nodes.run.version_zero import version_zero
from fedmq.nodes.run_folder.summary import summary_of
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import Evaluated, Train, Trained, Worker
from tests.algorithms.fleet import Fleet, make_setup, posted
from tests.algorithms.tiny import Dropping, Normed, Tiny
from tests.nodes.replay import material
from tests.own_code import OWN_CODE


class Made(Tiny):
    """A module made by a function of the number of the call."""

    def __init__(self, make):
        super().__init__()
        self.make, self.calls = make, itertools.count()

    def model(self):
        return self.make(next(self.calls))


def drawn_anew(module):
    """Draw from an unseeded generator."""
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.random.default_rng().random((2, 2))))


def with_buffer(value, *, persistent=True):
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.fill_(0.5)
        module.bias.fill_(0.25)
    module.register_buffer("b", value, persistent=persistent)
    return module


@pytest.mark.parametrize("problem", [Tiny(), Normed(), Dropping()], ids=lambda p: type(p).__name__)
def test_a_seeded_model_has_one_fingerprint_and_does_not_use_global_generators(problem):
    before = torch.random.get_rng_state()
    assert version_zero(problem) == version_zero(problem)
    assert torch.equal(torch.random.get_rng_state(), before)


class Unseeded(Tiny):
    def __init__(self, seed):
        super().__init__(seed=seed)

    def model(self):
        return nn.Linear(2, 2)


class Forgetful(Unseeded):
    def __init__(self, seed):
        super().__init__(seed)
        del self.seed


def weights(problem):
    return torch.cat([each.detach().reshape(-1) for each in problem.model().parameters()])


def test_a_model_without_a_seed_of_its_own_draws_from_the_runs():
    class Longer(Unseeded):
        def model(self):
            return nn.Sequential(super().model(), nn.Linear(2, 2))

    torch.manual_seed(5)
    assert torch.equal(weights(Unseeded(1)), weights(Unseeded(1)))
    assert not torch.equal(weights(Unseeded(1)), weights(Unseeded(2)))
    assert version_zero(Unseeded(1)) is not None
    first, second = Longer(1).model()
    assert not torch.equal(first.weight, second.weight), "draws go on after the parent's"


def test_a_problem_that_does_not_store_the_seed_still_draws_from_it():
    table = {"name": "tests.nodes.run.test_version_zero:Forgetful"}
    made = [load_problem(table, seed, OWN_CODE) for seed in (1, 1, 2)]
    first, again, other = (weights(each) for each in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda _: nn.Linear(2, 2).apply(drawn_anew), "weight"),
        (lambda call: with_buffer(torch.tensor([0.0, float(call)])), "b"),
        (lambda call: with_buffer(torch.tensor([-0.0 if call else 0.0])), "b"),
        (lambda call: with_buffer(torch.tensor(call)), "b"),
        (lambda call: with_buffer(torch.tensor(1j * call), persistent=False), "b"),
        (lambda call: with_buffer(torch.zeros(2 + call)), "b"),
        (lambda call: with_buffer(torch.zeros(2, dtype=torch.bfloat16) + call), "b"),
        (lambda call: with_buffer(torch.tensor([True, call == 0])), "b"),
    ],
)
def test_a_model_that_differs_from_call_to_call_is_an_error_that_names_the_tensor(make, name):
    with pytest.raises(ConfigError) as caught:
        version_zero(Made(make))
    assert str(caught.value) == (
        "problem.name: expected model() to return the same values at every call, but "
        f"'{name}' differs from one call to the next: seed its random generator"
    )


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([float("-inf"), 0.0]),
        torch.tensor([float("nan")]),
        torch.tensor([1 + 2j]),
        torch.zeros(0),
        torch.tensor(3),
        torch.eye(2).to_sparse(),
    ],
    ids=str,
)
def test_values_of_every_kind_have_a_fingerprint(value):
    norm, total = version_zero(Made(lambda _: with_buffer(value)))
    assert norm >= 1.0
    assert total == total


def test_uninitialized_lazy_parameters_are_left_out_of_the_fingerprint():
    assert version_zero(Made(lambda _: nn.LazyLinear(3))) == [0.0, 0.0]


@pytest.mark.parametrize("error", [ProblemError("no model"), NotImplementedError()])
def test_a_problem_without_a_model_has_none(error):
    def none(_call):
        raise error

    assert version_zero(Made(none)) is None


# ---- between nodes


def values(seed, dtype=torch.float32):
    torch_ = torch.Generator().manual_seed(seed)
    return torch.randn(3_000_000, generator=torch_).to(dtype)


def module_of(vector):
    module = nn.Module()
    module.w = nn.Parameter(vector)
    return module


def test_rounding_is_no_disagreement_and_another_seed_is():
    one = version_zero(Made(lambda _: module_of(values(0))))
    rounded = torch.nextafter(values(0), torch.tensor(torch.inf))  # every value, the same way
    assert not disagree(one, version_zero(Made(lambda _: module_of(rounded))))
    assert disagree(one, version_zero(Made(lambda _: module_of(values(1)))))
    assert disagree(one, version_zero(Made(lambda _: module_of(-values(0)))))
    assert disagree(one, version_zero(Made(lambda _: module_of(values(0).flip(0)))))


def test_the_same_values_under_other_names_disagree():
    def pair(first, second):
        module = nn.Module()
        module.a, module.b = nn.Parameter(values(first)), nn.Parameter(values(second))
        return version_zero(Made(lambda _: copy.deepcopy(module)))

    assert not disagree(pair(0, 1), pair(0, 1))
    assert disagree(pair(0, 1), pair(1, 0))


@pytest.mark.parametrize(
    "other",
    [None, [], [1.0], "x", [1.0, "2"], {"norm": 1.0}, [1.0, 2.0, 3.0], [True, 2.0]],
    ids=str,
)
def test_a_malformed_fingerprint_does_not_disagree(other):
    assert not disagree([1.0, 2.0], other)
    assert not disagree(other, [1.0, 2.0])


@pytest.mark.parametrize(
    "other", [[float("nan"), 2.0], [1.0, float("inf")], [1.1, 2.0], [1.0, 2.1]]
)
def test_another_fingerprint_disagrees(other):
    assert disagree([1.0, 2.0], other)


def answers_of(fleet, worker, version_0):
    """Yield a result and a score posted by a node with this fingerprint."""
    message, data = fleet.tasks[0]
    node = Worker(fleet.setup, "run", worker, [(0, 1)], version_0=version_0)
    [train] = node.handle(Delivery(7, 0.0, message, dict(enumerate(data))))
    at = train.at(fleet.setup, "cpu")
    done = Trained(*result_of(fleet.setup.algorithm.train(train.task, at), "train"), 0.0)
    yield posted(node, node.handle(done), lambda _client, kept: kept).message
    message, data = fleet.evaluations[0]
    [_] = node.handle(Delivery(8, 0.0, message, dict(enumerate(data))))
    [post] = node.handle(Evaluated({"accuracy": 0.5, "loss": 0.5}))
    yield post.message


def ledger(*messages):
    return [
        Accepted(seq=seq, at=100.0 + seq, message=encode_message(message))
        for seq, message in enumerate(messages)
    ]


def joined(node, role):
    body = {"node": node, "role": role, "session": "s", "clients": []}
    about = {"id": f"broker/{node}", "run": "run", "sender": "broker", "to": "aggregator"}
    return Message(kind="joined", **about, body=body)


def test_summary_and_view_name_the_nodes_that_disagree():
    setup = make_setup({"name": "stream", "concurrency": 2}, evaluate_every=1)
    core = Aggregator(setup, "run", "aggregator", Computed(version_0=[4.0, -1.0]))
    [run] = [each.message for each in core.handle(Start()) if isinstance(each, PostMessage)]
    assert run.body["version_0"] == [4.0, -1.0]
    fleet = Fleet(setup)
    fleet.join_evaluator()
    fingerprints = {"same": [4.0, -1.00001], "old": None, "other": [4.0, 2.0]}
    messages = [joined("aggregator", "aggregator"), run]
    for node, version_0 in fingerprints.items():
        result, score = answers_of(fleet, node, version_0)
        assert result.body.get("version_0") == score.body.get("version_0") == version_0
        messages += [joined(node, "worker"), result, score]
    history = RunHistory()
    for entry in ledger(*messages):
        history.feed(entry)
    assert history.disagreeing == ["other"]
    assert line(history).endswith("different first model on other")
    summary = summary_of(history)
    assert summary["disagreeing"] == ["other"]
    assert dict(closing_table(summary).rows)["first model"].startswith("different on other: ")


def test_no_node_is_named_if_all_agree():
    history = RunHistory()
    assert summary_of(history)["disagreeing"] == []
    assert "first model" not in line(history)
    assert "first model" not in dict(closing_table(summary_of(history)).rows)


def test_a_result_saved_by_another_node_names_the_node_that_posts_it():
    setup = make_setup(
        {"name": "stream", "concurrency": 2},
        "Normed",
        algorithm={"name": "tests.algorithms.tiny:Counting"},
    )
    fleet = Fleet(setup)
    message, data = fleet.tasks[0]
    kept = ClientStateStore()
    posts = []
    for node, version_0 in (("one", [4.0, 2.0]), ("two", [4.0, -1.0])):
        worker = Worker(setup, "run", node, [(0, 1)], kept, version_0)
        actions = worker.handle(Delivery(7, 0.0, message, dict(enumerate(data))))
        if isinstance(actions[0], Train):
            at = actions[0].at(setup, "cpu")
            sent = result_of(setup.algorithm.train(actions[0].task, at), "train")
            actions = worker.handle(Trained(*sent, 0.0))
        posts.append(posted(worker, actions, kept.put).message)
    assert [each.body["version_0"] for each in posts] == [[4.0, 2.0], [4.0, -1.0]]


def test_a_replay_on_another_kind_of_device_starts_from_the_recorded_version_0(tmp_path):
    setup = make_setup({"name": "stream", "concurrency": 2}, evaluate_every=1)
    simulation = Simulation(setup, 2, tmp_path / "run", 5, Chances(train_s=0.3))
    assert simulation.run(0.0, 400.0)
    simulation.close()
    kinds = {"run", "result", "score"}
    changes = {
        seq: material.edit(body={"version_0": [4.0, -1.0]})
        for seq, each in material.messages(tmp_path / "run")
        if each.kind in kinds
    }
    assert len(changes) > 6
    (tmp_path / "other").mkdir()
    trace = Trace(material.rewrite(tmp_path / "run", tmp_path / "other", changes))
    replay = Replay(trace, setup=setup)
    assert sum(1 for _ in replay.steps()) > 6
    assert replay.core.version == 3
    for node in ("worker-0", "evaluator"):
        assert all(each.matches for each in Retraining(trace, setup, node).train_all())


def test_a_model_that_is_the_same_object_twice_is_an_error():
    """The second task would start from the weights that the first has trained."""
    module = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="to make a new module at every call"):
        version_zero(Made(lambda _: module))


def test_a_tensor_attribute_that_differs_is_named():
    def drawn(_):
        module = nn.Linear(2, 2)
        with torch.no_grad():
            module.weight.zero_()
            module.bias.zero_()
        module.features = torch.from_numpy(np.random.default_rng().random(4))
        return module

    with pytest.raises(ConfigError, match="'features' differs from one call to the next"):
        version_zero(Made(drawn))
