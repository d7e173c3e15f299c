"""Configuration: defaults, settings, and errors of one clear sentence."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmq.algorithms.fedavg import FedAvg
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import build, load, parse
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.run.stragglers import slowdown
from tests.own_code import OWN_CODE


def complaint(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        set_up(load(None, settings))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_defaults_are_the_run_of_make_cluster() -> None:
    setup = set_up(load(None))
    assert setup.problem.clients == 40
    assert setup.algorithm.name == "fedavg"
    assert (setup.schedule.name, setup.config.schedule["size"]) == ("buffered", 5)


def test_a_complete_configuration_is_the_same_after_writing_and_reading() -> None:
    config = set_up(
        load(None, ["algorithm.batch_size=none", "schedule.max_staleness=7", "run.id=x"])
    ).config
    again = set_up(parse(config.to_toml())).config
    assert again == config
    assert again.algorithm["batch_size"] is None
    assert again.schedule["max_staleness"] == 7


def test_a_table_with_another_name_starts_from_its_own_defaults() -> None:
    config = set_up(load(None, ["algorithm.name=fedsgd", "schedule.name=rounds"])).config
    assert config.algorithm["lr"] == 0.1
    assert config.schedule["fraction"] == 0.1
    assert "size" not in config.schedule


def test_a_file_is_overridden_by_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[run]\nseed = 3\nversions = 9\n[schedule]\nname = "stream"\nmixing = 0.3\n')
    config = load(path, ["run.seed=4", "schedule.staleness=hinge(10, 4)"])
    assert (config.run.seed, config.run.versions) == (4, 9)
    assert config.schedule == {"name": "stream", "mixing": 0.3, "staleness": "hinge(10, 4)"}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("algorithm.name=fedavgg", ["algorithm.name", "'fedavgg'", "fedavg, fedavg-ft"]),
        ("worker.device=gpu", ["worker.device: expected auto, cpu, cuda or cuda:N, got 'gpu'"]),
        ("run.versions=2.5", ["run.versions: expected a whole number, got 2.5"]),
        ("algorithm.lr=x", ["algorithm.lr: expected a number, got 'x'"]),
        ("algorithm.lrr=1", ["algorithm.lrr", "did you mean 'lr'", "epochs"]),
        ("algorithm.lr=-1", ["algorithm.lr", "greater than 0", "-1"]),
        ("algorithm.epochs=abc", ["algorithm.epochs: expected a whole number, got 'abc'"]),
        ("problem.name=mnits", ["problem.name", "'mnits'", "mnist-mini"]),
        ("problem.partition=dirichlet(-1)", ["problem.partition", "alpha", "-1"]),
        ("problem.foo=1", ["problem.foo", "clients", "partition"]),
        ("problem.model=cnn-cifar", ["problem.model", "3x32x32", "1x28x28"]),
        ("codec.up=cast(float8)", ["codec.up", "float16", "'float8'"]),
        ("codec.down=quantum", ["codec.down", "'quantum'", "cast, entropy, features"]),
        ("schedule.name=streamm", ["schedule.name", "buffered, rounds, stream"]),
        ("schedule.staleness=hinge(1)", ["schedule.staleness", "hinge(a, b)"]),
        ("run.sed=1", ["run.sed", "did you mean 'seed'"]),
        ("run.versions=0", ["run.versions", "1", "got 0"]),
        ("run.min_clients=41", ["run.min_clients", "40", "41"]),
        ("run.max_examples=0", ["run.max_examples", "greater than or equal to 1", "0"]),
        ("run.max_update_norm=0", ["run.max_update_norm", "greater than 0", "0"]),
        ("foo.bar=1", ["'foo'", "algorithm", "schedule"]),
        ("nonsense", ["nonsense", "table.key=value"]),
        ("worker.slowdown=0.5", ["worker.slowdown", "at least 1", "0.5"]),
        ("worker.slowdown=triangular(1)", ["worker.slowdown", "halfnormal", "uniform"]),
        ("worker.drop=2", ["worker.drop", "1", "got 2"]),
    ],
)
def test_an_error_names_the_key(setting: str, words: list[str]) -> None:
    text = complaint(setting)
    for word in words:
        assert word in text


def test_a_schedule_that_the_algorithm_does_not_support_is_an_error() -> None:
    text = complaint("algorithm.name=fedsgd", "schedule.name=stream")
    assert text == (
        "schedule.name: fedsgd does not run under 'stream'; choose from buffered, rounds"
    )


def test_a_norm_of_updates_needs_an_algorithm_that_sends_updates() -> None:
    text = complaint("algorithm.name=mocha", "run.max_update_norm=1", "schedule.name=rounds")
    assert text == (
        "run.max_update_norm: expected an algorithm whose clients send updates of a model, "
        "got mocha"
    )


def test_a_file_that_is_missing_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*no\.toml"):
        load(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        load(tmp_path / "bad.toml")


def test_the_error_for_a_key_outside_its_table_names_the_table(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("versions = 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'versions' \(did you mean 'run\.versions'"):
        load(tmp_path / "run.toml")


def test_single_workers_can_have_their_own_slowdown() -> None:
    settings = ["worker.slowdown=2", 'worker.nodes.worker-1={slowdown = "uniform(1, 2)"}']
    settings.append("worker.drop=0.1")
    worker = load(None, settings).worker
    assert (worker.straggling("worker-0").slowdown, worker.straggling("worker-0").drop) == (2, 0.1)
    assert worker.straggling("worker-1").slowdown == "uniform(1, 2)"
    assert worker.straggling("worker-1").drop == 0.1
    # A node reads the configuration that the broker sends: it inherits the same.
    assert parse(load(None, settings).to_toml()).worker.straggling("worker-1").drop == 0.1


def test_a_configuration_can_come_from_standard_input(monkeypatch) -> None:
    def given(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    given(b"[run]\nversions = 3\n")
    assert load(Path("-"), ["run.seed=5"]).run.versions == 3
    given(b"[run\n")
    with pytest.raises(ConfigError, match="standard input is not TOML: line 1"):
        load(Path("-"))


def test_a_slowdown_is_at_least_1() -> None:
    rng = np.random.default_rng(0)
    for spec in ("uniform(0, 3)", "halfnormal(1)", "pareto(1.5)", "exponential(2)"):
        assert min(slowdown(spec)(rng) for _ in range(1000)) >= 1
    assert slowdown(4.0)(rng) == 4


@dataclass(frozen=True)
class FromNumpy(FedAvg):
    """Hyper-parameters as numpy scalars and arrays."""

    lr: float = np.float64(0.25)
    sizes: tuple[int, ...] = (np.int64(3), np.int64(4))


@dataclass(frozen=True)
class Unwritable(FedAvg):
    place: Any = Path("data")


def test_hyper_parameters_of_numpy_are_numbers() -> None:
    config = build({"algorithm": {"name": f"{__name__}:FromNumpy"}})
    complete = set_up(config, OWN_CODE).config
    assert type(complete.algorithm["lr"]) is float
    assert parse(complete.to_toml()).algorithm["sizes"] == [3, 4]


def test_a_hyper_parameter_that_toml_cannot_represent_is_an_error() -> None:
    config = build({"algorithm": {"name": f"{__name__}:Unwritable"}})
    with pytest.raises(ConfigError, match=r"the configuration cannot be written as TOML: .*Path"):
        set_up(config, OWN_CODE)


def test_a_lease_that_is_over_before_a_heartbeat_is_refused() -> None:
    sentence = r"^broker.lease_s: expected at least broker.heartbeat_s, 2, "
    with pytest.raises(ConfigError, match=sentence):
        build({"broker": {"lease_s": 1.5, "heartbeat_s": 2.0}})
    assert build({"broker": {"lease_s": 2.0, "heartbeat_s": 2.0}}).broker.lease_s == 2.0
