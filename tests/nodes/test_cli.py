"""The command line in one process: help, lists, ranges."""

import pytest
from click.testing import CliRunner

from fedmq.nodes import cli
from fedmq.nodes.cli import main, parse_ranges
from fedmq.nodes.errors import ConfigError


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("algorithms", ["fedavg", "fedprox", "fedsgd", "mu=0.01", "buffered, rounds, stream"]),
        ("schedules", ["rounds", "buffered", "stream", "hinge(a, b)", "inverse_sqrt"]),
        ("codecs", ["raw", "cast(dtype)"]),
        ("problems", ["mnist-mini", "cinic10", "2nn", "dirichlet(alpha", "by_writer"]),
    ],
)
def test_list_shows_all_choices(what: str, words: list[str]) -> None:
    result = CliRunner().invoke(main, ["list", what])
    assert result.exit_code == 0
    for word in words:
        assert word in " ".join(result.output.split())


def test_list_of_something_else_names_the_choices() -> None:
    result = CliRunner().invoke(main, ["list", "nodes"])
    assert result.exit_code == 2
    assert "algorithms" in result.output


def test_ranges_of_clients() -> None:
    assert parse_ranges("0-9") == [(0, 9)]
    assert parse_ranges("3, 5-7") == [(3, 3), (5, 7)]
    for wrong in ("", "a", "3-", "9-3", "-1", "1;2"):
        with pytest.raises(ConfigError, match="--clients"):
            parse_ranges(wrong)


@pytest.mark.parametrize(
    "command",
    [
        ["broker", "--bind", "tcp://127.0.0.1:0", "--run", "run"],
        ["aggregator", "--connect", "tcp://127.0.0.1:1"],
        ["worker", "--connect", "tcp://127.0.0.1:1", "--clients", "0-9"],
    ],
)
def test_a_node_by_itself_is_set_up_as_in_a_cluster(tmp_path, monkeypatch, command) -> None:
    def tune_process() -> None:
        raise KeyError("set up")

    monkeypatch.setattr(cli, "tune_process", tune_process)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="set up"):
        CliRunner().invoke(main, command, catch_exceptions=False)
