import re

import msgpack
import pytest
from msgspec import UNSET

from fedmq.broker.access.owners import owner_of
from fedmq.broker.core.events import Unreadable
from fedmq.broker.errors import VersionError, WireError
from fedmq.broker.wire.encoding import decode_frame, decode_message, encode_frame
from fedmq.broker.wire.schema import (
    MAX_HEADER_BYTES,
    MAX_NAMED,
    PROTOCOL,
    Deliver,
    Done,
    Goodbye,
    Heartbeat,
    Reject,
    RunEnded,
    Serving,
    UnknownSession,
    Wait,
    Welcome,
)


def refusal(bench, peer):
    [reject] = bench.take(peer, Reject)
    return reject.code, reject.reason


def test_a_node_is_welcomed_with_the_times_and_the_configuration_of_the_run(bench):
    agg = bench.join("agg", "aggregator")
    welcome = Welcome(run="r", beat_s=1.0, lease_s=10.0, config="[run]", identity="run1")
    assert bench.take(agg) == [welcome]
    w1 = bench.join("w1", clients=((0, 4),))
    assert bench.take(w1) == [welcome]


def test_the_aggregator_gets_each_join_and_its_own_is_recorded(bench):
    agg = bench.join("agg", "aggregator")
    bench.join("w1", clients=((0, 4), (7, 7)))
    bench.join("e1", "evaluator", session="s9")
    assert [(kind, body["node"], body["role"]) for kind, body in bench.said()] == [
        ("joined", "agg", "aggregator"),
        ("joined", "w1", "worker"),
        ("joined", "e1", "evaluator"),
    ]
    delivered = [decode_message(frame.message) for frame in bench.take(agg, Deliver)]
    assert [each.body["node"] for each in delivered] == ["w1", "e1"]
    assert delivered[0].body == {
        "owner": owner_of("", "secret of w1", "s1"),
        "node": "w1",
        "role": "worker",
        "session": "s1",
        "clients": [[0, 4], [7, 7]],
    }
    assert [each.to for each in bench.messages()] == ["record", "aggregator", "aggregator"]


@pytest.mark.parametrize(
    ("hello", "code", "reason"),
    [
        (
            {"role": "boss"},
            "role",
            "unknown role 'boss'; choose from aggregator, evaluator, worker",
        ),
        ({"node": "broker"}, "name", "the node name 'broker'"),
        ({"node": "record"}, "name", "the node name 'record'"),
        ({"node": "w1", "key": "another"}, "name", "a node named 'w1' is already connected"),
        ({"clients": ((5, 10),)}, "client", "client 10 is out of range: this run has 10 clients"),
        ({"clients": ((12, 13),)}, "client", "client 1[23] is out of range.*0 to 9"),
        ({"clients": ((5, 5), (3, 4))}, "client", "client/3 is already hosted by w1"),
        ({"role": "aggregator"}, "run", "run r was opened by another key"),
        (
            {"role": "aggregator", "key": "secret of agg", "config": "[run]"},
            "client",
            "aggregator is already hosted by agg",
        ),
        ({"role": "aggregator", "run": ""}, "run", "an aggregator must name its run"),
    ],
)
def test_a_rejection_of_a_node_says_why(bench, hello, code, reason):
    bench.joined("agg", "aggregator")
    bench.joined("w1", clients=((0, 3),))
    entries = len(bench.entries)
    hello = {"node": "w2", "role": "worker", "session": "s2", **hello}
    peer = bench.join(hello.pop("node"), hello.pop("role"), hello.pop("session"), **hello)
    got_code, got_reason = refusal(bench, peer)
    assert got_code == code
    assert re.search(reason, got_reason)
    assert bench.logs[-1].level == "warning"
    bench.say(peer, Heartbeat())
    assert bench.take(peer) == [UnknownSession()]
    assert len(bench.entries) == entries


def test_a_reversed_range_is_rejected_with_the_right_reason(bench):
    """The error must not name a client that is in range."""
    bench.joined("agg", "aggregator")
    code, reason = refusal(bench, bench.join("w1", clients=((5, 3),)))
    assert code == "client"
    assert "client 3 is out of range" not in reason


def test_a_rejected_aggregator_leaves_no_run_behind(bench):
    refusal(bench, bench.join("broker", "aggregator", run="ghost"))
    peer = bench.join("w1")
    assert isinstance(bench.take(peer)[0], Wait)


