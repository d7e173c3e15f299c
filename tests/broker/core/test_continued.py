"""A continued run: its earlier nodes are gone, and its end can be lifted."""

import pytest

from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger.entries import PAYLOAD, Ended, segment_numbers, segment_path
from fedmq.broker.ledger.manifest import Manifest
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link import events as node
from fedmq.broker.settings import Continuation
from fedmq.broker.wire.schema import Message, RunEnded
from tests.broker.net import network, notes

MODEL = b"m" * 200_000


@pytest.fixture
def net(tmp_path):
    return network(tmp_path)


def take_up(net, config="[run]", *, further=False, pause=100.0, run="r", session="s2"):
    """Kill every process, and continue the run after a while."""
    net.kill_broker()
    net.now += pause
    going_on = Continuation(run, config, further=further)
    net.start_broker(going_on)
    hellos = {name: each.hello for name, each in net.members.items()}
    for name in hellos:
        net.restart(name, session)
    return net


def start(net, name, **more):
    """Send the Hello of a node's session, with changed fields."""
    hello = net.members[name].hello
    known = {"key": hello.key, "run": "r", "total_clients": hello.total_clients}
    fields = {"clients": hello.clients, "config": hello.config, **known, **more}
    member = net.add(name, hello.role, session=hello.session, **fields)
    member.connection = 7
    return member


def end(net, reason="enough"):
    """Post the last checkpoint of the aggregator, and end the run."""
    net.post("agg", "checkpoint", reason, MODEL)
    net.tell("agg", node.Publish(RunEnded(reason=reason)))
    net.until(lambda: net.members["agg"].ended is not None)


def kinds(net):
    return [each.message.kind for each in net.members["agg"].inbox]


def test_the_aggregator_gets_continued_first_and_pending_messages_survive(net):
    net.post("agg", "client/1", 1)
    net.post("agg", "client/8", 2)
    net.post("w1", "aggregator", 3)
    net.run(0.2)
    take_up(net)
    net.run(0.5)
    inbox = [each.message for each in net.members["agg"].inbox]
    assert [each.kind for each in inbox] == [
        "joined",
        "joined",
        "note",
        "continued",
        *["joined"] * 2,
    ]
    told = inbox[3].body
    assert (told["config"], told["further"]) == ("[run]", False)
    assert told["stopped_s"] == pytest.approx(100.0, abs=1.0)
    assert notes(net, "w1") == [1]
    assert notes(net, "w2") == [2]


def test_the_earlier_clients_can_be_hosted_by_other_nodes_at_once(net):
    """No lease has to expire: a continued run has no nodes."""
    net.post("agg", "client/8", 1)
    net.run(0.2)
    take_up(net)
    net.members.pop("w2")
    start(net, "w1", clients=((0, 9),))
    net.run(0.5)
    assert net.members["w1"].welcome is not None
    assert notes(net, "w1") == [1]
    assert kinds(net)[-2:] == ["continued", "joined"]


def test_a_changed_configuration_applies_from_then_on(net):
    take_up(net, config="other = 1")
    start(net, "agg", config="other = 1")
    net.run(0.5)
    assert net.members["w1"].welcome.config == "other = 1"
    net.kill_broker()
    net.start_broker()
    net.restart("agg", "s3")
    net.run(0.5)
    assert net.members["agg"].ended is None
    net.restart("agg", "s4").hello = net.members["agg"].hello
    assert net.broker._mailboxes.runs["r"].config == "other = 1"


def test_timers_do_not_advance_while_the_run_is_stopped(net):
    timer = Message(
        kind="timer",
        id="agg/50",
        run="r",
        sender="agg",
        to="timer",
        body={"token": "t", "after_s": 30.0},
    )
    net.tell("agg", node.PostMessage(timer, ()))
    net.run(10.0)
    take_up(net, pause=1000.0)  # it has stood still since the last entry
    net.run(25.0)
    assert "tick" not in kinds(net)
    net.run(10.0)
    assert kinds(net).count("tick") == 1


