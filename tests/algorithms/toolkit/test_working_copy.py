"""A module may do anything to itself: it learns as in torch, in any order, or is refused."""

import dataclasses

import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Result, Task
from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.fedsgd import FedSGD
from fedmq.algorithms.personal.fedavg_finetune import FedAvgFT, LocalOnly
from fedmq.algorithms.personal.fedper import FedPer
from fedmq.algorithms.personal.perfedavg import PerFedAvg
from fedmq.algorithms.personal.personalised_fedavg import PersonalisedFedAvg
from fedmq.algorithms.pfedhn.algorithm import PFedHN
from fedmq.algorithms.toolkit.sgd import evaluate_module
from fedmq.codecs.registry import decode, make_codec
from tests.algorithms import restless
from tests.algorithms.restless import FOLLOWED, Restless, by_torch
from tests.algorithms.tiny import client, one_round, task
from tests.algorithms.unfollowed import REFUSED, ArrayOfBuffer, ViewOfParameter

VERSIONS = 3


def bits(tensors):
    return {name: each.detach().numpy().tobytes() for name, each in tensors.items()}


def loaded(problem, algorithm, state):
    """Return a version as a state dict of the problem's own dtypes."""
    own = problem.model().state_dict()
    return {
        name: algorithm.tensors(state)[name].to(own[name].dtype)
        for name in own
        if name in algorithm.tensors(state)
    }


def options(kind):
    # torch's momentum does not take sparse gradients.
    return {"momentum": 0.0 if kind is restless.SparseGradient else 0.8}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLLOWED)
def test_one_client_learns_what_a_plain_loop_of_torch_does(kind):
    """Three versions of two epochs: the module starts each task as it was made."""
    problem = Restless(kind, clients=1)
    algorithm = FedAvg(lr=0.1, epochs=2, batch_size=3, **options(kind))
    state = algorithm.start(problem)
    for version in range(VERSIONS):
        at = client(problem, 0, seed=version)
        expected = by_torch(problem, at, loaded(problem, algorithm, state), algorithm)
        result = algorithm.train(task(state, reply="model"), at).payload
        gathered = algorithm.accumulate(
            algorithm.new_accumulator(state), state, Result(0, 0, result, 1), 1.0
        )
        state = algorithm.commit(state, gathered, 1.0)
        now = loaded(problem, algorithm, state)
        wanted = dict(expected.state_dict())
        for name, each in now.items():
            torch.testing.assert_close(each, wanted[name], rtol=0, atol=2e-6, msg=name)
        judge = problem.model()
        judge.load_state_dict(now, strict=False)
        metrics = algorithm.evaluate(task(state), problem, "cpu")
        assert metrics == pytest.approx(evaluate_module(judge, problem, "cpu"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLLOWED)
@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(batch_size=3, epochs=2),
        FedSGD(),
        FedAvgFT(batch_size=3, finetune_epochs=1),
        LocalOnly(batch_size=3, finetune_epochs=1),
        PerFedAvg(batch_size=3, steps=2),
        PersonalisedFedAvg(batch_size=3, epochs=1, switch=0, steps=2),
        PFedHN(hidden=4, layers=1, batches=3, batch_size=3),
    ],
    ids=lambda each: each.name,
)
def test_the_order_of_clients_and_evaluations_does_not_matter(algorithm, kind):
    if kind is restless.Fourier and algorithm.name == "pfedhn":
        pytest.skip("a hypernetwork makes no complex numbers")
    problem = Restless(kind)
    state = algorithm.start(problem)

    def result(index):
        payload = algorithm.train(
            Task(0, algorithm.task(state, index)), client(problem, index)
        ).payload
        return bits(payload.weights), bits(payload.exact)

    def score(index):
        examined = Task(0, algorithm.evaluation_task(state, index))
        if algorithm.evaluated_by == "model":
            return dict(algorithm.evaluate(examined, problem, "cpu"))
        return dict(algorithm.evaluate_client(examined, client(problem, index)))

    first = [result(index) for index in range(3)], [score(index) for index in range(3)]
    again = [(score(index), result(index)) for index in (2, 0, 1, 2)]
    assert again == [(first[1][index], first[0][index]) for index in (2, 0, 1, 2)]


