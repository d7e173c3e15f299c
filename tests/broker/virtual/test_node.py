"""The virtual port: programs that block, in greenlets, on a virtual network."""

import contextlib
import gc

import pytest
from msgspec.structs import replace

from fedmq.broker.errors import LinkClosed, RunOver
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.network import Faults
from fedmq.broker.wire.schema import CHUNK_BYTES, Post
from tests.broker.loops import AGGREGATOR, WORKER, get, kinds, message
from tests.broker.net import model
from tests.broker.virtual.world import World


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def note(number, *blobs):
    return message("agg", "client/3", *blobs, number=number, n=number)


def echo(link):
    """Answer each note by one; end with the run."""
    with contextlib.suppress(RunOver):
        while True:
            task = get(link)
            number = task.message.body["n"]
            link.post(message("w1", "aggregator", number=number), consumes=(task.seq,))


def end(world, agg):
    """End the run, and wait until the aggregator knows."""
    agg.over("done")
    with pytest.raises(RunOver, match="done"):
        get(agg, "never")


def test_a_program_that_blocks_runs_in_virtual_time(world, tmp_path):
    agg, _ = world.link(AGGREGATOR)
    port = world.start(WORKER, echo)
    weights = model(2 * CHUNK_BYTES + 5)
    agg.post(note(7, weights), [weights])
    assert get(agg).message.id == "w1/7"
    end(world, agg)
    world.until(lambda: not port.up)
    assert port.posted == ["w1/7"] == port.acknowledged
    assert kinds(tmp_path)[-2:] == ["note", "note"]


def test_a_blob_is_fetched_while_the_program_waits(world):
    weights = model(3 * CHUNK_BYTES + 5)
    found = []

    def read(link):
        task = get(link)
        found.append(bytes(task.read(0)))
        found.append(b"".join(task.chunks(0)))

    agg, _ = world.link(AGGREGATOR)
    world.start(WORKER, read)
    agg.post(note(0, weights), [weights])
    world.until(lambda: len(found) == 2)
    assert found == [weights, weights]


def test_an_error_of_a_program_is_raised_where_the_network_is_stepped(world):
    exits = []

    def fail(link):
        raise ValueError("in the program")

    world.link(AGGREGATOR)
    port = world.start(WORKER, fail)
    port.on_exit = lambda: exits.append(port.up)
    with pytest.raises(ValueError, match="in the program"):
        world.run(5.0)
    world.run(1.0)
    assert exits == [False]


def test_the_link_goes_on_while_its_program_works(world, tmp_path):
    """It answers, and keeps its lease, as the thread of a live link does."""
    weights = model(2 * CHUNK_BYTES)
    times = []

    def work(link):
        link.post(message("w1", "aggregator", weights), [weights])
        link.flush()
        times.append(world.network.now)
        with link.away():
            port.pass_time(60.0)
        times.append(world.network.now)
        link.pause(0.5)

    agg, _ = world.link(AGGREGATOR)
    port = world.start(WORKER, work)
    task = get(agg)
    world.run(50.0)
    assert bytes(task.read(0)) == weights
    assert world.network.now < times[0] + 60.0
    world.until(lambda: not port.up)
    world.run(1.0)
    assert times[1] - times[0] == pytest.approx(60.0)
    assert kinds(tmp_path).count("left") == 1  # by its goodbye


def test_other_programs_wake_a_link_that_waits(world):
    links = []

    def wait(link):
        links.append(link)
        with contextlib.suppress(LinkClosed):
            link.get()

    world.link(AGGREGATOR)
    port = world.start(WORKER, wait)
    world.until(lambda: links)
    world.run(0.3)
    links[0].hand_in(message("w1", "aggregator", number=5))
    world.until(lambda: port.acknowledged == ["w1/5"])
    links[0].stop()
    world.run(0.0)
    assert not port.up


@pytest.mark.parametrize("frames", range(1, 8))
def test_a_process_that_dies_right_after_a_frame_has_no_further_effect(world, tmp_path, frames):
    sent, after = [], []

    def post(link):
        try:
            for number in range(5):
                link.post(message("w1", "aggregator", number=number))
                link.pause(0.01)
            link.flush()
        finally:
            after.append(port.up)
            link.post(message("w1", "aggregator", number=99))

    def doomed(frame):
        sent.append(frame)
        return len(sent) == frames

    world.link(AGGREGATOR)
    port = world.start(WORKER, post)
    port.doomed = doomed
    exits = []
    port.on_exit = lambda: exits.append(port.up)
    world.run(15.0)
    assert exits == [False]
    assert len(sent) == frames
    posts = [frame for frame in sent if isinstance(frame, Post)]
    assert len(port.posted) == len(posts)
    if posts:
        assert after == [False]
    assert kinds(tmp_path).count("note") == len(posts), "what was sent before its death arrives"


def test_a_process_that_dies_while_it_works_is_ended(world):
    after = []

    def work(link):
        try:
            port.pass_time(1e9)
        finally:
            after.append(port.up)

    world.link(AGGREGATOR)
    port = world.start(WORKER, work)
    world.run(2.0)
    sent = []
    port.doomed = lambda frame: sent.append(frame) or len(sent) == 2
    world.until(lambda: not port.up)
    assert after == [False]
    assert len(sent) == 2


