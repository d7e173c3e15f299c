"""A virtual broker: turns, crashes in the middle of them, full and failing disks, pauses."""

import random

import pytest
from msgspec.structs import replace

from fedmq.broker.errors import NoSpace
from fedmq.broker.ledger import blob_store
from fedmq.broker.ledger.entries import Accepted, Opened
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.recovery import open_broker
from fedmq.broker.settings import BrokerSettings, Continuation, LedgerSettings
from fedmq.broker.virtual.broker import VirtualBroker
from fedmq.broker.virtual.disk import DiskFault, VirtualDisk
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.network import VirtualNetwork
from fedmq.broker.wire.encoding import decode_frame, encode_message
from fedmq.broker.wire.schema import (
    Ack,
    Blob,
    Chunk,
    ChunkRequest,
    Deliver,
    Heartbeat,
    Hello,
    Message,
    Post,
    StorageFull,
    UnknownSession,
    Welcome,
    digest,
)

AGG = b"agg#1"
HELLO = Hello(
    node="agg", role="aggregator", session="s1", key="k", run="r", config="", total_clients=10
)

TIMER = {"token": "t", "after_s": 2.0}


class Wire(VirtualNetwork):
    """A network whose nodes are the test: it sends their frames, and keeps what they receive."""

    def __init__(self):
        super().__init__(random.Random(1))  # noqa: S311 - a test's dice
        self.received, self.buffers = [], []

    def to_node(self, peer, header, buffers):
        self.received.append(decode_frame(header))
        self.buffers.append([bytes(each) for each in buffers])

    def is_up(self, peer):
        return True

    def run(self, seconds):
        until = self.now + seconds
        self.at(until, lambda: None)
        while self.now < until:
            self.step()

    def take(self, kind=object):
        found = [frame for frame in self.received if isinstance(frame, kind)]
        self.received.clear()
        return found


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def start(wire, tmp_path):
    """Return a function that starts a broker, and opens a run."""

    def start(durability="process", **more):
        settings = LedgerSettings(durability, share_files=False)
        broker = VirtualBroker(wire, tmp_path, BrokerSettings(10.0, 1.0), settings, **more)
        broker.receive(AGG, HELLO, ())
        wire.run(0.1)
        assert wire.take(Welcome)
        return broker

    return start


def post(broker, n, to="aggregator", **body):
    message = Message(kind="note", id=f"agg/{n}", run="r", sender="agg", to=to, body=body)
    broker.receive(AGG, Post(n=n, message=encode_message(message)), ())


def notes(folder):
    messages = [each.read() for each in read_entries(folder) if isinstance(each, Accepted)]
    return [each.id for each in messages if each.kind == "note"]


def reconnect(broker, wire, first=0):
    """Say Hello again; ``first`` is the oldest post without an acknowledgment."""
    broker.receive(AGG, replace(HELLO, first=first), ())
    wire.run(0.1)
    wire.take()


def test_frames_that_arrive_together_are_handled_in_one_turn(start, wire):
    broker = start()
    broker.batch_s = 0.05
    turns = []
    turn = broker.driver.turn
    broker.driver.turn = lambda events: turns.append(len(events)) or turn(events)
    for number in range(4):
        post(broker, number)
    wire.run(0.2)
    assert turns[0] == 4
    assert [frame.upto for frame in wire.take(Ack)] == [3]


def test_a_timer_is_due_on_the_clock_of_its_machine(start, wire):
    start_at = wire.now
    broker = start(machine=Machine(wire, ahead_s=-500.0, rate=0.5))
    post(broker, 0, to="timer", **TIMER)
    wire.run(3.0)
    assert not wire.take(Deliver)
    wire.run(1.5)
    assert wire.take(Deliver)
    assert broker.driver._clock() == pytest.approx(wire.now * 0.5 - 500.0)
    assert wire.now - start_at < 6


@pytest.mark.parametrize("power", [False, True], ids=["death", "power failure"])
def test_nothing_that_was_acknowledged_is_missing_after_a_crash_in_any_operation(
    start, wire, tmp_path, power
):
    broker = start("power")
    acknowledged = 0
    for number in range(40):
        broker.disk.crash_at(broker.disk.operations + number % 5)
        broker.loses_power = power
        post(broker, number)
        wire.run(1.2)
        for ack in wire.take(Ack):
            acknowledged = max(acknowledged, ack.upto + 1)
        broker.disk.crash_at(-1)
        if not broker.up:
            broker.start()
        assert notes(tmp_path)[:acknowledged] == [f"agg/{each}" for each in range(acknowledged)]
        reconnect(broker, wire, number)
        post(broker, number)
        wire.run(0.2)
    assert broker.disk.made["broker killed in a disk operation"] > 20
    assert notes(tmp_path) == [f"agg/{each}" for each in range(40)]


def test_a_crash_before_the_answer_leaves_the_message_in_the_ledger(start, wire, tmp_path):
    broker = start()
    broker.crash_at_send = 0
    post(broker, 0)
    wire.run(0.2)
    assert not broker.up
    assert wire.take() == []
    assert notes(tmp_path) == ["agg/0"]
    broker.start()
    broker.receive(AGG, Heartbeat(), ())
    wire.run(0.1)
    assert wire.take() == [UnknownSession()]


