"""A run's identity: unique, also among runs with the same id, and kept across restarts."""

import msgspec
from msgspec.structs import replace

from fedmq.broker.core.events import ReceivedFrom
from fedmq.broker.core.events import SendTo as BrokerSend
from fedmq.broker.ledger.entries import Opened, encode_record
from fedmq.broker.link.events import Admitted, LinkEnded, Send
from fedmq.broker.recovery import open_broker
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.wire.schema import Goodbye, Heartbeat, Hello, Welcome
from tests.broker.clocks import stopped_clock
from tests.broker.links import HELLO, WELCOME, deliver, heard, welcomed


def welcome(bench, name, role="worker", **more):
    [found] = bench.take(bench.join(name, role, **more), Welcome)
    return found


def test_every_node_gets_the_run_s_identity_also_after_a_restart(bench):
    first = welcome(bench, "agg", "aggregator", key="k").identity
    assert bench.entries[0].identity == first != ""
    assert welcome(bench, "w1", key="k").identity == first
    bench.restart()
    assert welcome(bench, "w1", session="s2", key="k").identity == first
    assert welcome(bench, "agg", "aggregator", session="s2", key="k").identity == first


def test_two_runs_of_one_broker_have_two_identities(bench):
    one = welcome(bench, "agg", "aggregator").identity
    other = welcome(bench, "agg", "aggregator", peer=b"second", run="r2").identity
    assert one != other


def test_a_run_that_is_started_again_under_its_id_in_a_new_ledger_has_another_identity(tmp_path):
    found = []
    for folder in ("one", "two", "two"):
        ledger, core = open_broker(tmp_path / folder, BrokerSettings(), stopped_clock())
        hello = Hello(node="agg", role="aggregator", session="s", run="r", total_clients=1)
        for action in core.handle(ReceivedFrom(b"agg", hello), 0.0):
            if isinstance(action, BrokerSend) and isinstance(action.frame, Welcome):
                found.append(action.frame.identity)
            elif hasattr(action, "entry"):
                ledger.append(action.entry)
        ledger.close()
    assert found[0] != found[1] == found[2] != ""


def test_a_run_of_an_older_ledger_has_none(bench):
    bench.join("agg", "aggregator")
    older = msgspec.msgpack.decode(encode_record(bench.entries[0]))
    del older["identity"]
    bench.entries[0] = msgspec.convert(older, Opened)
    bench.restart()
    assert welcome(bench, "w1").identity == ""


def test_a_session_ends_when_its_run_is_another_one():
    """The session's unsent frames and its state belong to the earlier run."""
    link = welcomed()
    assert heard(link, replace(WELCOME, beat_s=2.0)) == []  # a reconnect
    bye, end = heard(link, replace(WELCOME, identity="other"))
    assert isinstance(bye, Send)
    assert isinstance(bye.frame, Goodbye)
    assert end == LinkEnded(
        "the broker has started another run 'r' since this node joined: "
        "start the node again to join it",
        rejected=True,
    )
    late = deliver(0, after=0)
    assert link.handle(late, 1.0) == []
    assert heard(link, Heartbeat(), now=1.0) == []


def test_a_new_session_takes_any_identity():
    link = type(welcomed())(HELLO)
    found = heard(link, replace(WELCOME, identity="0a"))
    assert [each.welcome.identity for each in found if isinstance(each, Admitted)] == ["0a"]
