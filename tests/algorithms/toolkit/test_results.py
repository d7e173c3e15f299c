"""What is not learned: how it lies in vectors, travels, and is added up."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Payload, Result, Task
from fedmq.algorithms.errors import ProblemError, ResultError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.feddropout.algorithm import FedDropout
from fedmq.algorithms.fedsgd import FedSGD
from fedmq.algorithms.personal.fedper import FedPer
from fedmq.algorithms.personal.fedrep import FedRep
from fedmq.algorithms.personal.personalised_fedavg import PersonalisedFedAvg
from fedmq.algorithms.pfedhn.algorithm import PFedHN
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout, Slot
from fedmq.algorithms.toolkit.results import merge_counters
from fedmq.nodes.run.digests import model_digest
from tests.algorithms.restless import Restless
from tests.algorithms.tiny import Normed, client, payload, task


class Kinds(nn.Module):
    """A trained parameter of odd size, and the rest in every dtype."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.turn = nn.Parameter(torch.tensor([1 + 2j]))
        self.kept = nn.Parameter(torch.tensor([4.0]), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("wave", torch.tensor([3 + 4j, -0.0]))
        self.register_buffer("steps", torch.tensor([5, 6], dtype=torch.int32))
        self.register_buffer("halves", torch.tensor([0.5, torch.nan, -0.0]).half())
        self.register_buffer("pair", torch.tensor([1 + 2j], dtype=torch.complex128))
        self.register_buffer("doubles", torch.tensor([[0.1]], dtype=torch.float64))


def state_of(module):
    problem = Restless(lambda: module, clients=1)
    return FedAvg().start(problem)


def test_every_kind_of_tensor_has_its_place():
    """Complex numbers begin at even places; what follows a gap is found all the same."""
    layout = Layout.of(Kinds())
    assert [slot.name for slot in layout.trained] == ["weight", "turn"]
    assert [slot.name for slot in layout.rest] == ["kept", "mask", "wave"]
    assert [(slot.name, slot.start) for slot in layout.weights] == [
        ("weight", 0),
        ("turn", 4),
        ("kept", 6),
        ("mask", 7),
        ("wave", 10),
    ]
    assert (layout.parameters, layout.dim) == (6, 14)
    assert [(slot.name, slot.start, slot.size) for slot in layout.counters] == [
        ("steps", 0, 2),
        ("halves", 2, 1),
        ("pair", 4, 2),
        ("doubles", 6, 1),
    ]


def test_a_model_travels_and_returns_to_the_bit():
    state = state_of(Kinds())
    sent = state.layout.write(state.weights, state.counters)
    assert set(sent.weights) == {"weight", "turn"}
    assert sent.weights["turn"].tolist() == [[1.0, 2.0]]
    dtypes = {name: each.dtype for name, each in sent.exact.items()}
    assert dtypes == {
        "kept": torch.float32,
        "mask": torch.float32,
        "wave": torch.float32,
        "steps": torch.int64,
        "halves": torch.float16,
        "pair": torch.float64,
        "doubles": torch.float64,
    }
    weights, counters = state.layout.read(sent)
    assert weights.view(torch.int32).equal(state.weights.view(torch.int32))
    assert counters.equal(state.counters)
    found = state.layout.tensors(weights, counters)
    for name, each in Kinds().state_dict().items():
        kept = found[name].to(each.dtype)
        assert kept.numpy().tobytes() == each.numpy().tobytes(), name
    assert found["wave"].dtype == torch.complex64
    assert found["pair"].dtype == torch.complex128


def test_a_model_of_every_kind_has_a_digest():
    one, other = state_of(Kinds()), Kinds()
    other.wave.imag[0] = 5.0
    digests = [
        model_digest(FedAvg().tensors(each)) for each in (one, state_of(Kinds()), state_of(other))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_tensor_may_be_in_either_group_and_not_in_both():
    """In ledgers of 0.1.0 whatever float32 holds is in that of the codec."""
    state = FedAvg().start(Normed())
    old = payload(state, torch.arange(29.0), [7])
    new = state.layout.write(torch.arange(29.0), torch.tensor([7]))
    all_exact = Payload(exact={**new.weights, **new.exact})
    for each in (old, new, all_exact):
        weights, counters = state.layout.read(each)
        assert weights.tolist() == list(range(29))
        assert counters.tolist() == [7]
        assert FedAvg().load(Normed(), each).weights.tolist() == list(range(29))
    with pytest.raises(ResultError, match=r"'1.running_mean' in one group, got it in two"):
        state.layout.read(Payload(old.weights, new.exact))
    result = Result(0, 0, Payload(old.weights, new.exact), 1)
    with pytest.raises(ResultError, match="in one group, got it in two"):
        FedAvg().accumulate(FedAvg().new_accumulator(state), state, result, 1.0)


@pytest.mark.parametrize("missing", ["0.weight", "1.running_var", "1.num_batches_tracked"])
def test_a_task_brings_everything(missing):
    state = FedAvg().start(Normed())
    sent = state.layout.write(state.weights, state.counters)
    groups = [
        {name: each for name, each in group.items() if name != missing}
        for group in (sent.weights, sent.exact)
    ]
    with pytest.raises(ResultError, match=f"expected a tensor {missing!r}, it is missing"):
        state.layout.read(Payload(*groups))


@pytest.mark.parametrize("reply", ["update", "model"])
def test_what_a_result_does_not_bring_stayed_as_it_was(reply):
    """One client of two brings a mean of 3: half of it, and the variance that nobody brings."""
    state = FedAvg().start(Normed())
    state.weights[:23] = 1.0
    weights = {name: each + 1 for name, each in state.layout.trained_views(state.weights).items()}
    numbers = {"n": 1, "reply": reply}
    brought = {"1.running_mean": torch.full((3,), 3.0)}
    gathered = FedAvg().new_accumulator(state)
    for exact in (brought, {}):
        result = Result(0, 0, Payload(weights, exact, numbers), 1)
        gathered = FedAvg().accumulate(gathered, state, result, 1.0)
    new = FedAvg().tensors(FedAvg().commit(state, gathered, 2.0))
    assert new["1.running_mean"].tolist() == [1.5] * 3
    assert new["1.running_var"].tolist() == [1.0] * 3
    assert new["1.num_batches_tracked"].item() == 0
    assert new["0.bias"].tolist() == [2.0 if reply == "model" else 3.0] * 3


@pytest.mark.parametrize("reply", ["update", "model"])
def test_an_element_that_stays_infinite_changes_by_nothing(reply):
    state = state_of(Kinds())
    trained = state.layout.trained_views(torch.zeros(6))
    mask = [1.0, -torch.inf] if reply == "model" else [1.0, 0.0]
    sent = Payload(trained, {"mask": torch.tensor(mask)}, {"n": 1, "reply": reply})
    gathered = FedAvg().accumulate(
        FedAvg().new_accumulator(state), state, Result(0, 0, sent, 1), 2.0
    )
    new = FedAvg().commit(state, gathered, 2.0)
    assert FedAvg().tensors(new)["mask"].tolist() == [1.0, -torch.inf]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mask", [torch.inf, 0.0], "NaN or infinite"),
        ("kept", [torch.nan], "NaN or infinite"),
        ("kept", [1e35], "as large as"),
        ("kept", [1.0, 2.0], " as torch."),
        ("wave", [1.0, 2.0], " as torch."),
        ("more", [1.0], "expected no tensor 'more'"),
    ],
)
def test_what_a_result_brings_is_checked(name, value, message):
    state = state_of(Kinds())
    trained = state.layout.trained_views(torch.zeros(6))
    sent = Payload(trained, {name: torch.tensor(value)}, {"n": 1})
    with pytest.raises(ResultError, match=message):
        FedAvg().accumulate(FedAvg().new_accumulator(state), state, Result(0, 0, sent, 1), 1.0)