def test_an_end_is_lifted_and_the_aggregator_gets_what_it_ended_with(net):
    net.post("agg", "client/1", 1)
    end(net)
    take_up(net, config="more", further=True)
    start(net, "agg", config="more")
    net.run(0.5)
    member = net.members["agg"]
    assert member.welcome.checkpoint is not None
    assert member.welcome.continued == member.inbox[0].seq
    assert kinds(net) == ["continued", "joined", "joined"]
    assert notes(net, "w1") == [], "what was under way ended with the run"
    net.post("agg", "client/1", 2)
    end(net, "enough again")
    reasons = [each.reason for each in read_entries(net.folder) if isinstance(each, Ended)]
    assert reasons == ["enough", "enough again"]
    # And again, from what it has come to by then.
    take_up(net, config="most", further=True, session="s3")
    start(net, "agg", config="most")
    net.run(0.5)
    assert net.members["agg"].welcome.checkpoint.seq > member.welcome.checkpoint.seq


def test_a_restart_of_the_broker_alone_leaves_it_lifted(net):
    end(net)
    take_up(net, further=True)
    start(net, "agg", config="[run]")
    net.run(0.5)
    first = net.members["agg"].welcome.continued
    net.kill_broker()
    net.start_broker()
    net.restart("agg", "s5")
    net.run(0.5)
    assert net.members["agg"].welcome.continued == first
    assert kinds(net)[0] == "continued"


def test_an_ended_run_stays_ended_unless_reopened(net):
    end(net)
    take_up(net)
    for name in list(net.members):
        start(net, name)
    net.run(0.5)
    assert {each.ended for each in net.members.values()} == {node.LinkEnded("enough", over=True)}


def test_a_run_whose_last_checkpoint_was_not_kept_is_rejected(net):
    end(net)
    net.kill_broker()
    # As retention does it.
    for number in segment_numbers(net.folder, PAYLOAD):
        Manifest(net.folder).remove(PAYLOAD, number)
        segment_path(net.folder, PAYLOAD, number).unlink()
    before = list(read_entries(net.folder))
    going_on = Continuation("r", "more", further=True)
    with pytest.raises(
        LedgerError, match=r"cannot continue run r: .* entry [0-9]+, .* power failure"
    ):
        net.start_broker(going_on)
    assert list(read_entries(net.folder)) == before
    net.start_broker()
    net.driver.close()


def test_a_run_that_is_not_in_the_ledger_is_a_new_one(net):
    before = len(list(read_entries(net.folder)))
    take_up(net, run="another")
    assert len(list(read_entries(net.folder))) == before


def test_bytes_on_the_wire_are_those_of_all_brokers_up_to_their_last_checkpoints(net):
    net.post("agg", "client/1", 1, MODEL)
    net.until(lambda: notes(net, "w1") == [1])
    delivery = net.members["w1"].inbox[-1]
    assert net.read("w1", delivery) == MODEL
    for name in net.members:  # what its driver would tell it
        net.broker.sent(net.members[name].peer, 1000 if name == "agg" else 300_000)
    net.post("agg", "checkpoint", 2, b"state")
    net.run(0.2)
    net.kill_broker()
    net.start_broker()
    for name in list(net.members):
        net.restart(name, "s2")
    net.run(0.5)
    net.broker.sent(net.members["w2"].peer, 7)
    end(net)
    [ended] = [each for each in read_entries(net.folder) if isinstance(each, Ended)]
    nodes = [each for name, each in ended.nodes.items() if name != "agg"]
    assert sum(each["sent_bytes"] for each in nodes) == 600_007
    assert sum(each["received_bytes"] for each in nodes) >= 0
    # What went further counts from its end on.
    take_up(net, further=True)
    start(net, "agg", config="[run]")
    net.run(0.5)
    end(net, "again")
    *_, last = [each for each in read_entries(net.folder) if isinstance(each, Ended)]
    assert sum(each["sent_bytes"] for name, each in last.nodes.items() if name != "agg") == 0


def test_only_the_broker_may_send_continued(net):
    forged = Message(
        kind="continued",
        id="w1/66",
        run="r",
        sender="w1",
        to="aggregator",
        body={"config": "", "further": True, "stopped_s": 0.0},
    )
    net.tell("w1", node.PostMessage(forged, ()))
    net.run(0.5)
    assert "continued" not in kinds(net)
    refused = [each.message.body for each in net.members["w1"].inbox]
    assert [each["code"] for each in refused] == ["reserved-kind"]
