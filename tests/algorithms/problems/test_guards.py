"""What a problem's own methods may return, wherever they are called."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedmq.algorithms.problems import Examples, Problem
from fedmq.algorithms.problems.registry import load_problem
from fedmq.algorithms.values import ReturnedError
from tests.own_code import OWN_CODE


class Regression(Problem):
    """A problem with one method that returns a given value."""

    clients = 2

    def __init__(self, **values):
        self.values = values

    def model(self):
        return self.values.get("model", nn.Linear(2, 2))

    def _examples(self, name):
        return self.values.get(name, Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)))

    def client(self, index):
        return self._examples("client")

    def client_test(self, index):
        return self._examples("client_test")

    def test(self):
        return self._examples("test")

    def public(self):
        return self._examples("public")

    def loss(self, outputs, y):
        return self.values.get("loss", outputs.mean())

    def metrics(self, outputs, y):
        return self.values.get("metrics", {"loss": outputs.mean(), "mae": np.float32(0.5)})

    @property
    def classes(self):
        return self.values.get("classes", np.int64(2))

    @functools.cached_property
    def shape(self):
        return self.values.get("shape", torch.zeros(3, 2).shape[1:])


ASKED = {
    "client": lambda problem: problem.client(0),
    "client_test": lambda problem: problem.client_test(0),
    "test": lambda problem: problem.test(),
    "public": lambda problem: problem.public(),
    "model": lambda problem: problem.model(),
    "loss": lambda problem: problem.loss(torch.ones(3), torch.zeros(3)),
    "metrics": lambda problem: problem.metrics(torch.ones(3), torch.zeros(3)),
    "classes": lambda problem: problem.classes,
    "shape": lambda problem: problem.shape,
}
DATA = ("client", "client_test", "test", "public")


@pytest.mark.parametrize("method", DATA)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_whole_number_labels_are_int64(method, dtype):
    y = torch.tensor([0, 1, 100]).to(dtype)
    found = ASKED[method](Regression(**{method: Examples(torch.zeros(3, 2), y)}))
    assert found.y.dtype == torch.int64
    assert found.y.tolist() == [0, 1, 100]


@pytest.mark.parametrize("method", DATA)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.bool])
def test_other_labels_stay_as_they_are(method, dtype):
    given = Examples(torch.zeros(3, 2), torch.ones(3, dtype=dtype))
    assert ASKED[method](Regression(**{method: given})) is given


@pytest.mark.parametrize("method", DATA)
@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "expected Examples, got None"),
        ((torch.zeros(3, 2), torch.zeros(3)), "expected Examples, got a value of type 'tuple'"),
        (
            Examples({"x": torch.zeros(3, 2)}, torch.zeros(3)),
            "expected x as a tensor with a row for each example, got a value of type 'dict'",
        ),
        (Examples(np.zeros((3, 2)), torch.zeros(3)), "expected x as a tensor"),
        (Examples(torch.zeros(3, 2), [0, 1, 2]), "expected y as a tensor"),
        (Examples(torch.zeros(3, 2), torch.tensor(1)), "expected y as a tensor with a row"),
        (
            Examples(torch.zeros(3, 2), torch.zeros(4)),
            "expected as many rows in x as in y, got 3 and 4",
        ),
    ],
    ids=range(7),
)
def test_data_of_another_kind_are_named_with_the_method(method, found, said):
    with pytest.raises(ReturnedError) as caught:
        ASKED[method](Regression(**{method: found}))
    assert str(caught.value).startswith(f"Regression.{method}: {said}")


@pytest.mark.parametrize(
    ("method", "found", "said"),
    [
        ("model", None, "Regression.model: expected a torch module, got None"),
        ("model", nn.Linear, "Regression.model: expected a torch module, got a value of type"),
        ("loss", 0.5, "Regression.loss: expected the mean loss as a tensor of one value, got 0.5"),
        ("loss", torch.zeros(3), "Regression.loss: expected the mean loss as a tensor of one"),
        ("metrics", {"mae": None}, "Regression.metrics: expected a number for 'mae', got None"),
        ("metrics", 0.5, "Regression.metrics: expected a map from names to numbers, got 0.5"),
        ("classes", 2.5, "Regression.classes: expected a whole number, got 2.5"),
        ("shape", 3, "Regression.shape: expected a shape, got 3"),
        ("shape", (1, None), "Regression.shape: expected a whole number, got None"),
    ],
)
def test_a_value_of_another_kind_is_named_with_the_method(method, found, said):
    with pytest.raises(ReturnedError) as caught:
        ASKED[method](Regression(**{method: found}))
    assert str(caught.value).startswith(said)


def test_numbers_are_pythons_own():
    problem = Regression()
    assert problem.metrics(torch.ones(3), None) == {"loss": 1.0, "mae": 0.5}
    assert [type(each) for each in problem.metrics(torch.ones(3), None).values()] == [float] * 2
    assert (problem.classes, type(problem.classes)) == (2, int)
    assert (problem.shape, type(problem.shape), type(problem.shape[0])) == ((2,), tuple, int)


class Deeper(Regression):
    """It calls what it overrides, in the ways in which Python lets it."""

    @staticmethod
    def loss(outputs, y):
        return outputs.mean() if y is not None else None

    @functools.cache  # noqa: B019 - as a user writes it
    def test(self):
        return Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32))

    def client(self, index):
        return super().client(index)


def test_static_cached_and_inherited_methods_are_checked_too():
    problem = Deeper(client=3)
    with pytest.raises(ReturnedError, match=r"^Deeper\.loss: expected the mean loss"):
        problem.loss(torch.ones(3), None)
    with pytest.raises(ReturnedError, match=r"^Deeper\.client: expected Examples, got 3"):
        problem.client(0)
    assert problem.test().y.dtype == torch.int64
    assert problem.test.cache_info().currsize == 1


@dataclass(frozen=True)
class Counted(Regression):
    """Its number of clients is worked out."""

    seed: int = 0
    kind: str = "text"
    maybe: "str | None" = "text"
    number: int = 3

    def __post_init__(self):
        object.__setattr__(self, "values", {})

    @property
    def clients(self):
        return np.arange(5).max() + 1


def test_a_number_of_clients_that_is_worked_out_is_pythons_own():
    name, allowed = f"{__name__}:Counted", OWN_CODE
    problem = load_problem({"name": name}, 0, allowed)
    assert (problem.clients, type(problem.clients)) == (5, int)


def test_none_is_a_text_where_an_option_has_a_text_as_its_default():
    """TOML has no null, so `none` stands for it; but a text may be that word, too."""
    name, allowed = f"{__name__}:Counted", OWN_CODE
    options = {"kind": None, "maybe": None, "number": None}
    problem = load_problem({"name": name, **options}, 0, allowed)
    assert (problem.kind, problem.maybe, problem.number) == ("none", None, None)


class Mixed:
    """Methods from a class that is no problem."""

    def metrics(self, outputs, y):
        return {"mae": None}

    @property
    def classes(self):
        return np.int64(3)


class Inheriting(Mixed, Regression):
    pass


class Assigned(Counted):
    """Its methods and sizes are attributes of its own."""

    def __post_init__(self):
        super().__post_init__()
        for name, value in {
            "metrics": lambda outputs, y: {"mae": None},
            "test": lambda: Examples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.uint8)),
            "shape": torch.zeros(1, 5).shape[1:],
        }.items():
            object.__setattr__(self, name, value)


def test_methods_of_other_classes_are_checked_too():
    problem = Inheriting()
    with pytest.raises(ReturnedError, match=r"^Inheriting\.metrics: expected a number for 'mae'"):
        problem.metrics(torch.ones(3), None)
    assert type(problem.classes) is int
    assert problem.client(0).y.dtype == torch.int64


def test_attributes_in_the_place_of_methods_are_checked_too():
    problem = load_problem({"name": f"{__name__}:Assigned"}, 0, OWN_CODE)
    with pytest.raises(ReturnedError, match=r"^Assigned\.metrics: expected a number for 'mae'"):
        problem.metrics(torch.ones(3), None)
    assert problem.test().y.dtype == torch.int64
    assert problem.shape == (5,)


class Weighted(Examples):
    """Examples as a user makes them, from other arguments."""

    def __init__(self, n):
        super().__init__(torch.zeros(n, 2), torch.zeros(n, dtype=torch.int32))
        object.__setattr__(self, "weights", torch.ones(n))


def test_examples_of_a_users_own_class_stay_so():
    found = Regression(client=Weighted(3)).client(0)
    assert type(found) is Weighted
    assert (found.y.dtype, len(found.weights)) == (torch.int64, 3)
