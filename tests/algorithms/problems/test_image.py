import numpy as np
import pytest
import torch

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems import Examples, ImageClassification, Problem, datasets, image
from fedmq.algorithms.problems.data_files import data_root


def problem(**fields):
    """Return a problem on the embedded digits."""
    defaults = {"name": "mnist-mini", "model_name": "mlp", "clients": 40, "partition": "iid"}
    return ImageClassification(**{**defaults, "seed": 0, **fields})


def parameters(model):
    """Return all parameters of a model as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_clients_hold_all_the_training_examples():
    """Nothing is lost between the data set and the clients."""
    p = problem(partition="dirichlet(0.3)")
    clients = [p.client(index) for index in range(40)]
    assert sum(map(len, clients)) == 5000
    assert all(len(client) for client in clients)
    x, y = clients[7].x, clients[7].y
    assert x.shape == (len(clients[7]), 1, 28, 28)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_a_client_has_at_most_all_the_training_examples():
    assert problem().most_examples == len(problem()._data.y_train)
    assert problem(examples=400).most_examples == 400


def test_the_images_of_a_client_go_with_their_labels():
    """One shard a client: each holds all images of one digit."""
    p = problem(partition="shards(1)", clients=10)
    data = p._data
    for index in range(10):
        client = p.client(index)
        (label,) = client.y.unique().tolist()
        expected = data.normalise(data.x_train[data.y_train == label])
        assert torch.equal(client.x, expected)


def test_the_test_examples_are_all_there():
    """Every evaluator sees the same test set."""
    examples = problem().test()
    assert examples.x.shape == (1000, 1, 28, 28)
    assert examples.y.bincount().tolist() == [100] * 10


def test_everything_is_a_function_of_the_seed():
    """Two hosts with equal configurations hold equal problems."""
    one, same, other = problem(), problem(), problem(seed=1)
    assert one == same
    assert torch.equal(one.client(3).x, same.client(3).x)
    assert not torch.equal(one.client(3).x, other.client(3).x)
    assert torch.equal(parameters(one.model()), parameters(same.model()))
    assert torch.equal(parameters(one.model()), parameters(one.model()))
    assert not torch.equal(parameters(one.model()), parameters(other.model()))
    assert one.model() is not one.model()


def test_nobody_elses_random_numbers_change():
    """A worker's own generator goes on as if nothing had happened."""
    p = problem()
    before, before_numpy = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    p.model()
    p.client(0)
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], before_numpy)  # noqa: NPY002


def test_making_a_problem_and_its_model_reads_no_data(monkeypatch):
    """The aggregator has the model alone, on a host that may not have the data."""

    def refuse(name):
        raise AssertionError(name)

    monkeypatch.setattr(image, "load_dataset", refuse)
    problem(name="cifar100", model_name="cnn-cifar").model()


def test_a_client_is_converted_once():
    """A worker asks for the same client at every task."""
    p = problem()
    assert p.client(0) is p.client(0)
    assert p.test() is p.test()


def test_past_the_limit_clients_are_converted_anew(monkeypatch):
    """A simulation of many clients does not hold all in float32."""
    monkeypatch.setattr(image, "CACHE_BYTES", 2 * problem().client(0).x.nbytes)
    p = problem()
    kept = [p.client(index) is p.client(index) for index in range(4)]
    assert kept == [True, True, False, False]
    assert torch.equal(p.client(3).x, p.client(3).x)


class Sized:
    """Examples of which it is counted how often somebody asks for their size."""

    def __init__(self):
        self.asked = 0

    @property
    def x(self):
        return self

    @property
    def nbytes(self):
        self.asked += 1
        return 1


def test_the_work_for_a_client_does_not_grow_with_those_before_it():
    kept, clients = image._ExampleCache(), [Sized() for _ in range(2000)]
    for index, each in enumerate(clients):
        kept.keep(index, each)
    assert [kept.get(index) for index in range(2000)] == clients
    assert max(each.asked for each in clients) <= 2


def test_only_some_examples_can_be_dealt():
    """Quick experiments use few examples but the whole test set."""
    p = problem(examples=300, clients=10)
    assert sum(len(p.client(index)) for index in range(10)) == 300
    assert len(torch.cat([p.client(index).y for index in range(10)]).unique()) == 10
    assert len(p.test()) == 1000
    with pytest.raises(ProblemError, match=r"examples: expected at most 5000 .*, got 5001"):
        problem(examples=5001).client(0)


def test_loss_and_metrics_by_hand():
    """Two classes, logits 2 apart: the loss is log(1 + exp(-+2))."""
    p = problem()
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    y = torch.tensor([0, 0, 1, 0])
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    assert p.loss(logits, y).item() == pytest.approx((3 * right + wrong) / 4)
    assert p.metrics(logits, y) == pytest.approx(
        {"loss": (3 * right + wrong) / 4, "accuracy": 0.75}
    )


