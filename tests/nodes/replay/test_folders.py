"""A replay reads only the folder of its run, and chooses the run in it."""

import re
import shutil

import pytest

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Consumed, Opened
from tests.nodes.replay import material
from tests.nodes.replay.material import BUFFERED, GOLDEN, edit, refused, replay, rewrite

FIRST = re.compile(
    r"^replayed ([\d,]+) messages?: all ([\d,]+) actions match the record$", re.MULTILINE
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--from-checkpoint"],
        ["--until", material.number(BUFFERED, 3, kind="version")],
        ["--worker", "worker-0"],
        ["--set", "schedule.size=2"],
        ["--compare", GOLDEN / "fedavg-buffered"],
    ],
    ids=str,
)
def test_nothing_is_written_to_the_runs_folder(words, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(BUFFERED, folder)

    def look():
        return {
            str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in [folder, *folder.rglob("*")]
        }

    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = look()
    try:
        replay(folder, *words)
        assert look() == before
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.parametrize("words", [[], ["--worker", "worker-0"], ["--set", "schedule.size=2"]])
def test_a_folder_without_a_ledger_is_refused(words, tmp_path):
    assert str(tmp_path) in refused(tmp_path, *words)
    assert "nowhere" in refused(tmp_path / "nowhere", *words)


def test_an_unknown_run_is_refused_with_the_choices():
    assert "simulated" in refused(BUFFERED, "--run-id", "other")


def test_of_several_runs_one_is_named(tmp_path):
    """Entries of another run neither stop nor change a replay."""
    config = Trace(BUFFERED).opened.config
    more = [
        lambda seq, at: Opened(seq=seq, at=at, run="other", config=config, total_clients=6),
        lambda seq, at: Consumed(seq=seq, at=at, node="worker-0", of=(seq - 1,)),
    ]
    folder = rewrite(BUFFERED, tmp_path, more=more)
    assert "--run-id" in refused(folder)
    assert FIRST.search(replay(folder, "--run-id", "simulated").output)
    assert "replayed 0 messages: all 0 actions" in replay(folder, "--run-id", "other").output


def test_a_body_that_a_later_release_writes_more_into_is_still_equal(tmp_path):
    """Entries that the record lacks are not compared."""
    seq = material.number(BUFFERED, 1, kind="version")
    folder = rewrite(BUFFERED, tmp_path, {seq: material.without("max_staleness")})
    assert FIRST.search(replay(folder).output)
    folder = rewrite(BUFFERED, tmp_path / "more", {seq: edit(body={"extra": 1})})
    assert f"message {seq} differs" in replay(folder, code=1).output
