"""Settings that algorithms, or schedules, share have one default; papers' exceptions are listed."""

import dataclasses

import pytest
import tomli_w
from click.testing import CliRunner

from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.registry import ALGORITHMS
from fedmq.algorithms.schedules import SCHEDULES
from fedmq.nodes.cli.main import main
from fedmq.nodes.run.config import load
from fedmq.nodes.run.setup import set_up

_GKT = "the paper trains other networks, with Adam"
_PFEDHN = "the paper's experiments"
_PLAIN = "the paper's local steps are plain SGD"
_BATCH = "64 in the paper"
EXCEPTIONS = {
    ("fedsgd", "lr"): "a server's step, not a client's",
    ("fedsgd", "epochs"): "one gradient, no local steps",
    ("fedsgd", "batch_size"): "the gradient of the whole local set",
    ("fedsgd", "momentum"): "one gradient, no local steps",
    ("perfedavg", "lr"): "the paper's beta",
    ("perfedavg", "epochs"): "a task is of steps",
    ("perfedavg", "batch_size"): "the paper's experiments",
    ("perfedavg", "momentum"): _PLAIN,
    ("personalised-fedavg", "epochs"): "the paper wants E fairly large",
    ("personalised-fedavg", "momentum"): _PLAIN,
    ("fedgkt", "lr"): _GKT,
    ("fedgkt", "momentum"): _GKT,
    ("fedgkt", "weight_decay"): _GKT,
    ("fedgkt", "batch_size"): _GKT,
    ("fedgkt", "epochs"): _GKT,
    ("fedgkt", "server_lr"): "of a server that trains: the clients' rate",
    ("pfedhn", "lr"): _PFEDHN,
    ("pfedhn", "momentum"): _PFEDHN,
    ("pfedhn", "weight_decay"): _PFEDHN,
    ("pfedhn", "batch_size"): _PFEDHN,
    ("pfedhn", "server_lr"): "of the hypernetwork: it depends on the classifier",
    ("fd", "batch_size"): _BATCH,
    ("codistillation", "batch_size"): _BATCH,
    ("faug", "batch_size"): _BATCH,
    ("fedper", "head"): "a head is what the paper is about; fine-tuning may do without",
    ("fedrep", "head"): "a head is what the paper is about; fine-tuning may do without",
    ("mocha", "personal_epochs"): "of the dual of a new client, from nothing",
    ("buffered", "staleness"): "FedBuff's own; the same numbers as polynomial(0.5)",
}
"""(name, field): why its default is not that of the others. The class says so, too."""


def others(registry, field):
    """Return the defaults that a field has, but for the exceptions."""
    return {
        each.default
        for name, kind in registry.items()
        for each in dataclasses.fields(kind)
        if each.name == field and (name, field) not in EXCEPTIONS
    }


FIELDS = [
    pytest.param(registry, name, each, id=f"{name}-{each.name}")
    for registry in (ALGORITHMS, SCHEDULES)
    for name, kind in registry.items()
    for each in dataclasses.fields(kind)
]


@pytest.mark.parametrize(("registry", "name", "field"), FIELDS)
def test_a_shared_setting_has_one_default(registry, name, field):
    shared = others(registry, field.name)
    if (name, field.name) in EXCEPTIONS:
        assert field.default not in shared, "it is none"
        assert shared
    else:
        assert shared == {field.default}


@pytest.mark.parametrize(("name", "field"), EXCEPTIONS)
def test_an_exception_stands_in_the_docstring_of_its_class(name, field):
    assert field in ({**ALGORITHMS, **SCHEDULES}[name].__doc__ or "")


def written(default):
    """Return a default as a run's file has it."""
    if default is None:
        return '"none"'
    if isinstance(default, tuple):
        return f"[{', '.join(written(each) for each in default)}]"
    return tomli_w.dumps({"it": default})[5:-1]


@pytest.mark.parametrize(
    ("table", "registry"), [("algorithm", ALGORITHMS), ("schedule", SCHEDULES)]
)
def test_what_is_used_is_what_list_prints_whether_or_not_it_is_named(table, registry):
    printed = " ".join(CliRunner().invoke(main, ["list", f"{table}s"]).output.split())
    for name, kind in registry.items():
        settings = [f"{table}.name={name}"]
        if table == "algorithm":
            settings.append(f"schedule.name={min(kind.schedules)}")
        # FedGKT and others ask more of a problem; only the table is looked at here.
        given = getattr(load(None, settings), table)
        assert given == {"name": name}
        for each in dataclasses.fields(kind):
            assert f"{each.name}={written(each.default)}" in printed
    assert getattr(load(None), table).keys() == {"name"}


def test_naming_the_default_changes_nothing_and_fedprox_differs_from_it_only_in_its_own():
    unnamed = set_up(load(None)).config
    named = ["problem.name=mnist-mini", "algorithm.name=fedavg", "schedule.name=buffered"]
    assert set_up(load(None, named)).config == unnamed
    prox = set_up(load(None, ["algorithm.name=fedprox"])).config
    assert prox.algorithm == {**unnamed.algorithm, "name": "fedprox", "mu": 0.01, "partial": 0.0}
    assert (unnamed.algorithm["epochs"], unnamed.algorithm["momentum"]) == (2, 0.5)
    assert (unnamed.schedule["size"], unnamed.schedule["concurrency"]) == (5, 8)
    assert set_up(load(None, ["schedule.name=stream"])).config.schedule["concurrency"] == 8
    assert unnamed.problem["model"] == "cnn-mnist"


def test_a_users_class_inherits_no_limit_on_examples():
    own = type("Own", (FedAvg,), {"__module__": "own"})
    assert FedAvg.counts_examples
    assert not own.counts_examples
    counting = type("Own", (FedAvg,), {"__module__": "own", "counts_examples": True})
    assert counting.counts_examples


def test_a_problem_with_other_data_or_metrics_inherits_no_limits_of_the_former_ones():
    augmented = type("Augmented", (ImageClassification,), {"client": lambda self, index: None})
    assert augmented.most_examples is Problem.most_examples
    assert augmented.metric_range is ImageClassification.metric_range
    relative = type("Relative", (ImageClassification,), {"metrics": lambda self, outputs, y: {}})
    assert relative.metric_range is Problem.metric_range
    assert relative.most_examples is ImageClassification.most_examples
