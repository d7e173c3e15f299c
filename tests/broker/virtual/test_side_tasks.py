"""Tasks beside a program: they wait for virtual times, use the link, and end with the process."""

import math
import os

import greenlet
import pytest

from fedmq.broker.virtual.node import Killed
from fedmq.broker.virtual.plain_disk import PlainDisk
from fedmq.broker.wire.schema import CHUNK_BYTES
from tests.broker.loops import AGGREGATOR, WORKER, get, message
from tests.broker.net import model
from tests.broker.virtual.world import World


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def idle(link):
    get(link, "never")


def at(world, seconds):
    return world.began + seconds


@pytest.fixture
def port(world):
    """Return the port of an idle program, whose tasks a test starts."""
    world.link(AGGREGATOR)
    port = world.start(WORKER, idle)
    world.run(1.0)
    world.began = world.network.now
    return port


def sleeper(world, port, log, name, *times):
    def work():
        for each in times:
            port.tasks.sleep_until(at(world, each))
            log.append((name, round(world.network.now - world.began, 6)))

    return work


def test_tasks_run_in_the_order_of_their_times(world, port):
    log = []
    port.tasks.start_at(at(world, 0.5), sleeper(world, port, log, "a", 1.0, 4.0))
    port.tasks.start_at(at(world, 0.1), sleeper(world, port, log, "b", 2.0, 3.0))
    world.run(5.0)
    assert log == [("a", 1.0), ("b", 2.0), ("b", 3.0), ("a", 4.0)]


def test_a_killed_process_ends_its_tasks_and_starts_no_more(world, port):
    log, ended = [], []

    def work():
        try:
            sleeper(world, port, log, "a", 1.0, 4.0)()
        except Killed:
            ended.append(world.network.now)
            raise

    port.tasks.start_at(at(world, 0.0), work)
    port.tasks.start_at(at(world, 3.0), sleeper(world, port, log, "late", 3.5))
    world.run(2.0)
    port.kill()
    world.run(4.0)
    assert log == [("a", 1.0)]
    assert len(ended) == 1


def test_what_is_due_while_the_process_is_suspended_happens_afterwards(world, port):
    log = []
    port.tasks.start_at(at(world, 0.0), sleeper(world, port, log, "a", 1.0, 1.5))
    port.tasks.start_at(at(world, 0.6), sleeper(world, port, log, "b", 0.7))
    world.run(0.5)
    port.pause()
    world.run(2.0)
    assert log == []
    port.resume()
    world.run(0.1)
    assert sorted(log) == [("a", 2.5), ("a", 2.5), ("b", 2.5)]


def test_a_task_that_sleeps_for_ever_is_ended_with_its_process(world, port):
    port.tasks.start_at(at(world, math.inf), lambda: pytest.fail("it starts never"))
    port.tasks.start_at(at(world, 0.0), lambda: port.tasks.sleep_until(math.inf))
    world.run(1.0)
    assert world.network.now < math.inf
    port.kill()


def test_an_error_of_a_task_is_raised_where_the_network_is_stepped(world, port):
    def work():
        raise ValueError("in a task")

    port.tasks.start_at(at(world, 0.5), work)
    with pytest.raises(ValueError, match="in a task"):
        world.run(1.0)


def test_a_task_waits_for_its_link_while_the_program_does(world):
    weights, found = model(2 * CHUNK_BYTES + 5), []
    agg, _ = world.link(AGGREGATOR)

    def program(link):
        task = get(link)
        port.tasks.start_at(world.network.now, lambda: found.append(bytes(task.read(0))))
        get(link, "never")

    port = world.start(WORKER, program)
    agg.post(message("agg", "client/3", weights), [weights])
    world.until(lambda: found)
    assert found == [weights]
    assert greenlet.getcurrent().parent is None


def test_a_plain_disk_closes_the_files_of_a_process_that_ends(tmp_path):
    disk = PlainDisk()
    kept, closed = (disk.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "ab")
    disk.writev(kept, [b"content"])
    disk.close(closed)
    disk.die()
    disk.die()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kept)
    assert (tmp_path / "a").read_bytes() == b"content"