def test_nodes_wait_for_a_full_disk(start, wire, tmp_path):
    broker = start()
    broker.disk.full = True
    post(broker, 0)
    wire.run(0.6)
    assert wire.take() == []
    post(broker, 1)
    wire.run(0.1)
    assert [type(frame) for frame in wire.take()] == [StorageFull]
    broker.disk.full = False
    wire.run(0.6)
    assert [frame.upto for frame in wire.take(Ack)] == [0]
    assert notes(tmp_path) == ["agg/0"]


def test_a_broker_that_its_ledger_stops_starts_again(start, wire, tmp_path):
    broker = start()
    broker.disk.fail_at(DiskFault.WRITE_ERROR, broker.disk.met[DiskFault.WRITE_ERROR])
    broker.disk.fail_at(DiskFault.WRITE_ERROR, broker.disk.met[DiskFault.WRITE_ERROR] + 1)
    post(broker, 0)
    wire.run(0.01)
    assert not broker.up
    assert "stopped serving, the ledger failed: cannot write" in broker.failures[0]
    wire.run(5.0)
    assert broker.up
    reconnect(broker, wire)
    post(broker, 0)
    wire.run(0.2)
    assert notes(tmp_path) == ["agg/0"]


def test_a_broker_that_cannot_open_its_ledger_tries_again(start, wire, tmp_path):
    broker = start()
    broker.crash()
    broker.disk.rates = {DiskFault.READ_ERROR: 1.0}
    broker.start()
    assert not broker.up
    wire.run(10.0)
    assert len(broker.failures) > 2
    assert {"cannot read" in each for each in broker.failures} == {True}
    broker.disk.rates = {}
    wire.run(2.1)
    assert broker.up
    assert sum(isinstance(each, Opened) for each in read_entries(tmp_path)) == 1


def test_a_blob_that_cannot_be_read_for_a_while_is_requested_again(start, wire, monkeypatch):
    monkeypatch.setattr(blob_store, "_RECENT_BYTES", 0)
    broker, data = start(), bytes(range(200)) * 10
    message = Message(
        kind="note", id="a", run="r", sender="agg", to="client/0", blobs=(Blob.of(data),)
    )
    broker.receive(AGG, Post(message=encode_message(message), inline=(0,)), [data])
    request = ChunkRequest(owner="agg", digest=digest(data), start=0, size=len(data))
    wire.run(1.0)
    broker.disk.rates = {DiskFault.READ_ERROR: 1.0}
    for _ in range(4):
        broker.receive(AGG, request, ())
        wire.run(0.1)
    assert not wire.take(Chunk)
    broker.disk.rates = {}
    broker.receive(AGG, request, ())
    wire.run(0.1)
    assert wire.take(Chunk)
    assert wire.buffers[-1] == [data]
    broker.disk.rates = {DiskFault.READ_ERROR: 1.0}
    for _ in range(5):
        broker.receive(AGG, request, ())
        wire.run(0.1)
    assert wire.take(Chunk), "it is missing after five errors in a row"
    assert wire.buffers[-1] == []


def test_a_paused_broker_handles_what_has_arrived_when_it_continues(start, wire, tmp_path):
    broker = start()
    broker.pause()
    post(broker, 0)
    wire.run(60.0)
    assert wire.take() == []
    broker.resume()
    wire.run(0.2)
    assert [frame.upto for frame in wire.take(Ack)] == [0]
    broker.pause()
    post(broker, 1)
    broker.crash()
    broker.start()
    wire.run(1.0)
    assert notes(tmp_path) == ["agg/0"]


def test_the_state_is_checked_after_each_turn(start, wire):
    broker = start()
    broker.core._mailboxes.runs["r"].hosts._clients.assign(1, 1, "w1")
    post(broker, 0)
    with pytest.raises(AssertionError, match=r"addresses of \{'w1'\} are hosted"):
        wire.run(1.0)


def test_a_start_that_fails_leaves_the_ledger_free_and_unchanged(tmp_path):
    disk, clock = VirtualDisk(random.Random(1)), Machine(Wire()).clock()  # noqa: S311 - dice
    open_broker(tmp_path, BrokerSettings(), clock, disk=disk)[0].close()
    ledger = Ledger(tmp_path, disk=disk)
    ledger.append(Opened(seq=0, at=0.0, run="r", config="c", total_clients=1))
    ledger.close()
    disk.full = True
    continuation = Continuation("r", "c")
    with pytest.raises(NoSpace):
        open_broker(tmp_path, BrokerSettings(), clock, disk=disk, continuation=continuation)
    assert len(list(read_entries(tmp_path))) == 1
    disk.full = False
    ledger, _ = open_broker(tmp_path, BrokerSettings(), clock, disk=disk, continuation=continuation)
    assert ledger.next_seq == 2
    ledger.close()
