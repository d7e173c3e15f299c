"""Numbers of a configuration are finite and of a numeric type; TOML errors name file and line."""

import math
from pathlib import Path

import pytest

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.config import changed, load, parse
from fedmq.nodes.run.setup import set_up


def complaint(*settings: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        set_up(load(path, settings))
    return str(caught.value)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize(
    "key",
    [
        "run.checkpoint_s",
        "run.target_accuracy",
        "run.seed",
        "algorithm.lr",
        "algorithm.momentum",
        "schedule.max_staleness",
        "problem.clients",
        "worker.slowdown",
        "worker.drop",
        "worker.nodes.worker-0.slowdown",
        "broker.lease_s",
        "broker.heartbeat_s",
        "broker.retain",
    ],
)
def test_the_error_for_a_number_that_is_not_finite_names_its_key(key: str, value: str) -> None:
    found = "inf" if value == "1e999" else value
    assert complaint(f"{key}={value}") == f"{key}: expected a finite number, got {found}"


def test_numbers_in_lists_and_of_a_users_problem_are_finite(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[problem]\nname = "own:Own"\nscale = [1.0, nan]\n')
    assert complaint(path=path) == "problem.scale: expected a finite number, got nan"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("worker.slowdown", "uniform(1, 1e999)"),
        ("worker.slowdown", "pareto(nan)"),
        ("worker.nodes.worker-1.slowdown", "exponential(inf)"),
        ("schedule.staleness", "polynomial(true)"),
        ("problem.partition", "dirichlet(1e999)"),
        ("codec.up", "quantize(True)"),
        ("codec.down", "cast(float16) | quantize(bits=nan)"),
    ],
)
def test_numbers_in_a_spec_are_finite(key: str, text: str) -> None:
    assert complaint(f"{key}={text}") == f"{key}: expected finite numbers, got {text!r}"


@pytest.mark.parametrize(
    "key",
    [
        "run.versions",
        "run.seed",
        "run.checkpoint_s",
        "algorithm.epochs",
        "algorithm.lr",
        "schedule.size",
        "schedule.concurrency",
        "worker.count",
        "broker.lease_s",
        "broker.deliveries",
    ],
)
@pytest.mark.parametrize(("value", "shown"), [("true", "true"), ('"5"', "'5'")])
def test_booleans_and_text_are_not_converted_to_numbers(key: str, value: str, shown: str) -> None:
    assert complaint(f"{key}={value}") == f"{key}: expected a number, got {shown}"


def test_booleans_and_words_keep_their_type() -> None:
    config = load(None, ["broker.share_files=false", "algorithm.batch_size=none"])
    assert config.broker.share_files is False
    assert set_up(config).config.algorithm["batch_size"] is None
    assert load(None, ["run.versions=1e3"]).run.versions == 1000


@pytest.mark.parametrize("limit", ["0", "1", "1e6", "16777215"])
def test_the_error_for_a_retention_limit_that_is_too_small_names_the_least(limit: str) -> None:
    text = complaint(f"broker.retain={limit}")
    assert text.startswith("broker.retain: expected 'everything', 'unfinished', 'headers' or a")
    assert "at least 16,777,216" in text


def test_a_recorded_configuration_with_infinities_is_readable() -> None:
    """Older releases accepted these values; their runs stay readable."""
    config = load(None, ["run.id=x"])
    text = config.to_toml().replace("checkpoint_s = 1.0", "checkpoint_s = inf")
    text = text.replace('retain = "everything"', "retain = 1000.0")
    recorded = parse(text)
    assert math.isinf(recorded.run.checkpoint_s)
    assert recorded.broker.retain == 1000
    assert math.isinf(changed(recorded, ["algorithm.lr=0.5"]).run.checkpoint_s)
    with pytest.raises(ConfigError, match=r"algorithm.lr: expected a finite number"):
        changed(recorded, ["algorithm.lr=inf"])


# ---- TOML

GOOD = "[run]\nseed = 7\nversions = 3\n"


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_both_line_endings_are_accepted(
    tmp_path: Path, mark: bytes, ends: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(mark + GOOD.replace("\n", ends).encode())
    assert (load(path).run.seed, load(path).run.versions) == (7, 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[run]\nseed = 1\nseed = 2\n", "line 3: duplicate key seed"),
        (b"[run]\n[run]\n", "line 2: duplicate table [run]"),
        (b"[run]\nseed =\n", "line 2: Invalid value"),
        (b"[run]\n\nid = \xff\n", "line 3 is not UTF-8 (byte 0xff)"),
        (b"\xff\xfe[\x00r\x00", "expected UTF-8, got UTF-16"),
        (b"[run]\nid = '''x", "line 2: "),
    ],
)
def test_toml_errors_name_file_and_line(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} is not TOML: {words}")
    assert "\n" not in str(caught.value)
