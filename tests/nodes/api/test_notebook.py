"""``fedmq.run`` in the kernel of a notebook: output in the cell, an interrupt, an error."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.nodes.api.test_running import PROBLEM

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

pytestmark = [
    pytest.mark.end_to_end,
    # Of the notebook's libraries, about their own insides.
    pytest.mark.filterwarnings("default"),
]

KERNEL = "import os; print(os.getpid())"
TRAIN = """
import fedmq
config = {"problem.name": "my_problem:Points", "run.versions": 1_000_000}
fedmq.run(config, workers=1, folder="run")
"""
AFTER = "fedmq.load('run')"


def text(cell) -> str:
    return "".join(each.get("text", "") for each in cell.outputs)


def test_a_notebook_trains_shows_progress_and_can_be_interrupted(tmp_path: Path) -> None:
    (tmp_path / "my_problem.py").write_text(PROBLEM)
    cells = [nbformat.v4.new_code_cell(each) for each in (KERNEL, TRAIN, AFTER)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}, allow_errors=True
    )
    failed: list[BaseException] = []

    def interrupt() -> None:
        """Do what the stop button does, once the run has an accuracy."""
        try:
            until = time.monotonic() + 60
            while "  accuracy " not in text(cells[1]):
                assert time.monotonic() < until, "the run did not start"
                time.sleep(0.1)
            os.killpg(int(text(cells[0])), signal.SIGINT)
        except BaseException as error:  # noqa: BLE001 - the test raises it
            failed.append(error)

    presser = threading.Thread(target=interrupt)
    presser.start()
    client.execute()
    presser.join()
    assert failed == []
    assert cells[1].outputs[-1]["ename"] == "KeyboardInterrupt"
    assert "stopped by SIGINT" in text(cells[1])
    assert "\x1b" not in text(cells[1])
    assert ": fedavg, buffered, interrupted, " in cells[2].outputs[0]["data"]["text/plain"]
    own = psutil.Process().children(recursive=True)
    assert [each for each in own if "fedmq.nodes" in each.cmdline()] == []