@pytest.mark.parametrize("hello", [{"run": "r" * 121}, {"run": "r" * 5000}])
def test_a_run_whose_name_no_message_can_hold_is_rejected(bench, hello):
    """What the broker writes into the ledger must be readable from it (the bench reads it)."""
    peer = bench.join("agg", "aggregator", **hello)
    assert isinstance(bench.take(peer)[0], Reject)
    assert bench.entries == []


def test_a_hello_full_of_ranges_does_not_bring_the_broker_down(bench):
    """Its `joined` message is longer than the Hello, which was at the limit."""
    bench.joined("agg", "aggregator")
    peer = bench.join("w1", clients=((0, 0),) * 21_800)
    assert isinstance(bench.take(peer)[0], Welcome | Reject)


def test_a_configuration_that_only_just_fits_its_hello_does_not_bring_the_broker_down(bench):
    """Another program may leave out what has a default: its Welcome is longer than its Hello."""
    fields = {"kind": "hello", "node": "a", "role": "aggregator", "session": "s", "run": "r"}
    room = MAX_HEADER_BYTES - len(msgpack.packb({**fields, "config": ""})) - 2
    header = msgpack.packb({**fields, "config": "x" * room})
    assert len(header) == MAX_HEADER_BYTES
    bench.say(b"a", decode_frame(header))
    assert isinstance(bench.take(b"a")[0], Welcome | Reject)


def test_nodes_of_one_broker_with_several_runs_must_name_theirs(bench):
    bench.joined("agg", "aggregator", run="r")
    bench.joined("agg", "aggregator", session="s2", run="q", total_clients=3)
    code, reason = refusal(bench, bench.join("w1"))
    assert (code, reason) == (
        "run",
        "this broker serves several runs, choose one with --run-id: r, q",
    )
    bench.joined("w1", session="s2", run="q", clients=((0, 2),))
    bench.joined("w1", session="s3", run="r", clients=((0, 2),))


def test_an_ended_run_is_not_joined_by_default_and_answers_run_ended(bench):
    agg = bench.joined("agg", "aggregator")
    bench.tell(agg, RunEnded(reason="done"))
    assert bench.take(bench.join("w1", run="r")) == [RunEnded(reason="done")]
    assert isinstance(bench.take(bench.join("w2"))[0], Wait)
    bench.standing.add(b"w2:s1")
    bench.joined("agg", "aggregator", session="s2", run="q")
    bench.wake()
    assert bench.take(b"w2:s1", Welcome)[0].run == "q"


def test_workers_that_come_first_wait_and_are_welcomed_when_the_run_comes(bench):
    first, named, other = (
        bench.join("w1", clients=((0, 4),)),
        bench.join("w2", clients=((5, 9),), run="r"),
        bench.join("w3", run="q"),
    )
    assert [bench.take(peer) for peer in (first, named, other)] == [
        [Wait(reason="no run has started yet")]
    ] * 3
    bench.say(first, Heartbeat())
    assert bench.take(first) == []
    bench.standing |= {first, named, other}
    agg = bench.join("agg", "aggregator")
    assert isinstance(bench.take(agg)[0], Welcome)
    bench.wake()
    assert [type(bench.take(peer)[0]) for peer in (first, named, other)] == [Welcome, Welcome, Wait]
    assert [body["node"] for _, body in bench.said("joined")] == ["agg", "w1", "w2"]


def test_a_worker_that_says_goodbye_while_it_waits_is_not_welcomed_later(bench):
    gone = bench.join("w1", session="s1")
    bench.say(gone, Goodbye())
    back = bench.join("w1", session="s2")
    bench.take(gone)
    bench.take(back)
    bench.standing.add(back)
    bench.joined("agg", "aggregator")
    bench.wake()
    assert bench.take(gone) == []
    assert isinstance(bench.take(back)[0], Welcome)


def test_the_newer_of_two_waiting_sessions_with_one_name_is_welcomed(bench):
    """A worker was restarted before its run started: the earlier session does not keep the name."""
    bench.join("w1", session="s1")
    back = bench.join("w1", session="s2")
    bench.take(back)
    bench.standing |= {b"w1:s1", back}
    bench.joined("agg", "aggregator")
    bench.wake()
    assert isinstance(bench.take(back)[0], Welcome)


