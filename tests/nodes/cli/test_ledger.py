"""``fedmq ledger``: the text, the JSON, and a repaired run that resumes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner

from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.entries import MESSAGES, PAYLOAD, Ended, segment_path
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.records import scan
from fedmq.broker.wire.addresses import AGGREGATOR
from fedmq.broker.wire.encoding import encode_frame
from fedmq.broker.wire.schema import Hello
from fedmq.nodes.cli.main import main

RUN = Path(__file__).parents[2] / "golden" / "traces" / "0.2.0" / "fedavg-buffered"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def fedmq(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["ledger", *map(str, words)])
    return result.exit_code, result.output


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "ledger").iterdir())}


def test_a_sound_ledger(run: Path) -> None:
    for folder in (run, run / "ledger"):
        code, output = fedmq("check", folder)
        assert code == 0
        assert output.endswith("sound\n")
        assert json.loads(fedmq("check", folder, "--json")[1])["sound"] is True
    code, output = fedmq("repair", run, "--yes")
    assert code == 0
    assert output.endswith("nothing to repair\n")


def test_a_misspelled_command_is_one_sentence_with_the_choices() -> None:
    sentence = "fedmq: ledger: there is no command 'chekc' (did you mean 'check'?); choose from "
    assert fedmq("chekc") == (2, sentence + "check, repair\n")


def test_no_ledger_is_one_sentence(tmp_path: Path) -> None:
    for command in ("check", "repair"):
        code, output = fedmq(command, tmp_path)
        assert code == 2
        assert output.startswith("fedmq: expected a run's folder with a ledger in it")


def test_damaged_entries_are_listed_and_cut_only_with_yes(run: Path) -> None:
    path = segment_path(run / "ledger", MESSAGES, 0)
    records = list(scan(path))
    flip(path, records[20].end - 1)
    before = files(run)
    code, output = fedmq("check", run)
    assert code == 1
    assert f"damaged: {path.name}, bytes {records[20].offset:,} to" in output
    assert "lost: entr" in output
    assert "unusable after it:" in output
    assert "needs them; it would resume from entry" in output
    assert f"`fedmq ledger repair {run}`" in output
    code, output = fedmq("repair", run)
    assert code == 1
    assert f"truncate {path.name} at byte {records[20].offset:,}" in output
    assert output.endswith("nothing was changed; add --yes to make these changes\n")
    assert files(run) == before
    facts = json.loads(fedmq("repair", run, "--json")[1])
    assert facts["done"] is False
    assert [each["action"] for each in facts["steps"]] == ["cut"]
    assert {"entry", "kind", "id", "from"} <= set(facts["behind"]["entries"][0])
    assert fedmq("repair", run, "--yes")[0] == 0
    assert fedmq("check", run)[0] == 0
    kept = files(run)[f"{path.name}.cut-{records[20].offset}"]
    assert files(run)[path.name] + kept == before[path.name]


def test_a_damaged_blob_is_listed_with_the_messages_that_name_it(run: Path) -> None:
    path = segment_path(run / "ledger", PAYLOAD, 0)
    record = next(each for each in scan(path) if each.data_length > 100)
    flip(path, record.end - 1)
    code, output = fedmq("check", run)
    assert code == 1
    assert "no unfinished message needs it" in output
    lost = json.loads(fedmq("check", run, "--json")[1])["blobs"]["lost"]
    assert (lost[0]["segment"], lost[0]["offset"]) == (path.name, record.offset)
    assert lost[0]["messages"]
    assert fedmq("repair", run, "--yes")[0] == 0
    assert fedmq("check", run)[0] == 0


def test_clients_states_of_tasks_that_are_cut_are_set_aside(run: Path) -> None:
    states = run / "clients" / "r" / "identity" / "client-3"
    states.mkdir(parents=True)
    path = segment_path(run / "ledger", MESSAGES, 0)
    flip(path, list(scan(path))[20].end - 1)
    cut = json.loads(fedmq("check", run, "--json")[1])["entries"]
    earlier, later = states / f"{cut - 1:012d}.state", states / f"{cut:012d}.state"
    for each in (earlier, later):
        each.write_bytes(b"state")
    assert str(later) in fedmq("repair", run)[1].replace("\n", "")
    assert later.exists()
    assert fedmq("repair", run, "--yes")[0] == 0
    assert sorted(p.name for p in states.iterdir()) == [earlier.name, f"{later.name}.set-aside"]


# ---- with real processes

SETTINGS = [
    *("run.id=r", "run.versions=12", "run.evaluate_every=0", "problem.clients=4"),
    *("schedule.size=2", "schedule.concurrency=2", "algorithm.epochs=1", "run.checkpoint_s=0"),
]


class Nodes:
    """A broker, an aggregator, a worker and an evaluator, started by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.started: list[subprocess.Popen[bytes]] = []

    def broker(self) -> subprocess.Popen[bytes]:
        return self._start("broker", "--bind", self.endpoint, "--run", "run", "--once")

    def others(self) -> None:
        settings = [word for each in SETTINGS for word in ("--set", each)]
        link = ("--connect", self.endpoint)
        self._start("aggregator", *link, *settings, "--run", "agg")
        self._start("worker", *link, "--clients", "0-3", "--state", "w", "--name", "w")
        self._start("worker", *link, "--evaluator", "--state", "e", "--name", "e")

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{words[0]}.out").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedmq.nodes", *words],
                cwd=self.folder,
                stdout=out,
                stderr=out,
            )
        self.started.append(process)
        return process

    def kill(self) -> None:
        for process in self.started:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.started.clear()


