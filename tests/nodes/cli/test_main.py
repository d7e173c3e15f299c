"""The command line in one process: help, lists, ranges."""

import re

import pytest
import torch
from click.testing import CliRunner

from fedmq.broker.wire.addresses import MAX_RANGES, name_fault
from fedmq.nodes.cli import main as main_module
from fedmq.nodes.cli import nodes as nodes_module
from fedmq.nodes.cli.catalogue import catalogue, lines
from fedmq.nodes.cli.main import main
from fedmq.nodes.cli.nodes import default_name
from fedmq.nodes.cli.options import parse_ranges
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.devices import choose_device


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("algorithms", ["fedavg", "fedprox", "fedsgd", "mu=0.01", "buffered, rounds, stream"]),
        ("schedules", ["rounds", "buffered", "stream", "hinge(a, b)", "inverse_sqrt"]),
        ("codecs", ["raw", "cast(dtype)"]),
        (
            "problems",
            ["mnist-mini", "cinic10", "2nn", "dirichlet(alpha", "by_writer", "bootstrap("],
        ),
        ("distributions", ["lognormal(median, sigma)", "pareto(shape, scale=1.0", "choice"]),
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

    for module in (main_module, nodes_module):
        monkeypatch.setattr(module, "tune_process", tune_process)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="set up"):
        CliRunner().invoke(main, command, catch_exceptions=False)


@pytest.mark.parametrize("what", ["algorithms", "codecs", "distributions", "problems", "schedules"])
@pytest.mark.parametrize("columns", [20, 80, 200])
def test_lists_fit_the_terminal_and_break_no_name(what: str, columns: int) -> None:
    found = list(lines(what, columns))
    assert [line for line in found if line != line.rstrip()] == []
    names = [name for name, _ in catalogue(what)]
    assert [name for name in names if not any(line.startswith(name) for line in found)] == []
    longest = max(columns, 40)
    assert [line for line in found if len(line) > longest and " " in line.strip()] == []
    words = sorted(word for name, about in catalogue(what) for word in (name, *about.split()))
    assert sorted(word for line in found for word in line.split()) == sorted(
        part for word in words for part in word.split()
    )


def test_a_list_shows_defaults_as_a_run_s_file_has_them() -> None:
    text = " ".join(lines("algorithms", 80)) + " ".join(lines("schedules", 80))
    assert "None" not in text
    assert 'batch_size="none"' in " ".join(text.split())
    assert 'absent="zero"' in " ".join(text.split())
    assert "distil_edge=true" in " ".join(text.split())
    assert "gan_widths=[256, 512, 1024]" in " ".join(text.split())
    assert not re.search(r"\bNone\b", " ".join(lines("problems", 80)))


MISTAKES = [
    (["list"], "list: expected one of algorithms, codecs, distributions, problems, sch"),
    (["list", "nodes"], "list: expected one of algorithms, codecs, distributions, problems, sche"),
    (["lst"], "there is no command 'lst' (did you mean 'list'?); choose from aggregator, broker"),
    (["xyzxyz"], "there is no command 'xyzxyz'; choose from aggregator, broker, "),
    (["trace", "lss"], "trace: there is no command 'lss' (did you mean 'ls'?); choose from diff"),
    (["trace", "ls"], "trace ls: expected DIR"),
    (["trace", "show", "run", "x"], "trace show: OFFSET: expected a whole number from 0, got x"),
    (["cluster", "--wrkers", "2"], "cluster: there is no option '--wrkers' (did you mean '--work"),
    (["cluster", "--xyzxyz"], "cluster: there is no option '--xyzxyz'; --help lists them"),
    (["cluster", "--workers", "0"], "cluster: --workers: expected a whole number from 1, got 0"),
    (["cluster", "a", "b"], "cluster: got unexpected extra argument"),
    (["broker"], "broker: expected --run PATH"),
    (
        ["broker", "--run", "r", "--durability", "x"],
        "broker: --durability: expected one of process, power, got 'x'",
    ),
    (["worker", "--clients"], "option '--clients' requires an argument"),
    (["worker", "--give-up", "nan"], "worker: --give-up: expected seconds above 0, got nan"),
    (["worker", "--give-up", "-1"], "worker: --give-up: expected seconds above 0, got -1"),
    (
        ["broker", "--run", "r", "--lease", "-1"],
        "broker: --lease: expected seconds above 0, got -1",
    ),
    (["trace", "ls", "r", "--from", "x"], "trace ls: --from: expected a number, got 'x'"),
    (["replay", "run", "--task", "x"], "replay: --task needs --worker"),
    (["--nonsense"], "there is no option '--nonsense'"),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=lambda each: " ".join(each)[:40])
def test_a_mistake_on_the_command_line_is_one_sentence(command: list[str], words: str) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith(f"fedmq: {words}")


@pytest.mark.parametrize("command", [[], ["trace"], ["codec"], ["list"], ["worker"], ["replay"]])
def test_help_fits_a_terminal_and_is_not_cut(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"], terminal_width=80)
    assert result.exit_code == 0
    found = result.stdout.splitlines()
    assert [line for line in found if len(line) > 80 or line != line.rstrip()] == []
    assert [line for line in found[1:] if line.endswith("...")] == []


def test_without_a_command_there_is_help() -> None:
    for command in ([], ["trace"]):
        result = CliRunner().invoke(main, command)
        assert "Commands:" in result.output


@pytest.mark.parametrize(
    "command", [["worker", "--clients", "0", "--connect"], ["aggregator", "--connect"]]
)
@pytest.mark.parametrize("endpoint", ["127.0.0.1:7733", "tcp://127.0.0.1:99999", "ipc://"])
def test_an_invalid_endpoint_is_reported_at_once(command: list[str], endpoint: str) -> None:
    result = CliRunner().invoke(main, [*command, endpoint])
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(f"fedmq: cannot connect to {endpoint}: expected ")


def test_a_node_that_gives_up_reports_what_it_has_waited_for_and_exits_with_1() -> None:
    command = ["worker", "--clients", "0", "--connect", "tcp://127.0.0.1:1", "--give-up", "0.3"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    waited = "gave up: waiting for the broker at tcp://127.0.0.1:1 for 0 s"
    assert f"{waited}; nothing listens there (connection refused)" in result.stderr


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