@pytest.mark.parametrize("connection", ["gone", "up, but silent"])
def test_a_node_that_ended_while_it_waited_takes_no_clients_from_another(bench, connection):
    """With `worker --give-up`, say; whether or not its connection was closed."""
    ended = bench.join("w1", clients=((0, 9),))
    if connection == "up, but silent":
        bench.standing.add(ended)
        bench.wake(bench.settings.lease_s)
    real = bench.join("w2", clients=((0, 9),))
    bench.standing.add(real)
    bench.take(real)
    bench.joined("agg", "aggregator")
    bench.wake(bench.now)
    assert isinstance(bench.take(real)[0], Welcome)
    assert [body["node"] for _, body in bench.said("joined")] == ["agg", "w2"]


def test_the_same_session_on_a_new_connection_takes_its_place_over(bench):
    agg = bench.joined("agg", "aggregator")
    old = bench.joined("w1", clients=((0, 4),))
    bench.post(agg, "client/2", "one")
    assert bench.texts(old) == ["one"]
    new = bench.join("w1", clients=((0, 4),), peer=b"w1:other connection")
    assert isinstance(bench.sent[new][0][0], Welcome)
    assert bench.texts(new) == ["one"]
    bench.post(agg, "client/2", "two")
    assert (bench.texts(old), bench.texts(new)) == ([], ["two"])
    bench.say(old, Heartbeat())
    assert bench.take(old) == [UnknownSession()]
    assert len(bench.said("joined")) == 2


def test_the_old_node_of_a_renamed_connection_leaves(bench):
    agg = bench.joined("agg", "aggregator")
    peer = bench.joined("w1", clients=((0, 4),))
    bench.join("w2", clients=((5, 9),), peer=peer)
    for now in range(1, 30):
        bench.wake(float(now))
        bench.say(agg, Heartbeat())
        bench.say(peer, Heartbeat())
    bench.joined("w1", session="s2", clients=((0, 4),))


def test_an_unknown_connection_gets_unknown_session(bench):
    for frame in (Heartbeat(), Done(seqs=(1,))):
        bench.say(b"nobody", frame)
        assert bench.take(b"nobody") == [UnknownSession()]
    bench.say(b"nobody", Goodbye())
    assert bench.take(b"nobody") == []


def test_frames_that_only_a_broker_sends_are_rejected(bench):
    agg = bench.joined("agg", "aggregator")
    bench.say(agg, UnknownSession())
    assert refusal(bench, agg) == ("unexpected", "a node does not send stranger frames")
    worker = bench.joined("w1")
    bench.tell(worker, RunEnded())
    assert refusal(bench, worker) == ("unexpected", "only the aggregator may end a run")


def test_bytes_that_are_no_frame_are_answered_with_the_reason(bench):
    bench.handle(Unreadable(b"x", WireError("not a frame: nonsense")))
    bench.handle(Unreadable(b"y", VersionError((2, 0), (1, 0))))
    assert refusal(bench, b"x") == ("unreadable", "not a frame: nonsense")
    [reject] = bench.take(b"y", Reject)
    assert (reject.code, reject.protocol) == ("version", PROTOCOL)
    assert "expected protocol 1.x, got 2.0" in reject.reason
    bench.handle(Unreadable(b"x", WireError("x" * 9000)))


def test_a_large_reject_reason_can_still_be_read_by_its_node(bench):
    for number in range(30):
        bench.joined("agg", "aggregator", session=f"s{number}", run=f"{number:0>99}")
    bench.join("w1")


def test_hello_again_is_welcome_again_and_offers_what_is_unfinished(bench):
    agg = bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 9),))
    bench.post(agg, "client/0", "one")
    bench.post(agg, "client/9", "two")
    bench.take(worker)
    bench.join("w1", clients=((0, 9),))
    assert bench.texts(worker) == ["one", "two"]
    assert len(bench.said("joined")) == 2


@pytest.mark.parametrize(
    "name",
    ["", "..", ".", "/etc", "a/b", "../x", "a\n", "-a", ".a", "_a", "a b", "ä", "a\0", "x" * 101],
)
def test_names_that_could_be_paths_or_drive_a_terminal_are_rejected(bench, name):
    """Names of nodes and of runs; nothing is stored, and no node waits."""
    code, reason = refusal(bench, bench.join(name, "aggregator", run="r"))
    assert (code, "expected 1 to 100 ASCII letters" in reason) == ("name", True)
    code, reason = refusal(bench, bench.join("agg", "aggregator", run=name))
    assert code == "run"
    if name:
        code, _ = refusal(bench, bench.join("w1", run=name))
        assert code == "run"
    assert bench.entries == []
    assert isinstance(bench.take(bench.join("w1"))[0], Wait)


