"""Tasks that other processes train, and the order in which they do."""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from fedmq.algorithms.allowed import NOTHING
from fedmq.algorithms.base import Payload
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.values import ReturnedError
from fedmq.broker.rejections import Code
from fedmq.nodes.errors import RunFailed
from fedmq.nodes.process.logs import traceback_text
from fedmq.nodes.process.signals import this_process
from fedmq.nodes.simulation import process_trainer
from fedmq.nodes.simulation.process_trainer import ProcessTrainer
from fedmq.nodes.simulation.trainers import InlineTrainer, QueuedTrainer
from fedmq.nodes.simulation.training_jobs import Recipe, encode_job, read_answer, run_job
from fedmq.nodes.worker.core import Evaluate, Failed
from fedmq.nodes.worker.training import RemoteError, compute
from tests.nodes.simulation.training import (
    CASES,
    actions_of,
    bits,
    failing,
    recipe_of,
    results,
    setup_of,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def one_thread():
    """Trainers set the number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let other processes import what the configurations of the tests name."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def computed(action, setup):
    return read_answer(run_job(recipe_of(setup), encode_job(action)))


# ---- as bytes


@pytest.mark.parametrize("case", CASES)
def test_a_task_gives_the_same_bytes_from_a_parcel(case):
    setup = setup_of(case)
    for action in actions_of(setup):
        assert bits(computed(action, setup)) == bits(compute(action, setup, "cpu"))


def test_a_structured_codec_acts_on_the_training():
    setup, free = setup_of("structured"), setup_of("plain")
    (action, *_) = actions_of(setup)
    other = msgspec.structs.replace(action, uplink_seed=1)
    assert bits(computed(action, setup)) != bits(computed(other, setup))
    assert bits(computed(action, free)) == bits(computed(other, free))


# ---- errors


@pytest.mark.parametrize("client", range(4))
def test_an_error_in_a_parcel_gives_the_same_failure(client):
    setup, action = failing(client)
    with this_process.taken(watchdog=False), pytest.raises(Exception) as live:  # noqa: PT011 - any
        compute(action, setup, "cpu")
    with pytest.raises(RemoteError) as found:
        computed(action, setup)
    error = found.value
    # Without this test's own frame, which is a user's code.
    wanted = Failed.of(live.value.with_traceback(live.tb.tb_next), setup)
    assert Failed(error.reason, error.code, error.where) == wanted
    assert error.name == type(live.value).__name__
    shown = traceback_text(error)
    assert re.search(r"in read_answer\nRemoteError: .*\ncaused by\n.* in run_job\n", shown)
    assert shown.endswith(traceback_text(live.value).split(" in compute\n")[-1])


def test_an_invalid_value_in_a_parcel_is_a_returned_error():
    setup, action = failing(6)
    evaluation = Evaluate(action.task, seed=1)
    with pytest.raises(ReturnedError) as live:
        compute(evaluation, setup, "cpu")
    with pytest.raises(ReturnedError) as found:
        computed(evaluation, setup)
    assert str(found.value) == str(live.value)


@dataclasses.dataclass(frozen=True)
class Complex(FedAvg):
    """Sends or keeps tensors of a dtype that no codec encodes."""

    name = "complex"

    keeps: bool = False

    def train(self, task, client):
        trained = super().train(task, client)
        odd = Payload({"odd": torch.zeros(2, dtype=torch.complex64)})
        if self.keeps:
            return dataclasses.replace(trained, local_state=odd)
        return dataclasses.replace(trained, payload=odd)


@pytest.mark.parametrize("keeps", [False, True])
def test_tensors_that_cannot_be_encoded_fail_the_task(keeps):
    algorithm = {"name": f"{__name__}:Complex", "keeps": keeps}
    setup = setup_of(algorithm=algorithm)
    (action, *_) = actions_of(setup)[:1]
    with pytest.raises(RemoteError) as found:
        computed(action, setup)
    assert "cannot encode a tensor of dtype torch.complex64" in found.value.reason
    assert found.value.code == (Code.TRAINING_FAILED if keeps else Code.UNUSABLE)


def test_a_set_up_that_fails_ends_the_run():
    setup = setup_of()
    (action, *_) = actions_of(setup)
    recipe = Recipe(setup.config.to_toml(), NOTHING)
    with pytest.raises(RunFailed, match=r"^cannot set up a training process: .*Drawing.*allow"):
        read_answer(run_job(recipe, encode_job(action)))


# ---- in order


class Recorder(QueuedTrainer):
    """Submits jobs to nobody.

    jobs: the clients of submitted jobs, in order.
    """

    def __init__(self, ahead, setup):
        super().__init__(ahead)
        self.jobs, self._setup = [], setup

    def submit(self, job, who):
        answer = run_job(recipe_of(self._setup), job)
        self.jobs.append(msgspec.msgpack.decode(job[0])["client"])
        future = Future()
        future.set_result(answer)
        return future

    def close(self):
        pass


@pytest.fixture
def recorder():
    return Recorder(2, setup_of())


def started(trainer, dues):
    """Start a task of client 0, 1, ... for each due time; return what waits for each."""
    (action, *_) = actions_of(setup_of())
    actions = [msgspec.structs.replace(action, client=k) for k in range(len(dues))]
    return [trainer.start(*each) for each in zip(actions, dues, strict=True)]


def test_tasks_are_computed_in_the_order_in_which_they_are_due(recorder):
    waits = started(recorder, [5.0, 3.0, 4.0, 1.0, 2.0])
    assert recorder.jobs == []
    waits[3]()
    assert recorder.jobs == [3, 4, 1]
    for index in (4, 1, 2, 0):
        waits[index]()
    assert recorder.jobs == [3, 4, 1, 2, 0]


def test_a_result_that_is_asked_for_early_is_computed_at_once(recorder):
    waits = started(recorder, [1.0, 2.0, 3.0, 4.0, 5.0])
    waits[4]()
    assert recorder.jobs == [4, 0, 1]
    for index in (3, 2, 1, 0):
        waits[index]()
    assert sorted(recorder.jobs) == [0, 1, 2, 3, 4]


def test_a_task_that_is_given_up_is_not_computed(recorder):
    waits = started(recorder, [1.0, 2.0, 3.0, 4.0, 5.0])
    del waits[2]
    waits[0]()
    assert recorder.jobs == [0, 1, 3]
    del waits[1], waits[1]  # those of clients 1 and 3, which are submitted
    waits[1]()
    assert recorder.jobs == [0, 1, 3, 4]


def test_a_result_is_returned_once(recorder):
    (wait,) = started(recorder, [1.0])
    wait()
    with pytest.raises(RuntimeError, match="taken before"):
        wait()


def test_tasks_that_wait_hold_no_copy_of_their_model(recorder):
    """The tasks of one version share its tensors until they are submitted."""
    waits = started(recorder, [float(k) for k in range(8)])
    held = [entry.action.task.payload for _, _, entry in recorder._waiting]
    assert len({id(each) for each in held}) == 1
    for wait in waits:
        wait()
        assert len(recorder._submitted) <= 2


def test_a_task_may_change_its_tensors_in_place():
    setup = setup_of(algorithm={"name": f"{__name__}:Careless"})
    (action, *_) = actions_of(setup)
    trainer = InlineTrainer(setup, "cpu")
    first, second = (trainer.start(action) for _ in range(2))
    assert bits(first()) == bits(second())


@dataclasses.dataclass(frozen=True)
class Careless(FedAvg):
    """Changes its task's weights in place."""

    name = "careless"

    def train(self, task, client):
        trained = super().train(task, client)
        for each in task.payload.weights.values():
            each.zero_()
        return trained


# ---- in processes


@pytest.fixture(scope="module")
def pool():
    """Return a trainer with four processes, for any set-up that a test gives it."""
    setup = setup_of()
    trainer = ProcessTrainer(setup.config, setup.config.allowed, 4)
    yield trainer
    trainer.close()


@pytest.mark.end_to_end
@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_same_bytes(pool, case):
    setup = setup_of(case)
    pool._recipe = recipe_of(setup)
    for each in pool.processes:
        os.kill(each.pid, signal.SIGINT)  # as Ctrl-C does in a terminal
    assert results(pool, setup) == results(InlineTrainer(setup, "cpu"), setup)


class Killed:
    """A process that is killed while it writes an answer."""

    pid = exitcode = None

    def __init__(self, pipe):
        self.sentinel, self._writer = os.pipe()
        self._pipe = pipe

    def serve(self):
        self._pipe.recv()
        os.write(self._pipe.fileno(), (1000).to_bytes(4, "big") + b"part")
        self.kill()

    def kill(self):
        if self.exitcode is None:
            self.exitcode = -signal.SIGKILL
            self._pipe.close()
            os.close(self._writer)

    def join(self):
        os.close(self.sentinel)


@pytest.mark.end_to_end
@pytest.mark.parametrize("kill", ["serve", "kill"])
def test_a_process_that_dies_while_it_writes_ends_the_run(monkeypatch, kill):
    monkeypatch.setattr(process_trainer, "preloading", contextlib.nullcontext)
    setup = setup_of()
    trainer = ProcessTrainer(setup.config, setup.config.allowed, 1)
    ours, theirs = multiprocessing.Pipe()
    process = Killed(theirs)
    trainer.give_jobs_to(process, ours)
    (first, second, *_) = [trainer.start(each) for each in actions_of(setup)]
    thread = threading.Thread(target=getattr(process, kill))
    thread.start()
    for wait in (first, second):
        with pytest.raises(RunFailed, match=r"^a training process was killed .*client 0"):
            wait()
    thread.join()
    trainer.close()


@pytest.mark.end_to_end
def test_closing_gives_up_tasks_that_are_in_progress(pool):
    setup, action = failing(7)
    trainer = ProcessTrainer(setup.config, setup.config.allowed, 1)
    waits = [trainer.start(action) for _ in range(4)]
    trainer.submit(encode_job(action), "client 7")  # which sleeps
    (process,) = trainer.processes
    trainer.close()
    assert process.exitcode == -signal.SIGKILL
    for wait in waits:
        with pytest.raises(RunFailed, match="have been ended"):
            wait()
    trainer.close()


@pytest.mark.end_to_end
@pytest.mark.parametrize(("client", "how"), [(4, "exited with 3"), (5, "was killed by SIGKILL")])
def test_a_process_that_dies_ends_the_run(client, how):
    setup, action = failing(client)
    trainer = ProcessTrainer(setup.config, setup.config.allowed, 1)
    wait = trainer.start(action)
    with pytest.raises(
        RunFailed, match=f"^a training process {how} during a task of client {client}"
    ):
        wait()
    with pytest.raises(RunFailed, match=how):
        trainer.start(action)()
    trainer.close()


SCRIPT = """
import sys, time
from fedmq.nodes.simulation import process_trainer
from fedmq.nodes.simulation.process_trainer import ProcessTrainer
from tests.nodes.simulation.training import actions_of, setup_of

if __name__ == "__main__":
    setup = setup_of()
    trainer = ProcessTrainer(setup.config, setup.config.allowed, 2)
    waits = [trainer.start(each) for each in actions_of(setup)]
    for wait in waits:
        wait()
    print(*(each.pid for each in trainer.processes), flush=True)
    time.sleep(60)
"""


@pytest.mark.end_to_end
def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = (sys.executable, "-P", script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        pids = [int(each) for each in parent.stdout.readline().split()]
        parent.kill()
    assert pids
    until = time.monotonic() + 20
    while any(map(runs, pids)):
        assert time.monotonic() < until
        time.sleep(0.01)


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
