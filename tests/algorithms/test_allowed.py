"""What a configuration may name to import, and that nothing else is imported."""

import importlib
import sys

import pytest
import torch
import torchvision

from fedmq.algorithms.allowed import MOVED, NOTHING, Allowed, resolve
from fedmq.algorithms.base import Algorithm
from fedmq.algorithms.errors import AlgorithmError, DataError, NotAllowed, ProblemError
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems import load_problem
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.problems.federated_datasets import DigitTasks
from fedmq.algorithms.registry import find_algorithm
from fedmq.codecs.extensions import entry_points
from fedmq.nodes.cli.catalogue import catalogue

PROBLEMS, ALGORITHMS = "fedmq.problems", "fedmq.algorithms"


def find(name, allowed=NOTHING, **arguments):
    return resolve(name, allowed, PROBLEMS, Problem, arguments)


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Modules that leave a file when they are imported; return the folder and what is there."""
    for package in ("", "evil_pkg/", "evil_pkg/sub/"):
        (tmp_path / package).mkdir(exist_ok=True)
        name = f"{package}__init__.py" if package else "evil_mod.py"
        (tmp_path / name).write_text(
            "import os, pathlib, posixpath\n"
            "from os import system\n"
            "from functools import partial\n"
            f"pathlib.Path({str(tmp_path)!r}, 'imported-' + __name__).touch()\n"
            "class Mine: pass\n"
            "def mine(seed): pass\n"
            "bound = partial(mine)\n"
            "secret = 'a password'\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [each for each in sys.modules if each.startswith("evil_")]:
        del sys.modules[name]


def imported(folder):
    return sorted(path.name.removeprefix("imported-") for path in folder.glob("imported-*"))


# ---- always


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torch.optim:SGD", torch.optim.SGD),
        ("torch.optim.adam:Adam", torch.optim.Adam),
        ("torch.optim.lr_scheduler:StepLR", torch.optim.lr_scheduler.StepLR),
        ("torchvision.models:ResNet", torchvision.models.ResNet),
        ("torchvision.models.detection:FasterRCNN", torchvision.models.detection.FasterRCNN),
        ("fedmq.algorithms.problems.federated_datasets:DigitTasks", DigitTasks),
    ],
)
def test_a_class_of_a_library_or_of_fedmq_is_always_allowed(name, found):
    assert find(name) is found


def test_an_algorithm_of_fedmq_may_be_named_by_module_and_class():
    assert find_algorithm("fedmq.algorithms.fedavg:FedAvg") is FedAvg


def test_a_name_of_an_older_release_finds_the_class_where_it_is_now():
    for old, new in MOVED.items():
        assert importlib.import_module(new)
        assert old not in sys.modules or hasattr(sys.modules[old], "__path__")
    assert find_algorithm("fedmq.algorithms.fedrep:FedRep").__name__ == "FedRep"
    assert find("fedmq.algorithms.problems.natural:DigitTasks") is DigitTasks


@pytest.mark.parametrize("value", [0.1, 3, True, None, "mean", "max-norm", [0.9, 0.999], "1e-3"])
def test_numbers_and_words_are_arguments_for_a_library(value):
    assert find("torch.optim:Adam", setting=value) is torch.optim.Adam


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd", "weights.pt", "../up", "~", "C:\\w", "http://example.org/w", "host:80",
        "a b", "mean\n", ["ok", "/etc"], {"a": 1}, b"x", "x" * 101,
    ],
)  # fmt: skip
def test_a_path_or_an_address_is_no_argument_for_a_library(value):
    with pytest.raises(AlgorithmError, match="setting: expected a number or a word"):
        find("torch.optim:SGD", setting=value)


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.lr_scheduler:warnings",  # a module that it imports
        "torch.optim.lr_scheduler:Tensor",  # defined elsewhere
        "torch.optim.lr_scheduler:partial",
        "torch.optim.sgd:sgd",  # a function
        "torchvision.models:resnet18",  # a function, which can download
        "torchvision.models.resnet:load_state_dict_from_url",
        "torchvision.models:resnet.ResNet",
        "torch.optim:__class__",
        "fedmq.algorithms.problems.registry:load_problem",
        "fedmq.algorithms.problems.data_files:read_npz",
        "fedmq.algorithms.problems.datasets:resources",
        "fedmq.algorithms.problems.base:Problem",  # abstract
        "fedmq.algorithms.fedavg:FedAvg",  # no problem
        "fedmq.algorithms.problems.federated_datasets:np.save",
    ],
)
def test_of_what_is_always_allowed_only_classes_that_are_defined_there(name):
    with pytest.raises(AlgorithmError):
        find(name)


@pytest.mark.parametrize(
    "name",
    [
        "fedmq.nodes.cluster.supervisor:broker_main",
        "fedmq.codecs.registry:make_codec",
        "fedmq:algorithms",
        "torch:load",
        "torch.hub:load",
        "torch.optimal:SGD",
        "torchvision.datasets:ImageFolder",
        "os:system",
        "builtins:eval",
    ],
)
def test_all_else_is_refused_with_the_module_and_the_option(name):
    module = name.partition(":")[0]
    with pytest.raises(NotAllowed, match=rf"'{name}'.*module '{module}'.*--allow {module}"):
        find(name)


# ---- a person's own, and strangers'


@pytest.mark.parametrize("name", ["evil_mod:mine", "evil_pkg.sub:Mine", "evil_pkg.sub:os.system"])
def test_what_is_not_allowed_is_not_imported_nor_is_its_parent(strangers, name):
    for refused in (find, find_algorithm, lambda name: load_problem({"name": name}, 0)):
        with pytest.raises(NotAllowed):
            refused(name)
    assert imported(strangers) == []


def test_an_allowed_module_does_not_allow_its_neighbours(strangers):
    for module in ("evil", "evil_pkg.su", "evil_pkg.sub.deeper", "evil_modern"):
        with pytest.raises(NotAllowed):
            find("evil_pkg.sub:Mine", Allowed(modules=frozenset({module})))
    assert imported(strangers) == []


@pytest.mark.parametrize("module", ["evil_pkg", "evil_pkg.sub"])
@pytest.mark.parametrize("attribute", ["Mine", "mine"])
def test_an_allowed_module_and_what_is_below_it(strangers, module, attribute):
    found = find(f"evil_pkg.sub:{attribute}", Allowed(modules=frozenset({module})))
    assert (found.__module__, found.__name__) == ("evil_pkg.sub", attribute)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("system", "of type 'builtin_function_or_method'"),
        ("partial", "is defined in 'functools', which is not allowed"),
        ("os", "of type 'module'"),
        ("posixpath", "of type 'module'"),
        ("bound", "of type 'partial'"),
        ("secret", "of type 'str'"),
        ("os.system", "one attribute"),
        ("Mine.mro", "one attribute"),
        ("__class__", "is defined in 'builtins', which is not allowed"),
        ("nobody", "does not exist"),
        ("", "expected module:attribute"),
        ("mine()", "expected module:attribute"),
    ],
)
def test_of_an_allowed_module_one_class_or_function_that_is_defined_there(
    strangers, attribute, reason
):
    with pytest.raises(AlgorithmError, match=reason) as caught:
        find(f"evil_mod:{attribute}", Allowed(modules=frozenset({"evil_mod"})))
    assert "a password" not in str(caught.value)


def test_a_person_may_name_anything_to_the_letter(strangers):
    own = Allowed(names=frozenset({"evil_mod:os.system"}))
    assert callable(find("evil_mod:os.system", own))
    for other in ("evil_mod:mine", "evil_mod:os.popen", "evil_pkg:mine"):
        with pytest.raises(NotAllowed):
            find(other, own)
    assert imported(strangers) == ["evil_mod"]


# ---- installed packages


def install(folder, group, name, value):
    """Leave what an installer leaves: the metadata of a package."""
    metadata = folder / f"{name}_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")


def test_an_installed_entry_point_is_allowed_by_its_name_and_by_what_it_names(strangers):
    install(strangers, PROBLEMS, "theirs", "evil_mod:mine")
    with pytest.raises(NotAllowed):  # another group's
        resolve("evil_mod:mine", NOTHING, ALGORITHMS, Algorithm)
    with pytest.raises(NotAllowed):  # another attribute of its module
        find("evil_mod:Mine")
    assert imported(strangers) == []
    assert find("theirs").__name__ == find("evil_mod:mine").__name__ == "mine"


def test_an_installed_problem_and_an_installed_algorithm_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, PROBLEMS, "digits", "fedmq.algorithms.problems.federated_datasets:DigitTasks")
    install(tmp_path, ALGORITHMS, "plain", "fedmq.algorithms.fedavg:FedAvg")
    assert isinstance(load_problem({"name": "digits", "clients": 10}, 0), DigitTasks)
    assert find_algorithm("plain") is FedAvg


def test_list_shows_what_is_installed_and_imports_none_of_it(strangers):
    install(strangers, PROBLEMS, "theirs", "evil_mod:mine")
    assert ("theirs", "evil_mod:mine, from an installed package") in list(catalogue("problems"))
    assert imported(strangers) == []


def test_metadata_in_the_current_folder_are_not_installed(strangers, monkeypatch):
    install(strangers, PROBLEMS, "theirs", "evil_mod:mine")
    for path in (str(strangers), "", "."):
        monkeypatch.chdir(strangers)
        monkeypatch.setattr(sys, "path", [*sys.path, path])
        assert not [each for each in entry_points(PROBLEMS) if each.name == "theirs"]
        with pytest.raises(AlgorithmError):
            find("theirs")
    assert imported(strangers) == []


def test_two_packages_with_one_name_are_a_sentence(strangers, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    install(strangers, PROBLEMS, "theirs", "evil_mod:mine")
    install(other, PROBLEMS, "theirs", "evil_pkg:mine")
    (other / "theirs_package-1.dist-info" / "METADATA").write_text("Name: other\nVersion: 1\n")
    monkeypatch.syspath_prepend(other)
    with pytest.raises(ProblemError, match=r"^problem\.name: several installed packages"):
        load_problem({"name": "theirs"}, 0)


# ---- problems: no name of anything becomes a path

TASKS = "fedmq.algorithms.problems.federated_datasets"


@pytest.mark.parametrize(
    "options",
    [
        {"name": "../../etc/passwd"},
        {"name": "/etc/passwd"},
        {"name": "mnist/../../x"},
        {"name": "mnist-mini", "model": "/etc/model.pt"},
        {"name": "mnist-mini", "partition": "open('/etc/x')"},
        {"name": "mnist-mini", "root": "/etc"},
        {"name": f"{TASKS}:LandMine", "file": "/etc/passwd"},
        {"name": f"{TASKS}:LandMine", "file": "../x.npz"},
        {"name": f"{TASKS}:DigitTasks", "data": "../mnist"},
        {"name": f"{TASKS}:DigitTasks", "data": "mnist/../x"},
        {"name": f"{TASKS}:_File"},
    ],
)
def test_no_option_of_a_built_in_problem_becomes_a_path(options):
    """All are refused by name, before any file is looked for."""
    with pytest.raises(ProblemError, match=r"^problem") as caught:
        load_problem({"clients": 2, **options}, 0)
    assert not isinstance(caught.value, DataError)
