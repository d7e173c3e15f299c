"""Logs are bounded, contain no data, and do not crash a node."""

import json
from pathlib import Path

import pytest
import structlog
import torch

from fedmq.broker.wire.schema import Message
from fedmq.nodes.process import logs
from fedmq.nodes.process.logs import Repeats
from fedmq.nodes.run.session import log_rejected


@pytest.fixture(autouse=True)
def restored():
    yield
    if isinstance(
        file := getattr(structlog.get_config()["logger_factory"], "_file", None), logs._LossyLog
    ):
        file.close()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_lines_have_the_bound_fields_and_go_to_the_file(tmp_path):
    path = tmp_path / "node.log"
    logs.configure(path, node="w1")
    structlog.get_logger().info("admitted", run="r")
    assert '"node": "w1"' in path.read_text()
    assert '"run": "r"' in path.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_does_not_raise():
    """A broker logs that the disk is full, on the same disk."""
    logs.configure(Path("/dev/full"), node="broker")
    structlog.get_logger().error("nothing can be kept", reason="no space left on device")


def a_failing_task(rows):
    labels = rows * 3  # a local variable, with a client's data
    raise ValueError(f"cannot use {labels}")


@pytest.mark.parametrize("to_file", [True, False])
def test_an_exception_is_logged_without_any_value(tmp_path, capsys, to_file):
    path = tmp_path / "node.log" if to_file else None
    logs.configure(path, node="w1")
    try:
        try:
            a_failing_task(torch.full((4, 4), 1.53125))
        except ValueError as error:
            raise RuntimeError("in a task") from error
    except RuntimeError:
        structlog.get_logger().exception("task failed")
    text = path.read_text() if path else capsys.readouterr().err
    assert "1.5312" not in text
    assert "4.59" not in text
    assert "ValueError: cannot use tensor(...)" in text
    assert "RuntimeError: in a task" in text
    assert "test_logs.py" in text
    assert "a_failing_task" in text


def test_the_length_of_lines_is_bounded(tmp_path):
    path = tmp_path / "node.log"
    logs.configure(path, node="w1")
    log = structlog.get_logger()

    def deep(n):
        if not n:
            raise ValueError("x" * 10**6)
        deep(n - 1)

    try:
        deep(200)
    except ValueError:
        log.exception("y", reason="z" * 10**6, body={"k": ["v"] * 10**5})
    (line,) = path.read_text().splitlines()
    assert len(line) < 10_000
    assert json.loads(line)["exception"].endswith("x...")


def test_equal_events_are_logged_once_and_then_once_a_period():
    repeats = Repeats(every_s=60.0)
    assert repeats.count("a", 0.0) == 1
    assert [repeats.count("a", 0.1 * n) for n in range(1, 600)] == [0] * 599
    assert repeats.count("b", 59.0) == 1
    assert repeats.count("a", 60.0) == 601
    assert repeats.count("a", 61.0) == 0


def test_the_number_of_counted_events_is_bounded():
    repeats = Repeats()
    for number in range(100_000):
        assert repeats.count(number, 0.0) == 1
    assert len(repeats._seen) <= 256


def test_rejections_with_the_same_code_are_one_line(tmp_path):
    path = tmp_path / "node.log"
    logs.configure(path, node="w1")
    repeats = Repeats()
    for number in range(100):
        for code in ("not-finite", "late"):
            body = {"id": f"w1/{number}", "reason": "no", "code": code}
            about = {"kind": "refused", "id": f"b/{number}", "run": "r", "sender": "broker"}
            log_rejected(Message(**about, to="w1", body=body), repeats, structlog.get_logger())
    codes = [json.loads(line)["code"] for line in path.read_text().splitlines()]
    assert codes == ["not-finite", "late"]


def test_a_name_from_another_node_does_not_control_the_terminal(capsys):
    logs.configure(None, node="broker")
    log = structlog.get_logger()
    for name in ("\x1b[2J\x1b]0;title\x07", "\u202ex", "a b\x1b[31m", "a\nb", "n\u00f6de"):
        log.warning("rejected", peer_node=name)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines)
    assert lines[0].split("peer_node=")[1].startswith(r"\x1b[2J\x1b]0;title\x07")
    assert "n\u00f6de" in lines[4]


def test_the_last_suppressed_lines_are_counted_at_the_end(tmp_path):
    path = tmp_path / "node.log"
    logs.configure(path)
    for _ in range(int(logs.LINES_PER_S) + 7):
        structlog.get_logger().info("flood")
    for _ in range(2):
        logs.report_suppressed()
    *_, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert (last["event"], last["of"], last["lines"]) == ("suppressed log lines", "flood", 7)
    assert len(path.read_text().splitlines()) == logs.LINES_PER_S + 1
