"""The loops when a broker, a node, the disk or a connection fails."""

import errno
import os
import time

import pytest
import zmq
from msgspec.structs import replace

import fedmq.broker.ledger.writer as ledger_module
from fedmq.broker.errors import Rejected
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.wire.encoding import encode_frame, encode_message
from fedmq.broker.wire.schema import (
    Chunk,
    ChunkRequest,
    Deliver,
    Done,
    Heartbeat,
    Post,
    Welcome,
    digest,
)
from tests.broker.loops import (
    AGGREGATOR,
    ANY,
    WORKER,
    Raw,
    get,
    kinds,
    linked,
    message,
    serving,
)

pytestmark = pytest.mark.end_to_end


def test_a_broker_and_its_nodes_continue_from_its_ledger(tmp_path):
    """Nodes are not restarted: their links find the broker at the same endpoint."""
    weights = os.urandom(400_000)
    with serving(tmp_path) as endpoint:
        agg, worker = NodeLink.connect(endpoint, AGGREGATOR), NodeLink.connect(endpoint, WORKER)
        agg.welcome()
        worker.welcome()
        agg.post(message("agg", "client/0", weights, number=0), [weights])
        agg.flush()
    agg.post(message("agg", "client/0", number=1))
    try:
        with serving(tmp_path, endpoint=endpoint):
            first, second = get(worker), get(worker)
            assert [each.message.id for each in (first, second)] == ["agg/0", "agg/1"]
            assert bytes(first.read(0)) == weights
            worker.post(message("w1", "aggregator"), (), (first.seq, second.seq))
            assert get(agg).message.sender == "w1"
    finally:
        for link in (worker, agg):
            link.close()
    assert kinds(tmp_path).count("joined") == 2  # both were there all the time


def test_a_broker_on_a_ledger_that_is_damaged_says_so_and_frees_its_port(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR):
        pass
    (path,) = tmp_path.glob("messages-*.log")
    whole = path.read_bytes()
    path.write_bytes(whole[:50] + b"x" + whole[51:])
    with pytest.raises(Exception, match=r"damaged record.*byte 16"):
        BrokerServer(endpoint, tmp_path)
    path.write_bytes(whole)
    BrokerServer(endpoint, tmp_path).close()


def test_a_node_that_was_started_again_takes_its_name_over_at_once(tmp_path):
    with serving(tmp_path) as endpoint, linked(endpoint, AGGREGATOR) as agg:
        with linked(endpoint, WORKER) as old:
            agg.post(message("agg", "client/0"))
            task = get(old)
            with linked(endpoint, replace(WORKER, session="s2")) as new:
                assert get(new).seq == task.seq
                with pytest.raises(Rejected, match="a newer session has taken over"):
                    old.get()
        assert get(agg, "left").message.body["interrupted"] == task.seq