@pytest.mark.parametrize("kind", [ViewOfParameter, ArrayOfBuffer])
def test_an_attribute_that_is_a_view_is_refused_wherever_the_model_is_made(kind):
    problem = Restless(kind)
    with pytest.raises(ProblemError, match=f"in memory of its own, it shares that of {kind.name}"):
        FedAvg().start(problem)
    with pytest.raises(ProblemError, match=kind.name):
        FedAvg().try_model(problem, problem.client(0), "cpu")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(kind):
    """Before the first task, and at a task."""
    problem = Restless(kind)
    name = kind.name
    with pytest.raises(ProblemError, match=name):
        FedAvg().try_model(problem, problem.client(0), "cpu")
    state = FedAvg().start(problem)
    with pytest.raises(ProblemError, match=name):
        FedAvg(epochs=1).train(task(state), client(problem))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_dry_step_leaves_nothing_behind(kind):
    problem, untried = Restless(kind), Restless(kind)
    drawn = torch.get_rng_state()
    FedAvg().try_model(problem, problem.client(0), "cpu")
    assert torch.get_rng_state().equal(drawn)
    one, other = (
        FedAvg().train(task(FedAvg().start(each)), client(each, 1)).payload
        for each in (problem, untried)
    )
    assert bits(one.weights) == bits(other.weights)
    assert bits(one.exact) == bits(other.exact)


def test_a_dry_step_leaves_a_model_that_cannot_be_made_to_the_task_that_meets_it():
    def make():
        raise ZeroDivisionError("of the user's own")

    problem = Restless(make)
    FedAvg().try_model(problem, problem.client(0), "cpu")
    half = Restless(lambda: nn.Linear(2, 2).half())
    with pytest.raises(ProblemError, match=r"expected float32 weights, got torch\.float16"):
        FedAvg().try_model(half, half.client(0), "cpu")


def test_a_dry_step_leaves_other_errors_to_the_task_that_meets_them():
    class Misfit(restless.Base):
        def forward(self, x):
            raise ZeroDivisionError("of the user's own")

    problem = Restless(Misfit)
    FedAvg().try_model(problem, problem.client(0), "cpu")
    with pytest.raises(ZeroDivisionError):
        FedAvg().train(task(FedAvg().start(problem)), client(problem))


def test_a_buffer_that_is_assigned_learns_what_its_twin_does():
    """To the bit, an integer buffer included."""
    ends = []
    for kind in (restless.AssignedBuffer, restless.ChangedBuffer, restless.BufferWithNewData):
        algorithm, problem = FedAvg(batch_size=3), Restless(kind)
        state = algorithm.start(problem)
        for _ in range(VERSIONS):
            state = one_round(algorithm, problem, state)
        ends.append(bits(algorithm.tensors(state)))
    assert ends[0] == ends[1] == ends[2]


def test_a_head_and_a_body_follow_the_module():
    """FedPer of a sequence that counts: whoever trained before, the result is the same."""

    class Counting(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*(layers or (nn.Linear(2, 3), restless.AssignedBuffer())))

    class Own(restless.AssignedBuffer):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) / self.calls

    def make():
        return Counting(nn.Linear(2, 2), Own(), nn.Linear(2, 2))

    problem, algorithm = Restless(make), FedPer(batch_size=3, finetune_epochs=1)
    state = algorithm.start(problem)

    def once(index):
        at = client(problem, index)
        trained = algorithm.train(task(state), at)
        result, local = trained.payload, trained.local_state
        kept = dataclasses.replace(at, local=local)
        return (
            bits(result.weights),
            bits(result.exact),
            bits(local.exact),
            dict(algorithm.evaluate_client(task(state), kept)),
        )

    first = [once(index) for index in range(3)]
    assert [once(index) for index in (2, 1, 0)] == first[::-1]
    assert "1.mean" in algorithm.train(task(state), client(problem)).payload.exact


# ---- constants