@pytest.mark.parametrize("index", [-1, 40, 57])
def test_a_client_that_does_not_exist(index):
    """The message says which clients there are."""
    message = rf"expected a client from 0 to 39, got {index}"
    with pytest.raises(ProblemError, match=message):
        problem().client(index)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "minst"}, r"name: unknown data set 'minst' \(did you mean 'mnist'\?\)"),
        ({"model_name": "cnm"}, r"model: unknown model 'cnm' \(did you mean 'cnn'\?\)"),
        ({"model_name": "cnn-cifar"}, "model: .*expected images of 3x32x32 .* got 1x28x28"),
        ({"clients": 0}, "clients: expected at least 1, got 0"),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*63 - 1, got -1"),
        ({"examples": 39}, "examples: expected at least one for each of 40 clients, got 39"),
        ({"partition": "shard"}, "partition: unknown partition 'shard'"),
        ({"partition": "shards(0)"}, "partition: .*per_client: expected a number greater"),
        ({"partition": "iid | shards"}, "partition: expected one name"),
        ({"partition": "by_writer"}, "partition: .*got 'mnist-mini'; choose from mnist"),
    ],
)
def test_a_bad_field_is_refused_at_construction(fields, message):
    """The message begins with the field."""
    with pytest.raises(ProblemError, match=message):
        problem(**fields)


def test_too_many_clients_are_refused_when_the_data_are_there():
    """How many examples there are is known only then."""
    with pytest.raises(ProblemError, match="at most 5000 clients, one for each example, got 5001"):
        problem(clients=5001).client(0)


def test_writers_that_nobody_knows_are_asked_for(monkeypatch):
    """MNIST is there, but neither file that says who wrote it."""
    monkeypatch.setattr(image, "load_dataset", lambda _: datasets.load_dataset("mnist-mini"))
    with pytest.raises(ProblemError, match=r"mnist-writers\.npz"):
        problem(name="mnist", partition="by_writer").client(0)


def test_real_writers_if_they_are_there():
    """MNIST by writer gives clients of similar size."""
    for name in ("mnist-writers.npz", "MNIST/raw/train-images-idx3-ubyte.gz"):
        if not (data_root() / name).is_file():
            pytest.skip(f"no {data_root() / name}")
    p = problem(name="mnist", clients=100, partition="by_writer")
    sizes = [len(p.client(index)) for index in range(100)]
    assert sum(sizes) == 60_000
    assert max(sizes) < 1.2 * min(sizes)


def test_a_client_has_test_examples_of_its_own_mix():
    p = problem(partition="classes(3, 60, 90)", clients=12)
    for index in range(12):
        train, test = p.client(index), p.client_test(index)
        assert set(test.y.tolist()) == set(train.y.tolist())
        assert len(test) <= len(train)
        mine, its = (torch.bincount(each.y, minlength=10).float() for each in (train, test))
        assert (mine / mine.sum() - its / its.sum()).abs().max() < 0.05
        assert torch.equal(p.client_test(index).x, test.x)
    assert test.x.shape[1:] == (1, 28, 28)


def test_held_out_clients_have_data_and_are_not_counted():
    p = problem(partition="shards(2)", clients=8, held_out=2)
    assert p.clients == 8
    assert sum(len(p.client(index)) for index in range(10)) == 5000
    assert len(p.client_test(9))
    with pytest.raises(ProblemError, match="expected a client from 0 to 9, got 10"):
        p.client(10)


def test_public_examples_are_in_no_clients_own():
    p = problem(partition="iid", clients=4, public_examples=500)
    images = torch.cat([p.client(index).x for index in range(4)] + [p.public().x])
    assert len(images) == 5000
    assert len(torch.unique(images.flatten(1), dim=0)) == len(
        torch.unique(problem(clients=1).client(0).x.flatten(1), dim=0)
    )
    with pytest.raises(ProblemError, match=r"set problem\.public"):
        problem().public()
    with pytest.raises(ProblemError, match="with 500 public ones"):
        problem(public_examples=500, examples=4600).client(0)


def test_a_problem_says_what_its_examples_are():
    assert (problem().shape, problem().classes) == ((1, 28, 28), 10)


def test_a_bootstrap_has_more_clients_than_examples_and_reads_none_ahead(monkeypatch):
    p = problem(partition="bootstrap(30)", clients=1_000_000, examples=200)
    assert (p.most_examples, len(p.client(999_999))) == (30, 30)
    assert torch.equal(p.client(7).x, p.client(7).x)
    assert p.client(7).x.data_ptr() != p.client(7).x.data_ptr()  # not kept
    monkeypatch.setattr(image, "load_dataset", None)
    assert problem(partition="bootstrap(30)", clients=10**6).client_size(5) == 30


@pytest.mark.parametrize("partition", ["dirichlet(0.3)", "bootstrap(40, 0.3)"])
def test_the_size_and_the_labels_of_a_client_are_those_of_its_examples(partition):
    p = problem(partition=partition, clients=20)
    for index in (0, 19):
        y = p.client(index).y
        assert p.client_size(index) == len(y)
        assert p.label_position(index) == pytest.approx(y.double().mean().item() / 9)
        assert Problem.label_position(p, index) == pytest.approx(p.label_position(index))
    with pytest.raises(ProblemError, match="expected a client from 0 to 19, got 20"):
        p.client_size(20)


def test_a_class_with_data_of_its_own_does_not_inherit_their_sizes():
    class Halved(ImageClassification):
        def client(self, index):
            whole = super().client(index)
            return Examples(whole.x[::2], whole.y[::2])

    p = Halved("mnist-mini", "cnn-mnist", 10, "iid", 0)
    assert p.client_size(0) == len(p.client(0)) == 250
    assert p.most_examples == Problem.most_examples.fget(p)