def test_all_wait_for_a_full_disk_and_nothing_is_lost(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = BrokerSettings(lease_s=1.0, beat_s=0.2)
    with (
        serving(tmp_path, settings) as endpoint,
        linked(endpoint, AGGREGATOR) as agg,
        linked(endpoint, WORKER) as worker,
    ):
        with monkeypatch.context() as disk:
            disk.setattr(os, "writev", refuse)
            for number in range(3):
                agg.post(
                    message("agg", "client/0", b"%d" % number, number=number), [b"%d" % number]
                )
            agg.pause(1.3)  # longer than a lease
            assert agg.core.unacknowledged == 3
            assert kinds(tmp_path) == ["joined", "joined"]
        tasks = [get(worker) for _ in range(3)]
        assert [bytes(each.read(0)) for each in tasks] == [b"0", b"1", b"2"]
        agg.flush()
    entries = list(read_entries(tmp_path))
    assert [entry.seq for entry in entries] == list(range(len(entries)))
    assert kinds(tmp_path)[:5] == ["joined", "joined", "note", "note", "note"]


def test_stopping_a_broker_on_a_full_disk_loses_nothing_acknowledged(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with serving(tmp_path) as endpoint:
        agg = NodeLink.connect(endpoint, AGGREGATOR)
        agg.welcome()
        monkeypatch.setattr(os, "writev", refuse)
        agg.post(message("agg", "record"))
        agg.pause(0.3)
    monkeypatch.undo()
    try:
        with serving(tmp_path, endpoint=endpoint):
            agg.flush()
    finally:
        agg.close()
    assert kinds(tmp_path).count("note") == 1


# ---- one turn at a time


class Turns:
    """A broker whose clock and turns the test controls."""

    def __init__(self, folder, settings=None, keeping=None):
        self.server = BrokerServer(ANY, folder, settings, keeping)
        self.now = 1000.0
        self.server._driver._clock = lambda: self.now
        self.context = zmq.Context()
        self.nodes = {}

    def join(self, hello):
        self.nodes[hello.node] = Raw(self.context, self.server.endpoint)
        self.say(hello.node, hello)
        assert isinstance(self.hear(hello.node), Welcome)

    def put(self, name, frame, *buffers):
        """Send a frame, and wait until it has arrived."""
        self.nodes[name].send(encode_frame(frame), *buffers)
        time.sleep(0.02)

    def say(self, name, frame, *buffers):
        self.put(name, frame, *buffers)
        assert self.server._port.socket.poll(2000)
        self.server._turn()

    def hear(self, name):
        return self.nodes[name].answer()

    def close(self):
        self.context.destroy(linger=0)
        self.server.close()


@pytest.fixture
def turns(tmp_path):
    made = []

    def make(*args):
        made.append(Turns(tmp_path, *args))
        return made[-1]

    yield make
    for each in made:
        each.close()


def posted(sender, number, to, *blobs, **body):
    note = message(sender, to, *blobs, number=number, **body)
    return Post(n=number, message=encode_message(note), inline=tuple(range(len(blobs))))


def test_a_node_may_lapse_in_the_turn_in_which_a_timer_is_due(turns):
    """The broker finds its connection gone while earlier entries are being written."""
    room = turns(BrokerSettings(lease_s=1.0, beat_s=0.2))
    room.join(AGGREGATOR)
    room.join(WORKER)
    timer = {"token": "t", "after_s": 1.0}
    room.say("agg", posted("agg", 0, "timer", **timer))
    room.nodes["w1"].socket.close()
    while room.now < 1001.1:
        room.now += 0.15
        room.say("agg", Heartbeat())
    found = kinds(room.server._driver.ledger.folder)
    assert (found.count("tick"), found.count("left")) == (1, 1)


def test_a_request_for_a_blob_deleted_in_the_same_turn_does_not_end_the_broker(turns, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PAYLOAD_SEGMENT_BYTES", 1000)
    room = turns(None, LedgerSettings(retain_bytes=0))
    room.join(AGGREGATOR)
    room.join(WORKER)
    first, second = bytes(2000), bytes(range(200)) * 10
    room.say("agg", posted("agg", 0, "client/0", first), first)
    task = room.hear("w1")
    assert isinstance(task, Deliver)
    room.say("w1", Done(seqs=(task.seq,)))
    room.put("w1", ChunkRequest(owner="agg", digest=digest(first), start=0, size=2000))
    room.put("agg", posted("agg", 1, "client/0", second), second)
    room.server._turn()
    assert {type(room.hear("w1")) for _ in range(2)} == {Chunk, Deliver}


def test_a_request_for_an_unwritten_blob_does_not_end_the_broker(turns, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    room = turns()
    room.join(AGGREGATOR)
    room.join(WORKER)
    data = bytes(2000)
    with monkeypatch.context() as disk:
        disk.setattr(os, "writev", refuse)
        room.say("agg", posted("agg", 0, "client/0", data), data)
        room.say("w1", ChunkRequest(owner="agg", digest=digest(data), start=5, size=100))
        room.say("w1", Heartbeat())
    while not isinstance(room.hear("w1"), Heartbeat):
        pass