@pytest.mark.end_to_end
def test_a_repaired_run_resumes_to_its_end(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    nodes = Nodes(tmp_path)
    ledger = tmp_path / "run" / "ledger"
    try:
        nodes.broker()
        nodes.others()
        deadline = time.monotonic() + 60
        while len(list(read_entries(ledger))) < 40:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        nodes.kill()
        path = segment_path(ledger, MESSAGES, 0)
        flip(path, list(scan(path))[30].end - 1)
        refused = nodes.broker()
        assert refused.wait(30) == 2
        assert b"`fedmq ledger check run/ledger`" in (tmp_path / "broker.out").read_bytes()
        assert fedmq("repair", tmp_path / "run", "--yes")[0] == 0
        broker = nodes.broker()
        nodes.others()
        assert broker.wait(90) == 0
    finally:
        nodes.kill()
    try:
        entries = list(read_entries(ledger))
    except LedgerError as error:
        pytest.fail(str(error))
    assert isinstance(entries[-1], Ended)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["versions"] == 12
    assert fedmq("check", tmp_path / "run")[0] == 0


HELLO = Hello(node=AGGREGATOR, role=AGGREGATOR, session="s", run="r", config="c", total_clients=1)
FAILING = """
import os, sys
from fedmq.broker.router import BrokerServer
from fedmq.nodes.cli.main import main
def fail(fd): raise OSError(5, "Input/output error")
serve = BrokerServer.serve
def fail_while_serving(*args, **named):
    os.fsync = fail
    return serve(*args, **named)
BrokerServer.serve = fail_while_serving
main(["broker", "--bind", sys.argv[1], "--run", "run", "--durability", "power"])
"""


@pytest.mark.end_to_end
def test_a_broker_whose_device_fails_ends_with_the_place(tmp_path: Path) -> None:
    endpoint = Nodes(tmp_path).endpoint
    broker = subprocess.Popen(
        [sys.executable, "-P", "-c", FAILING, endpoint],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.connect(endpoint)
        peer.send(encode_frame(HELLO))  # it opens the run, and syncs that
        try:
            errors = broker.communicate(timeout=40)[1]
        finally:
            broker.kill()
    assert broker.returncode == 1
    last = errors.splitlines()[-1]
    expected = (
        "fedmq: stopped serving, the ledger failed: cannot sync: Input/output error (at messages"
    )
    assert last.startswith(expected)