# ---- a run that is not here


def served(bench, peer):
    [wait] = bench.take(peer, Wait)
    return wait.serving


def test_a_node_whose_run_does_not_exist_gets_the_list_of_runs(bench):
    assert served(bench, bench.join("w1", run="c")) is UNSET
    over = bench.joined("agg", "aggregator", run="old")
    bench.tell(over, RunEnded(reason="done"))
    bench.joined("agg", "aggregator", session="s2", run="a")
    bench.joined("agg", "aggregator", session="s3", run="b")
    assert served(bench, bench.join("w2", run="c")) == Serving(("b", "a"), 0, ("old",))
    assert bench.entries[-1].read().body["node"] == "agg"


def test_very_many_runs_are_named_in_part(bench):
    for number in range(MAX_NAMED + 5):
        over = bench.joined("agg", "aggregator", session=f"o{number}", run=f"old{number}")
        bench.tell(over, RunEnded(reason="done"))
        bench.joined("agg", "aggregator", session=f"s{number}", run=f"{number}-" + "x" * 90)
    serving = served(bench, bench.join("w1", run="c"))
    assert (len(serving.runs), serving.others) == (MAX_NAMED, 5)
    assert (len(serving.ended), serving.others_ended) == (MAX_NAMED, 5)
    assert serving.ended[0] == f"old{MAX_NAMED + 4}"


def test_an_older_node_reads_a_wait_with_a_list_of_runs():
    wait = Wait(reason="no such run", serving=Serving(("a",)))
    fields = msgpack.unpackb(encode_frame(wait))
    assert fields["serving"]["runs"] == ["a"]
    assert decode_frame(encode_frame(Wait())) == Wait()
    assert b"serving" not in encode_frame(Wait())


def test_an_aggregator_with_another_configuration_gets_that_of_the_run(bench):
    bench.joined("agg", "aggregator")
    peer = bench.join(
        "agg", "aggregator", session="s2", config="[algorithm]", peer=b"x", key="another"
    )
    [reject] = bench.take(peer, Reject)
    assert (reject.code, reject.config) == ("name", UNSET)
    bench.say(b"agg:s1", Goodbye())
    peer = bench.join("agg", "aggregator", session="s3", config="[algorithm]")
    [reject] = bench.take(peer, Reject)
    assert (reject.code, reject.config) == ("config", "[run]")


def test_a_configuration_that_is_too_long_is_not_sent_back(bench):
    peer = bench.join("agg", "aggregator", config="x" * 60_000)
    [reject] = bench.take(peer, Reject)
    assert (reject.code, reject.config) == ("config", UNSET)


# ---- after the end of a run


def test_a_broker_is_idle_when_each_node_has_said_goodbye_or_its_lease_is_over(bench):
    agg, w1, w2 = (
        bench.joined("agg", "aggregator"),
        bench.joined("w1", clients=((0, 1),)),
        bench.joined("w2", clients=((2, 3),)),
    )
    bench.standing.add(w2)  # a process that is stopped: its connection stands
    bench.wake(5.0)
    bench.tell(agg, RunEnded(reason="done"))
    for peer in (agg, w1):
        assert bench.take(peer, RunEnded)
        bench.say(peer, Goodbye())
    bench.wake(14.9)
    assert not bench.core.idle
    bench.say(w2, Heartbeat())  # it cannot hold the broker for ever
    bench.wake(15.1)
    assert bench.core.idle
    assert bench.said("left") == []


def test_a_node_that_comes_back_after_the_end_says_goodbye_over_its_new_connection(bench):
    agg, w1 = bench.joined("agg", "aggregator"), bench.joined("w1")
    bench.tell(agg, RunEnded(reason="done"))
    bench.say(agg, Goodbye())
    bench.take(w1)
    again = bench.join("w1", peer=b"w1-again")
    assert bench.take(again) == [RunEnded(reason="done")]
    assert not bench.core.idle
    bench.say(again, Goodbye())
    assert bench.core.idle


def test_a_node_that_starts_after_the_end_gets_run_ended(bench):
    agg, w1 = bench.joined("agg", "aggregator"), bench.joined("w1", run="r")
    bench.tell(agg, RunEnded(reason="done"))
    bench.take(w1)
    assert bench.take(bench.join("w1", session="s2", run="r")) == [RunEnded(reason="done")]
