"""Configurations as a caller gives them: dicts, dotted keys, files, `Config` objects."""

from pathlib import Path

import numpy as np
import pytest

from fedmq.nodes.api.given import Given
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import build, parse

OWN = {"problem": {"name": "my_problem:Points"}}


def test_keys_with_dots_are_keys_of_tables() -> None:
    given = Given.of({"algorithm.lr": 0.1, "run": {"seed": 1, "versions": 3}, "run.seed": 2})
    assert given.tables == {"algorithm": {"lr": 0.1}, "run": {"seed": 2, "versions": 3}}
    assert given.checked.run.seed == 2
    assert parse(given.to_toml()).run == given.checked.run


def test_the_callers_dict_stays_unchanged() -> None:
    mine = {"run": {"seed": 1}}
    Given.of(mine, {"run.seed": 2})
    assert mine == {"run": {"seed": 1}}


def test_settings_replace_keys_and_whole_tables() -> None:
    base = {"schedule": {"name": "buffered", "size": 10}, "algorithm.lr": 0.1}
    given = Given.of(base, {"schedule": {"name": "rounds"}, "algorithm.lr": 0.2})
    assert given.tables == {"schedule": {"name": "rounds"}, "algorithm": {"lr": 0.2}}


def test_values_of_numpy_none_tuples_and_paths_become_toml() -> None:
    given = Given.of(
        {
            "algorithm.lr": np.float32(0.5),
            "run.seed": np.int64(3),
            "run.target_accuracy": None,
            "problem.layers": (1, 2),
            "problem.file": Path("a/b"),
        }
    )
    assert given.tables["problem"] == {"layers": [1, 2], "file": "a/b"}
    assert parse(given.to_toml()).run.seed == 3
    assert 'target_accuracy = "none"' in given.to_toml()


def test_a_file_is_read_as_the_command_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[run]\nid = 'mine'\nversions = 3\n")
    assert Given.of(file).checked.run.id == "mine"
    assert Given.of(str(file), {"run.seed": 4}).checked.run.seed == 4
    (tmp_path / "ledger").mkdir()  # now it is the folder of a run, whose id is in use
    assert Given.of(file).checked.run.id == ""


def test_no_configuration_is_that_of_make_cluster() -> None:
    assert Given.of(None).checked.problem["name"] == "mnist-mini"


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"run.sede": 1}, r"unknown key 'run\.sede' \(did you mean 'seed'\?\)"),
        ({"run": 3}, r"run: expected a valid dictionary"),
        ({"run": 3, "run.seed": 1}, r"run\.seed: expected a table in run, got 3"),
        ({"run..seed": 1}, r"expected a key such as algorithm\.lr, got 'run\.\.seed'"),
        ({"problem.name": object}, r"problem\.name: expected a number, a text, a list or a table"),
        ({"algorithm.lr": np.ones(2)}, r"algorithm\.lr: expected a number"),
        ("missing.toml", r"cannot read missing\.toml: no such file"),
        (3, r"expected a configuration as a dict, the path of a TOML file or a Config, got 3"),
    ],
)
def test_a_mistake_is_one_sentence(config, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Given.of(config)


def test_a_config_of_an_unknown_author_imports_nothing() -> None:
    assert Given.of(build(OWN)).checked.allowed.names == {"my_problem:Points"}
    with pytest.raises(ConfigError, match="may not import my_problem:Points"):
        Given.of(parse(build(OWN).to_toml()))
