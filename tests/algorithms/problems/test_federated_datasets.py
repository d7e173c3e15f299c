"""Multi-task problems: what each client has, and that a data set is there or is asked for."""

import numpy as np
import pytest
import torch

from fedmq.algorithms.errors import DataError, ProblemError
from fedmq.algorithms.problems import load_dataset, load_problem
from fedmq.algorithms.problems.data_files import data_root
from fedmq.algorithms.problems.federated_datasets import DigitTasks, LandMine, School

WHERE = {LandMine: "landmine-29fields.npz", School: "school-139.npz"}


def natural(kind, **options):
    if not (data_root() / "natural" / WHERE[kind]).is_file():
        pytest.skip(f"natural/{WHERE[kind]} is not in {data_root()}: set FEDMQ_DATA")
    return kind(**{"seed": 0, **options})


def write(folder, name, fields, features, *, constant=True):
    """Write a made-up file of the same form; return x, y, task."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(fields), 8)
    x = rng.normal(5, 3, (len(task), features))
    if constant:
        x = np.hstack([x, np.ones((len(x), 1))])
    y = rng.integers(1, 70, len(task)) if "school" in name else rng.choice([-1, 1], len(task))
    (folder / "natural").mkdir()
    np.savez(folder / "natural" / name, x=x, y=y, task=task.astype(np.uint16))
    return x, y, task


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMQ_DATA", str(tmp_path))
    return tmp_path


# ---- natural data sets


@pytest.mark.parametrize("kind", WHERE)
def test_a_data_set_that_is_not_there_is_asked_for_in_one_sentence(kind, folder):
    problem = kind(clients=3, seed=0)
    assert problem.model().weight.shape == (1, problem.dim)
    with pytest.raises(DataError, match=rf"put {WHERE[kind]} into .*natural, or set FEDMQ_DATA"):
        problem.client(0)


def test_a_damaged_file_is_refused(folder):
    write(folder, "landmine-29fields.npz", 29, 8, constant=False)
    with pytest.raises(DataError, match="replace it"):
        LandMine(clients=29, seed=0).client(0)
    write_to = folder / "natural" / "school-139.npz"
    write_to.write_bytes(b"nothing")
    with pytest.raises(DataError, match="replace it with a good copy"):
        School(clients=139, seed=0).client(0)


def test_features_are_scaled_over_the_training_examples_and_end_in_a_constant(folder):
    write(folder, "school-139.npz", 139, 27)
    problem = School(clients=100, held_out=2, seed=0)
    data = [problem.client(k) for k in range(100)]
    together = torch.cat([each.x for each in data])
    assert together.shape == (600, 28)
    torch.testing.assert_close(together[:, :-1].mean(0), torch.zeros(27), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[:, :-1].std(0, correction=0), torch.ones(27))
    assert together[:, -1].unique().tolist() == [1.0]
    scores = torch.cat([each.y for each in data])
    assert scores.mean().abs() < 1e-5
    torch.testing.assert_close(scores.std(correction=0), torch.tensor(1.0))
    assert len(problem.client(101)) == 6
    with pytest.raises(ProblemError, match="expected a client from 0 to 101, got 102"):
        problem.client(102)


def test_no_row_is_in_both_parts_and_none_is_lost(folder):
    _, y, task = write(folder, "landmine-29fields.npz", 29, 9)
    problem = LandMine(clients=29, seed=3)
    for k in range(29):
        train, test = problem.client(k), problem.client_test(k)
        rows = torch.cat([train.x, test.x])
        assert len(rows.unique(dim=0)) == len(rows) == 8
        assert (len(train), len(test)) in {(6, 2), (5, 3), (7, 1)}
        assert int(train.y.sum() + test.y.sum()) == (y[task == k] > 0).sum()
        assert abs(int(test.y.sum()) - (y[task == k] > 0).sum() / 4) <= 0.5
    assert len(problem.test()) == sum(len(problem.client_test(k)) for k in range(29))


def test_the_parts_follow_from_the_seed(folder):
    write(folder, "landmine-29fields.npz", 29, 9)
    one, same, other = (LandMine(clients=29, seed=seed) for seed in (1, 1, 2))
    assert one.client(4).x.equal(same.client(4).x)
    assert not one.client(4).x.equal(other.client(4).x)


def test_29_fields():
    problem = natural(LandMine, clients=29)
    parts = [(problem.client(k), problem.client_test(k)) for k in range(29)]
    assert sum(len(a) + len(b) for a, b in parts) == 1464
    assert sum(int(a.y.sum() + b.y.sum()) for a, b in parts) == 89
    assert parts[0][0].x.shape[1] == 10
    assert 0.24 < sum(len(b) for _, b in parts) / 1464 < 0.26


def test_139_schools():
    problem = natural(School, clients=139)
    parts = [(problem.client(k), problem.client_test(k)) for k in range(139)]
    assert sum(len(a) + len(b) for a, b in parts) == 15362
    assert parts[0][0].x.shape == (150, 28)
    assert parts[0][0].y.dtype == torch.float32


def test_explained_variance_is_of_all_scores():
    problem = School(clients=3, seed=0)
    found = problem.metrics(torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 1.0]))
    assert found == {"loss": 0.25, "accuracy": 0.5}
    with pytest.raises(ProblemError, match="exam scores are numbers"):
        problem.classes  # noqa: B018 - it raises


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 30}, "expected at most 29 fields, got 30 clients and 0 held out"),
        ({"clients": 28, "held_out": 2}, "got 28 clients and 2 held out"),
        ({"clients": 0}, "expected at least 1"),
    ],
)
def test_more_fields_than_there_are_are_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        LandMine(seed=0, **options)


# ---- digits


def test_one_vs_rest_is_half_the_clients_digit_and_no_image_is_used_twice():
    problem = DigitTasks(clients=20, held_out=10, examples=40, seed=0)
    digits = load_dataset("mnist-mini").y_train
    assert len(set(np.concatenate(problem._assigned).tolist())) == 30 * 40
    for k in (0, 13, 29):
        assert (digits[problem._assigned[k]] == k % 10).sum() == 20
        train, test = problem.client(k), problem.client_test(k)
        assert (len(train), len(test)) == (30, 10)
        assert (int(train.y.sum()), int(test.y.sum())) == (15, 5)
        assert train.x.shape == (30, 785)
        assert 0 <= train.x.min() < train.x.max() <= 1
        assert train.x[:, -1].unique().tolist() == [1.0]


def test_odd_even_deals_shards_of_digits():
    problem = DigitTasks(clients=20, digits="odd-even", examples=100, seed=0)
    digits = load_dataset("mnist-mini").y_train
    for k in range(20):
        held = digits[problem._assigned[k]]
        assert len(np.unique(held)) <= 4
        parts = problem.client(k), problem.client_test(k)
        assert sum(int(each.y.sum()) for each in parts) == (held % 2 == 1).sum()


def test_images_go_with_their_labels():
    problem = DigitTasks(clients=10, examples=40, seed=0)
    data = load_dataset("mnist-mini")
    known = {x.tobytes(): y for x, y in zip(data.x_train, data.y_train, strict=True)}
    for part in (problem.client(7), problem.client_test(7)):
        images = (part.x[:, :-1] * 255).round().byte().reshape(-1, 1, 28, 28).numpy()
        assert [int(known[x.tobytes()] == 7) for x in images] == part.y.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": "odd"}, "problem.digits: "),
        ({"data": "cifar10"}, "problem.data: "),
        ({"clients": 0}, "problem.clients: expected at least 1"),
        ({"examples": 7}, "problem.examples: expected at least 8, got 7"),
        ({"partition": "shard"}, "problem.partition: "),
        ({"partition": "bootstrap(9)"}, "problem.partition: expected a partition without repl"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(options, message):
    with pytest.raises(ProblemError, match=message):
        DigitTasks(**{"clients": 10, "seed": 0, **options})


def test_too_many_examples_are_refused():
    with pytest.raises(ProblemError, match="images of 'mnist-mini', got 10 clients with 501 each"):
        DigitTasks(clients=10, examples=501, seed=0).client(0)
    with pytest.raises(ProblemError, match="images of digit 0 for client"):
        DigitTasks(clients=1, examples=2000, seed=0).client(0)


def test_the_hinge_loss_and_the_accuracy_of_an_output():
    problem = DigitTasks(clients=10, seed=0)
    outputs, y = torch.tensor([[2.0], [0.5], [0.5], [-1.0]]), torch.tensor([1, 1, 0, 0])
    assert problem.metrics(outputs, y) == {"loss": (0 + 0.5 + 1.5 + 0) / 4, "accuracy": 0.75}
    assert problem.loss(outputs, y).item() == 0.5
    assert (problem.shape, problem.classes) == ((785,), 2)
    assert not problem.model().weight.any()


def test_a_configuration_names_a_problem_by_module_and_class():
    table = {
        "name": "fedmq.algorithms.problems.federated_datasets:DigitTasks",
        "clients": 10,
        "examples": 40,
    }
    assert load_problem(table, 5) == DigitTasks(clients=10, examples=40, seed=5)
    with pytest.raises(ProblemError, match="problem"):
        load_problem({**table, "fields": 3}, 5)
