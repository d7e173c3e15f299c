"""The grid of a sweep: values on the command line, names of cells, mistakes."""

import pytest

from fedmq.nodes.api.given import Given
from fedmq.nodes.api.sweep_grid import grid, parse_over, short_names, value_text
from fedmq.nodes.errors import ConfigError

BASE = Given.of({"run.id": "base", "run.versions": 3})


def test_commas_within_brackets_and_quotes_belong_to_the_value() -> None:
    texts = [
        "codec.up=raw,quantize(4, 256)",
        "problem.sizes=[1, 2],[3]",
        'problem.label="a,b",c',
        "run.seed=0, 1",
        "run.target_accuracy=none,0.5",
    ]
    assert parse_over(texts) == {
        "codec.up": ["raw", "quantize(4, 256)"],
        "problem.sizes": [[1, 2], [3]],
        "problem.label": ["a,b", "c"],
        "run.seed": [0, 1],
        "run.target_accuracy": ["none", 0.5],
    }


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (["lr=1"], r"--over lr=1: expected table\.key=value,value"),
        (["algorithm.lr"], "expected table.key=value,value"),
        (["a.b=1,,2"], "expected a value before and after each comma"),
        (["a.b="], "expected a value"),
        (["a.b=topk(1,2"], r"expected a closing \)"),
        (["a.b=1),2"], r"\) closes nothing"),
        (["a.b='x"], "expected a closing '"),
        (["a.b=1", "a.b=2"], r"a\.b comes twice; give all its values in one --over"),
    ],
)
def test_a_mistake_in_the_values_is_one_sentence(texts: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        parse_over(texts)


def test_each_combination_is_a_cell_with_a_name_to_read() -> None:
    cells = grid(BASE, {"algorithm.lr": [0.1, 0.01], "run.seed": range(2)})
    assert [cell.name for cell in cells] == [
        "lr=0.1,seed=0",
        "lr=0.1,seed=1",
        "lr=0.01,seed=0",
        "lr=0.01,seed=1",
    ]
    assert cells[1].settings == {"algorithm.lr": 0.1, "run.seed": 1}
    assert cells[1].given.checked.run.seed == 1
    assert cells[1].given.checked.run.id == ""  # each run has its own
    assert cells[1].given.checked.run.versions == 3


def test_names_of_unusual_values_are_safe_and_differ() -> None:
    over = {"codec.up": ["raw", "quantize(4, 256)", "quantize(4; 256)", "x" * 300]}
    names = [cell.name for cell in grid(BASE, over)]
    assert names[0] == "up=raw"
    assert names[1].startswith("up=quantize-4-256-")
    assert len(set(names)) == 4
    assert all(len(name) < 200 and "/" not in name for name in names)


def test_a_negative_number_keeps_its_sign_in_the_name() -> None:
    assert grid(BASE, {"problem.shift": [-1.5, 1e-05]})[0].name == "shift=-1.5"


def test_a_key_without_a_dot_has_tables_as_values() -> None:
    base = Given.of({"schedule": {"name": "buffered", "size": 10}})
    cells = grid(base, {"schedule": [{"name": "rounds"}, {"name": "stream"}]})
    assert cells[0].given.checked.schedule == {"name": "rounds"}
    assert [cell.name for cell in cells] == ["schedule=rounds", "schedule=stream"]


def test_a_short_name_is_the_end_that_no_other_key_has() -> None:
    assert short_names(["algorithm.lr", "run.seed"]) == {"algorithm.lr": "lr", "run.seed": "seed"}
    assert short_names(["a.b.lr", "c.lr", "lr"]) == {"a.b.lr": "b.lr", "c.lr": "c.lr", "lr": "lr"}


def test_values_as_a_person_writes_them() -> None:
    values = (None, "raw", True, 0.1, [1, 2], {"a": 1}, {"name": "rounds", "fraction": 0.2})
    texts = [value_text(each) for each in values]
    assert texts == ["none", "raw", "true", "0.1", "[1, 2]", "a=1", "rounds fraction=0.2"]


@pytest.mark.parametrize(
    ("over", "error"),
    [
        ({}, "expected at least one key with its values"),
        ({"algorithm.lr": "0.1"}, "algorithm.lr: expected a list of values, got '0.1'"),
        ({"algorithm.lr": 0.1}, "expected a list of values"),
        ({"algorithm.lr": []}, "expected at least one value, got none"),
        ({"run.seed": [1, 2, 1]}, "run.seed: the value 1 comes twice"),
        ({"run.sede": [1]}, "unknown key 'run.sede'"),
        ({"run.seed": [-1]}, "run.seed: expected"),
    ],
)
def test_a_mistake_in_the_grid_is_one_sentence(over, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        grid(BASE, over)


@pytest.mark.parametrize(
    ("over", "error"),
    [
        ({"algorithm.lr": [1, 1.0]}, r"algorithm\.lr: the value 1 comes twice"),
        ({"problem.sizes": [[1, 2], [1.0, 2]]}, r"problem\.sizes: the value \[1, 2\] comes twice"),
        (
            {"worker": [{"count": 4}, {"threads": 1}]},
            "worker=count-4-.* and worker=threads-1-.* have the same configuration; leave out one",
        ),
        ({"run.id": ["a", "b"]}, r"run\.id: cannot be swept"),
        ({"run": [{"id": "a"}]}, "run: cannot be swept, .*; sweep single keys of the table"),
        (
            {"schedule.fraction": [0.5, 1.0], "schedule": [{"name": "rounds", "fraction": 0.25}]},
            "schedule.fraction: the tables of schedule replace its values; put schedule before it",
        ),
    ],
)
def test_cells_that_would_be_one_and_keys_without_effect_are_errors(over, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        grid(BASE, over)


def test_equal_values_are_one_cell_in_every_sweep() -> None:
    [one], [same] = (grid(BASE, {"algorithm.lr": [value]}) for value in (1, 1.0))
    assert one.name == same.name == "lr=1"


def test_a_key_after_its_table_replaces_its_value() -> None:
    over = {"schedule": [{"name": "rounds"}], "schedule.fraction": [0.5, 1.0]}
    cells = grid(BASE, over)
    assert [cell.given.checked.schedule["fraction"] for cell in cells] == [0.5, 1.0]