def test_a_suspended_process_handles_what_has_arrived_once_it_goes_on(world, tmp_path):
    agg, _ = world.link(AGGREGATOR)
    port = world.start(WORKER, echo)
    get(agg, "joined")
    port.pause()
    agg.post(note(1))
    world.run(5.0)
    assert not port.posted
    port.resume()
    assert get(agg).message.id == "w1/1"
    port.pause()
    world.run(105.0)
    assert kinds(tmp_path).count("left") == 1, "it was silent for too many leases"
    port.resume()
    agg.post(note(2))
    assert get(agg).message.id == "w1/2"


def test_a_suspended_process_can_be_killed(world):
    agg, _ = world.link(AGGREGATOR)
    port = world.start(WORKER, echo)
    get(agg, "joined")
    port.pause()
    agg.post(note(1))
    world.run(1.0)
    port.kill()
    port.resume()
    world.run(20.0)
    assert not port.posted


def test_a_program_that_works_beyond_its_suspension_ends_its_work_at_once_afterwards(world):
    times = []

    def work(link):
        times.append(world.network.now)
        port.pass_time(1.0)
        times.append(world.network.now)

    world.link(AGGREGATOR)
    port = world.start(WORKER, work)
    world.until(lambda: times)
    port.pause()
    world.run(3.0)
    port.resume()
    world.run(0.0)
    assert times[1] - times[0] == pytest.approx(3.0)


def test_a_connection_is_cut_and_partitioned_under_a_program(world):
    agg, _ = world.link(AGGREGATOR)
    port = world.start(WORKER, echo)
    for number in range(6):
        agg.post(note(number))
        world.network.cut(port)
        if number == 3:
            world.network.partition("w1", 15.0)
    got = [get(agg).message.id for _ in range(6)]
    assert got == [f"w1/{number}" for number in range(6)]


def test_a_clock_that_runs_fast_makes_deadlines_early(world):
    times = []

    def wait(link):
        times.append((world.network.now, port.clock()))
        link.pause(10.0)
        times.append((world.network.now, port.clock()))

    machine = Machine(world.network, ahead_s=3600.0, rate=2.0)
    world.link(AGGREGATOR)
    port = world.start(WORKER, wait, machine=machine)
    world.run(30.0)
    (began, clock), (ended, later) = times
    assert ended - began == pytest.approx(5.0, abs=0.01)
    assert later - clock == pytest.approx(10.0, abs=0.01)


def test_state_of_the_thread_does_not_leak_between_programs(world):
    """As torch's modes would, which are the thread's and not the greenlet's."""
    mode = ["hub"]

    @contextlib.contextmanager
    def switching():
        mine, mode[0] = mode[0], "hub"
        yield
        mode[0] = mine

    def program(name):
        def run(link):
            mode[0] = name
            for _ in range(5):
                link.pause(0.1)
                assert mode[0] == name
            mode[0] = "hub"

        return run

    world.link(AGGREGATOR)
    ports = [
        world.start(replace(WORKER, node=name, clients=()), program(name), switching=switching)
        for name in ("w1", "w2")
    ]
    while any(port.up for port in ports):
        assert mode[0] == "hub"
        world.network.step()


def history(folder, seed):
    world = World(folder, seed, Faults(loss=0.1, duplicate=0.1, reorder=0.1, delay_s=0.05))
    agg, agg_port = world.link(AGGREGATOR)
    port = world.start(WORKER, echo)
    for number in range(10):
        agg.post(note(number))
        world.run(0.3)
        world.network.cut(port)
    got = [get(agg).message.id for _ in range(10)]
    end(world, agg)
    world.close()
    return got, world.network.now, agg_port.acknowledged


def test_a_history_depends_only_on_its_seed(tmp_path):
    first = history(tmp_path / "a", 1)
    assert first == history(tmp_path / "b", 1)
    assert first[0] == [f"w1/{number}" for number in range(10)]
    assert first != history(tmp_path / "c", 2)


def test_a_delivery_out_of_order_is_found(world):
    agg, _ = world.link(AGGREGATOR)
    world.start(WORKER, echo)
    assert agg.wait(5.0)
    agg._inbox.append(agg._inbox[-1])
    with pytest.raises(AssertionError, match="delivery 2 comes after 2"):
        world.run(5.0)


def test_a_delivery_that_was_never_received_is_found(world):
    agg, _ = world.link(AGGREGATOR)
    world.start(WORKER, echo)
    assert agg.wait(5.0)
    agg._inbox.append(replace(agg._inbox[-1], seq=100))
    with pytest.raises(AssertionError, match="delivery 100 is in the inbox"):
        world.run(5.0)


def test_programs_that_are_dropped_with_their_network_have_no_effect(tmp_path):
    world = World(tmp_path)
    after = []

    def wait(link):
        try:
            link.get()
        finally:
            after.append(port.up)

    world.link(AGGREGATOR)
    port = world.start(WORKER, wait)
    world.run(2.0)
    now, port._program = world.network.now, None
    gc.collect()
    assert after == [False]
    assert world.network.now == now
    world.close()