class Constants(nn.Module):
    """What is not learned, in every dtype and with every value."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2)
        for each in self.frozen.parameters():
            each.requires_grad_(requires_grad=False)
        self.halves = nn.Parameter(torch.randn(3).half(), requires_grad=False)
        mask = torch.full((3, 3), -torch.inf).triu(1)
        values = {
            "mask": mask,
            "nan": torch.tensor([torch.nan, 1.0]),
            "zero": torch.tensor([-0.0, 0.1]),
            "turn": torch.polar(torch.ones(3), torch.arange(3.0)),
            "doubles": torch.tensor([0.1, -0.0, torch.inf], dtype=torch.float64),
            "brain": torch.tensor([0.1, 3e38, -0.0], dtype=torch.bfloat16),
            "pair": torch.tensor([0.1 + 2j], dtype=torch.complex128),
            "ids": torch.tensor([3, -1, 2**40]),
            "small": torch.tensor([[200, 7]], dtype=torch.uint8),
            "flags": torch.tensor([True, False, True]),
            "empty": torch.zeros(0, 2),
            "none": torch.zeros(0, dtype=torch.float64),
        }
        for name, each in values.items():
            self.register_buffer(name, each)
        self.register_buffer("mean", torch.tensor([0.0, -torch.inf]))

    def forward(self, x):
        if self.training:
            self.mean[0] += x.mean()
        turned = (x[:, :1] * self.turn.real[1]) + self.doubles[0].float()
        weight = self.mask[:2, :2].softmax(1)
        return self.layer(self.frozen(x) @ weight + turned) + self.mean[0]


@pytest.mark.slow
@pytest.mark.parametrize("reply", ["update", "model"])
@pytest.mark.parametrize("codec", ["raw", "cast(float16)", "hadamard | quantize(2)", "topk(0.5)"])
def test_constants_are_constants_to_the_bit_and_what_changes_is_right(codec, reply):
    """After three versions, encoded both ways where the codec allows it."""
    if reply == "model" and make_codec(codec).deltas_only:
        pytest.skip("a codec for updates")
    problem, algorithm = Restless(Constants), FedAvg(batch_size=3, epochs=1)
    first = problem.model().state_dict()
    state, means = algorithm.start(problem), []
    down = "raw" if make_codec(codec).deltas_only else codec
    for _ in range(VERSIONS):
        gathered, mean = algorithm.new_accumulator(state), algorithm.tensors(state)["mean"].clone()
        for index in range(3):
            sent = task(state, reply=reply)
            arrived = {**decode(make_codec(down).encode(sent.payload.weights, 1))}
            sent = dataclasses.replace(
                sent, payload=dataclasses.replace(sent.payload, weights=arrived)
            )
            result = algorithm.train(sent, client(problem, index)).payload
            assert set(result.weights) == {"layer.weight", "layer.bias"}
            assert set(result.exact) == {"mean"}
            back = dict(decode(make_codec(codec).encode(result.weights, 2)))
            result = dataclasses.replace(result, weights=back)
            gathered = algorithm.accumulate(gathered, state, Result(index, 0, result, 1), 1.0)
            mean[0] += sum(x.mean() for x, _ in _batches(problem, index, algorithm)) / 3
        state = algorithm.commit(state, gathered, 3.0)
        means.append((algorithm.tensors(state)["mean"], mean))
    now = algorithm.tensors(state)
    for name, each in first.items():
        if name in ("mean", "layer.weight", "layer.bias"):
            continue
        kept = now[name].to(each.dtype)
        assert kept.shape == each.shape
        assert (
            kept.contiguous().numpy(force=True).tobytes() == each.numpy().tobytes()
            if (each.dtype != torch.bfloat16)
            else kept.view(torch.int16).equal(each.view(torch.int16))
        ), name
    for found, expected in means:
        assert found[1] == -torch.inf
        torch.testing.assert_close(found[0], expected[0])


def _batches(problem, index, algorithm):
    from fedmq.algorithms.rng import derive_rng
    from fedmq.algorithms.toolkit.sgd import batches

    at = client(problem, index)
    return batches(at.data, algorithm.batch_size, 1, derive_rng(at.seed, "batches"))
