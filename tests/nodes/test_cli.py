"""The command line in one process: help, lists, ranges."""

import pytest
import torch
from click.testing import CliRunner

from fedmq.broker.admission import MAX_RANGES
from fedmq.broker.names import name_fault
from fedmq.nodes import cli
from fedmq.nodes.cli import default_name, main, parse_ranges
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.setup import choose_device


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
    assert parse_ranges("0,1,2-4,6,5") == [(0, 4), (6, 6), (5, 5)]
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


def test_a_worker_of_too_many_ranges_is_refused_before_it_connects() -> None:
    ranges = ",".join(str(client) for client in range(0, 2 * MAX_RANGES + 2, 2))
    result = CliRunner().invoke(main, ["worker", "--clients", ranges])
    assert result.exit_code == 2
    assert f"--clients: expected at most {MAX_RANGES} ranges, got {MAX_RANGES + 1}" in result.stderr


@pytest.mark.parametrize("host", ["h", "host-" * 40, "übermensch." * 20, "\udc80", ""])
@pytest.mark.parametrize("clients", [[], [(0, 9)], [(c, c) for c in range(0, 2000, 2)]])
def test_a_name_that_nobody_chose_is_short_enough(
    host: str, clients: list[tuple[int, int]]
) -> None:
    assert name_fault(default_name(host, clients)) == ""


@pytest.mark.parametrize(
    ("gpus", "wanted", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
        (2, "cuda:01", "cuda:1"),
        (2, "cpu", "cpu"),
    ],
)
def test_a_device_that_is_there_is_taken(monkeypatch, gpus: int, wanted: str, device: str) -> None:
    _gpus(monkeypatch, gpus)
    assert choose_device(wanted) == device


@pytest.mark.parametrize(
    ("gpus", "wanted"),
    [
        *(
            (0, each)
            for each in ("cuda", "cuda:0", "cuda:1", "mps", "nonsense", "", "cpu:0", "xpu")
        ),
        *(
            (2, each)
            for each in ("cuda:2", "cuda:9", "cuda:-1", "cuda:1 ", "cuda:²", "CUDA", "cudax")
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch, gpus: int, wanted: str
) -> None:
    _gpus(monkeypatch, gpus)
    with pytest.raises(ConfigError) as caught:
        choose_device(wanted)
    there = "".join(f", cuda:{index}" for index in range(gpus))
    assert str(caught.value) == (
        f"worker.device: there is no device {wanted!r} here; choose from auto, cpu{there}"
    )
    with pytest.raises(ConfigError, match=r"^--device: there is no device"):
        choose_device(wanted, "--device")


def _gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_cluster_for_a_device_that_is_not_there_starts_nothing(monkeypatch, tmp_path) -> None:
    _gpus(monkeypatch, 0)
    words = ["cluster", "--run", str(tmp_path / "run"), "--set", "worker.device=cuda:1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "worker.device: there is no device 'cuda:1' here; choose from auto, cpu" in result.stderr
    assert not (tmp_path / "run").exists()