def test_a_constant_of_another_dtype_cannot_be_changed_by_a_result():
    state = state_of(Kinds())
    trained = state.layout.trained_views(torch.zeros(6))
    for value, wrong in ((0.1, False), (0.2, True)):
        exact = {"doubles": torch.tensor([[value]], dtype=torch.float64)}
        result = Result(0, 0, Payload(trained, exact, {"n": 1}), 1)
        if not wrong:
            FedAvg().accumulate(FedAvg().new_accumulator(state), state, result, 1.0)
            continue
        with pytest.raises(ResultError, match=r"'doubles', torch\.float64, unchanged"):
            FedAvg().accumulate(FedAvg().new_accumulator(state), state, result, 1.0)


# ---- what cannot be laid out


class Sharing(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("other", share(self.layer.weight))


@pytest.mark.parametrize(
    "share",
    [lambda w: w.detach(), lambda w: w.data[1:], lambda w: w, lambda w: w.detach().T],
    ids=["all", "a row", "itself", "transposed"],
)
def test_a_buffer_that_shares_a_parameters_memory_is_refused(share):
    with pytest.raises(ProblemError, match="other in memory of its own, it shares that of layer"):
        Layout.of(Sharing(share))


def test_parts_of_one_storage_that_do_not_overlap_are_fine():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            turn = torch.polar(torch.ones(3), torch.arange(3.0))
            self.register_buffer("cos", turn.real)
            self.register_buffer("sin", turn.imag)
            both = torch.arange(4.0)
            self.register_buffer("low", both[:2])
            self.register_buffer("high", both[2:])

    model = FlatModel(Halves())
    assert model.module.sin.tolist() == pytest.approx([0.0, math.sin(1), math.sin(2)])
    model.module.low += 7
    assert model.module.high.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sharing(lambda w: torch.eye(2).to_sparse()), "got torch.sparse_coo for other"),
        (lambda: nn.LazyLinear(2), "got none for weight before the first forward"),
        (lambda: nn.Linear(2, 2).half(), "expected float32 weights, got torch.float16 for weight"),
        (
            lambda: nn.Linear(2, 2, dtype=torch.complex128),
            "expected float32 weights, got torch.complex128 for weight",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(make, message):
    with pytest.raises(ProblemError, match=message):
        Layout.of(make())


# ---- algorithms that send a part


class Body(nn.Module):
    """A frozen scale, a mask of infinity, and a mean that is tracked."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.1, 0.7]), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("wave", torch.tensor([1j]))
        self.register_buffer("mean", torch.tensor([0.0, 1.0]))
        self.register_buffer("table", torch.tensor([0.1], dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.mean = torch.stack([0.5 * self.mean[0] + 1, self.mean[1]])
        return x * self.scale + self.mask.softmax(0) + self.wave.imag


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg(batch_size=3),
        FedSGD(),
        FedPer(batch_size=3),
        FedRep(batch_size=3, head_epochs=1),
        PersonalisedFedAvg(batch_size=3, epochs=1, switch=1, steps=2),
        PFedHN(hidden=4, layers=1, batches=2, batch_size=4),
        PFedHN(hidden=4, layers=1, batches=2, batch_size=4, personal_classifier=True),
    ],
    ids=["fedavg", "fedsgd", "fedper", "fedrep", "reptile", "pfedhn", "pfedhn-pc"],
)
def test_every_algorithm_keeps_constants_and_averages_what_is_tracked(algorithm):
    """A mean that each batch halves and raises by 1; a checkpoint after each version."""
    problem = Restless(lambda: nn.Sequential(nn.Linear(2, 2), Body(), nn.Linear(2, 2)))
    state, local = algorithm.start(problem), {}
    for version in range(3):
        gathered = algorithm.new_accumulator(state)
        before, after = algorithm.tensors(state)["1.mean"][0].item(), 0.0
        for index in range(3):
            at = client(problem, index, local=local.get(index))
            sent = Task(version, algorithm.task(state, index))
            trained = algorithm.train(sent, at)
            result, local[index] = trained.payload, trained.local_state
            assert set(result.exact) == {"1.mean"}
            came = before + result.exact["1.mean"][0].item()
            assert before < came <= 2
            after += came
            gathered = algorithm.accumulate(gathered, state, Result(index, 0, result, 1), 1.0)
        state = algorithm.commit(state, gathered, 3.0)
        state = algorithm.load(problem, algorithm.save(state))
        found = algorithm.tensors(state)
        assert found["1.mean"].tolist() == pytest.approx([after / 3, 1.0])
    constants = {"scale": [0.1, 0.7], "mask": [0.0, -torch.inf], "wave": [1j]}
    for name, value in constants.items():
        assert found[f"1.{name}"].equal(torch.tensor(value)), name
    assert found["1.table"].equal(torch.tensor([0.1], dtype=torch.float64))


@pytest.mark.parametrize("absent", ["zero", "holders"])
@pytest.mark.parametrize("reply", ["update", "model"])
def test_sub_models_bring_running_statistics_to_their_own_units(absent, reply):
    """A frozen layer stays to the bit; statistics of units that nobody holds stay too."""

    def make():
        module = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 2)
        )
        module[3].requires_grad_(requires_grad=False)
        return module

    problem = Restless(make, clients=3)
    algorithm = FedDropout(keep=0.5, absent=absent, batch_size=4, seed=3)
    state = algorithm.start(problem)
    sent = dataclasses.replace(task(state, reply=reply), payload=algorithm.task(state, 1))
    result = algorithm.train(sent, client(problem, 1)).payload
    tracked = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(result.exact) == tracked
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(1, 0, result, 1), 2.0
    )
    new = algorithm.tensors(algorithm.commit(state, gathered, 2.0))
    old = algorithm.tensors(state)
    for name in ("3.weight", "3.bias"):
        assert new[name].equal(old[name])
    for name in ("1.running_mean", "1.running_var"):
        moved = new[name] != old[name]
        assert moved.sum() == 4
        came = result.exact[name] + (old[name][moved] if reply == "update" else 0)
        torch.testing.assert_close(new[name][moved], came)


class Lowest(nn.Module):
    """Keeps the least value seen, from infinity on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("least", torch.tensor([torch.inf]))

    def forward(self, x):
        self.least = torch.minimum(self.least, x.detach().min())
        return self.layer(x)


def test_a_buffer_that_leaves_infinity_is_refused_by_name():
    """By how much has it changed? Before the first task, and at one that does it."""
    problem = Restless(Lowest)
    wanted = "least: expected a finite value at the start where training changes it"
    with pytest.raises(ProblemError, match=wanted):
        FedAvg().try_model(problem, problem.client(0), "cpu")
    with pytest.raises(ProblemError, match=wanted):
        FedAvg().train(task(FedAvg().start(problem)), client(problem))


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([(12, True)], 12),
        ([(8, True)], 8),
        ([(7, True), (8, True)], 8),
        ([(8, True), (10, True)], 8),  # who did not change it has no say
        ([(8, True), (12, True)], 12),
        ([(12, True), (8, True)], 12),
        ([(8, False)], 10),  # a count of an older version
        ([(8, False), (12, False)], 12),
        ([], 10),
    ],
)
def test_the_largest_integer_counts_unless_all_have_lowered_it(results, expected):
    now = torch.tensor([10])
    merged = now.clone()
    for found, fresh in results:
        merge_counters(merged, now, torch.tensor([found]), fresh=fresh)
    assert merged.tolist() == [expected]


def test_complex_numbers_of_a_part_that_begins_at_an_odd_place():
    """pFedHN keeps what is not trained in a vector of its own, behind an odd number of values."""
    slot = Slot("turn", (2, 2), 0, 4, torch.complex64)
    vector = torch.arange(5.0)
    assert slot.tensor(vector[1:]).tolist() == [1 + 2j, 3 + 4j]
    assert slot.tensor(vector).tolist() == [0 + 1j, 2 + 3j]
