"""Logs do not take a node down with them."""

from pathlib import Path

import pytest
import structlog

from fedmq.nodes import logs


@pytest.fixture(autouse=True)
def restored():
    yield
    structlog.get_config()["logger_factory"]._file.close()
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_lines_hold_what_is_bound_and_go_to_the_file(tmp_path):
    path = tmp_path / "node.log"
    logs.configure(path, node="w1")
    structlog.get_logger().info("admitted", run="r")
    assert '"node": "w1"' in path.read_text()
    assert '"run": "r"' in path.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_is_no_crash():
    """The first thing that a broker does about a full disk is to say so."""
    logs.configure(Path("/dev/full"), node="broker")
    structlog.get_logger().error("nothing can be kept", reason="no space left on device")
