import subprocess
import sys

import pytest

from fedmq.algorithms.allowed import Allowed
from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems import (
    DATASETS,
    DEFAULT_MODEL,
    MODELS,
    PROBLEMS,
    ImageClassification,
    load_problem,
)
from fedmq.algorithms.problems.registry import _EXPECTED


def test_a_table_becomes_a_problem():
    """All keys that a table may hold."""
    options = {
        "name": "mnist-mini",
        "model": "2nn",
        "clients": 8,
        "partition": "shards(2)",
        "examples": 800,
        "held_out": 2,
        "public": 100,
    }
    assert set(options) == set(_EXPECTED)
    assert load_problem(options, seed=5) == ImageClassification(
        name="mnist-mini",
        model_name="2nn",
        clients=8,
        partition="shards(2)",
        seed=5,
        examples=800,
        held_out=2,
        public_examples=100,
    )


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_a_name_and_clients_are_enough(name):
    """Every built-in problem has a model that fits it, and needs no data to be named."""
    problem = load_problem({"name": name, "clients": 8, "examples": None}, seed=0)
    assert isinstance(problem, ImageClassification)
    assert (problem.model_name, problem.partition) == (DEFAULT_MODEL[name], "iid")


def test_the_lists_belong_together():
    """What is listed can be loaded."""
    assert set(PROBLEMS) == set(DATASETS) == set(DEFAULT_MODEL)
    assert set(DEFAULT_MODEL.values()) <= set(MODELS)
    assert all(len(line) < 100 and "\n" not in line for line in PROBLEMS.values())
    assert not any(":" in name for name in PROBLEMS), "a colon means module:attribute"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "problem.name: expected the name of a data set or module:attribute"),
        ({"name": 7}, "problem.name: expected .*, got 7"),
        ({"name": "minst"}, r"problem.name: unknown problem 'minst' \(did you mean 'mnist'\?\)"),
        ({"clients": None}, "problem.clients: expected a whole number, it is missing"),
        ({"clients": 4.0}, r"problem.clients: expected a whole number, got 4\.0"),
        ({"clients": True}, "problem.clients: expected a whole number, got True"),
        ({"clients": 0}, "problem.clients: expected at least 1, got 0"),
        ({"model": 3}, "problem.model: expected the name of a model, in quotes, got 3"),
        ({"model": "cn"}, "problem.model: unknown model 'cn'"),
        ({"model": "cnn-cifar"}, "problem.model: .*expected images of 3x32x32"),
        ({"partition": 0.5}, r"problem.partition: expected a partition such as .*, got 0\.5"),
        ({"partition": "dirichlet"}, "problem.partition: .*missing a required argument: 'alpha'"),
        ({"examples": "all"}, "problem.examples: expected a whole number, got 'all'"),
        ({"client": 4}, r"problem.client: unknown key 'client' \(did you mean 'clients'\?\)"),
        ({"seed": 4}, "problem.seed: unknown key 'seed'"),
    ],
)
def test_a_bad_table_is_refused_with_its_key(changes, message):
    """The message begins with the place in the configuration."""
    options = {"name": "mnist-mini", "clients": 4, **changes}
    with pytest.raises(ProblemError, match=f"^{message}"):
        load_problem(options, seed=0)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own on the path; returns its name."""
    (tmp_path / "my_problem.py").write_text(
        "from fedmq.algorithms.problems import ImageClassification\n"
        "def make(*, seed, clients=3):\n"
        "    return ImageClassification('mnist-mini', 'mlp', clients, 'iid', seed)\n"
        "class Inside:\n"
        "    make = staticmethod(make)\n"
        "def nothing(seed):\n"
        "    return None\n"
        "number = 4\n"
        "import numpy\n"
        "class Counted(ImageClassification):\n"
        "    def __init__(self, *, seed, clients=3):\n"
        "        super().__init__('mnist-mini', 'mlp', 3, 'iid', seed)\n"
        "        kinds = {'none': 0, 'text': '3', 'ids': numpy.arange(3)}\n"
        "        found = kinds.get(clients, numpy.int64(3))\n"
        "        object.__setattr__(self, 'clients', found)\n"
    )
    (tmp_path / "my_broken.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_problem", "my_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["my_problem:make", "my_problem:Inside.make"])
def test_a_problem_of_ones_own(mine, name):
    """It gets the other options and the seed."""
    own = Allowed(names=frozenset({name}))
    problem = load_problem({"name": name, "clients": 6}, 9, own)
    assert (problem.clients, problem.seed) == (6, 9)


def test_a_number_of_clients_of_numpys_is_pythons(mine):
    """`ids.max() + 1` is a number; msgpack does not know it."""
    problem = load_problem(
        {"name": "my_problem:Counted"}, 0, Allowed(names=frozenset({"my_problem:Counted"}))
    )
    assert (type(problem.clients), problem.clients) == (int, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ":make"}, "problem.name: expected module:attribute, got ':make'"),
        ({"name": "my_problem:"}, "problem.name: expected module:attribute, got 'my_problem:'"),
        ({"name": "my_prblem:make"}, "problem.name: cannot import .* on PYTHONPATH"),
        ({"name": "my_broken:make"}, "problem.name: cannot import .*there_is_no_such_module"),
        ({"name": "my_problem:mk"}, "problem.name: my_problem:mk does not exist"),
        ({"name": "my_problem:number"}, "problem.name: expected .*, got one of type 'int'"),
        ({"name": "my_problem:nothing"}, "problem.name: .*to return a Problem, got .*'NoneType'"),
        ({"name": "my_problem:make", "k": 1}, "problem: .*got an unexpected keyword argument 'k'"),
        (
            {"name": "my_problem:Counted", "clients": "none"},
            "my_problem:Counted: expected clients, a whole number from 1, got 0",
        ),
        (
            {"name": "my_problem:Counted", "clients": "text"},
            "my_problem:Counted: expected clients, a whole number from 1, got '3'",
        ),
        (
            {"name": "my_problem:Counted", "clients": "ids"},
            r"my_problem:Counted: expected clients, .*, got a ndarray of int64 \[3\]$",
        ),
        ({"name": "my_problem:make", "seed": 1}, "problem.seed: expected no such key"),
    ],
)
def test_a_problem_of_ones_own_that_cannot_be_had(mine, options, message):
    """Each way to fail has its own sentence."""
    own = Allowed(names=frozenset({options["name"]}))
    with pytest.raises(ProblemError, match=f"^{message}"):
        load_problem(options, 0, own)


@pytest.mark.end_to_end
def test_importing_problems_does_not_import_torchvision():
    """It takes seconds, and the aggregator and `fedmq list` never need it."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from fedmq.algorithms.problems import load_problem\n"
        "load_problem({'name': 'mnist-mini', 'clients': 2}, 0).client(0)\n"
        "sys.exit('torchvision' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
