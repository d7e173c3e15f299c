"""What peers can make a broker keep before and by their admission: each limit, at its edge."""

import time
import tracemalloc

import pytest

from fedmq.broker.access.quotas import JOINS_AT_ONCE, Bucket, Quotas, source_of
from fedmq.broker.access.rights import Origin, Rights
from fedmq.broker.core.admission import first_beyond
from fedmq.broker.settings import Limits
from fedmq.broker.wire.addresses import MAX_RANGES
from fedmq.broker.wire.schema import Goodbye, Hello, Reject, RunEnded, Wait, Welcome

FAR, NEAR = Origin("", "10.0.0.7"), Origin("", "127.0.0.1")
KEY = Origin("k" * 40, "10.0.0.7")


@pytest.fixture
def limited(new_bench):
    """Return a bench with these limits; the aggregator of run r is there."""

    def make(only_run="", **limits):
        bench = new_bench(limits=Limits(**limits), only_run=only_run)
        bench.joined("agg", "aggregator", run=only_run or "r")
        return bench

    return make


def rejected(bench, peer):
    """Take the answer to a Hello: (code, reason) of a rejection, or None."""
    frame = bench.take(peer)[0]
    return (frame.code, frame.reason) if isinstance(frame, Reject) else None


def over(bench, peer, setting):
    """Return whether a Hello was rejected because of a limit, which it names."""
    found = rejected(bench, peer)
    return found is not None and found[0] == "limit" and f"broker.limits.{setting}" in found[1]


def test_runs(limited):
    bench = limited(runs=2)
    assert rejected(bench, bench.join("b", "aggregator", run="b")) is None
    assert over(bench, bench.join("c", "aggregator", run="c"), "runs")
    assert len(bench.core._mailboxes.runs) == 2
    assert rejected(bench, bench.join("b", "aggregator", "s2", run="b")) is None
    bench.tell(b"b:s2", RunEnded())
    code, reason = rejected(bench, bench.join("c", "aggregator", run="c"))
    assert (code, reason[-32:]) == ("limit", "; start this one again after 1 s")
    bench.now += 10.0
    assert rejected(bench, bench.join("c", "aggregator", run="c")) is None


def test_runs_that_are_opened_and_ended_at_once(limited):
    """9,501 runs in 8 s once took 374 MB, for ever."""
    bench = limited()
    for number in range(300):
        peer = bench.join("a", "aggregator", run=f"r{number}", peer=b"a:%d" % number)
        if rejected(bench, peer) is None:
            bench.tell(peer, RunEnded())
            bench.say(peer, Goodbye())
    assert len(bench.core._mailboxes.runs) == Limits().runs


def test_nodes_of_a_run_are_counted_by_name(limited):
    bench = limited(nodes=3)
    for name in ("w1", "w2"):
        bench.say(bench.joined(name), Goodbye())
    assert over(bench, bench.join("w3"), "nodes")
    assert rejected(bench, bench.join("w2", session="s2")) is None


@pytest.mark.parametrize(("ranges", "fits"), [(((0, 4),), True), (((0, 2), (3, 5)), False)])
def test_clients_of_a_node(limited, ranges, fits):
    bench = limited(clients=5)
    peer = bench.join("w1", clients=ranges)
    assert (rejected(bench, peer) is None) if fits else over(bench, peer, "clients")


def test_a_hello_with_very_many_clients_costs_nothing(new_bench):
    """It once took 2.5 s and 93 MB, each time."""
    bench = new_bench()
    bench.joined("agg", "aggregator", total_clients=1 << 20)
    tracemalloc.start()
    began = time.perf_counter()
    for number in range(100):
        assert over(bench, bench.join(f"w{number}", clients=((0, (1 << 20) - 1),)), "clients")
    peer = bench.join("w", clients=tuple((0, 1 << 62) for _ in range(MAX_RANGES)))
    assert over(bench, peer, "clients")
    assert time.perf_counter() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_sessions_of_one_address_or_key(new_bench):
    bench = new_bench(limits=Limits(sessions=2))
    bench.allow(Rights(name="k", key=KEY.key), keyless=Rights(name="local"))
    bench.joined("agg", "aggregator")
    for origin in (FAR, KEY):
        name = "k" if origin.key else "f"
        for number in range(2):
            assert rejected(bench, bench.join(f"{name}{number}", origin=origin)) is None
        assert over(bench, bench.join(f"{name}2", origin=origin), "sessions")
        # A restart of one of them is none more.
        assert rejected(bench, bench.join(f"{name}0", session="s2", origin=origin)) is None
        bench.say(f"{name}1:s1".encode(), Goodbye())
        assert rejected(bench, bench.join(f"{name}2", origin=origin)) is None
    for number in range(4):
        assert rejected(bench, bench.join(f"n{number}", origin=NEAR)) is None
    other = Origin("", "10.0.0.8")
    assert rejected(bench, bench.join("other", origin=other)) is None
    bench.restart()
    assert bench.core._sessions.quotas.sessions == {KEY.key: 2}


def test_a_host_with_ipv6_cannot_take_more_places_by_changing_its_address(new_bench):
    bench = new_bench(limits=Limits(sessions=2))
    bench.joined("agg", "aggregator")
    for number in range(3):
        peer = bench.join(f"w{number}", origin=Origin("", f"2001:db8::{number:x}:1"))
        assert over(bench, peer, "sessions") if number == 2 else rejected(bench, peer) is None
    other = Origin("", "2001:db8:0:1::1")
    assert rejected(bench, bench.join("other", origin=other)) is None


def test_connections_that_wait_for_a_run(new_bench):
    bench = new_bench(limits=Limits(waiting=2))
    for name in ("w1", "w2", "w1"):
        assert isinstance(bench.take(bench.join(name))[0], Wait)
    [answer] = bench.take(bench.join("w3"))
    assert (answer.crowded, "broker.limits.waiting" in answer.reason) == (True, True)
    # One that does not repeat its Hello is gone.
    bench.now = 5.0
    bench.join("w2")
    bench.now = 12.0
    assert not bench.take(bench.join("w3"))[0].crowded
    assert bench.take(bench.join("w4"))[0].crowded
    assert [each.level for each in bench.logs] == ["warning"], "once a minute"
    # A run makes room for all: each node says Hello again.
    bench.joined("agg", "aggregator")
    assert isinstance(bench.take(bench.join("w4"))[0], Welcome)


def test_what_waits_takes_little_memory(new_bench):
    """400 Hellos of 60 kB once took 42 MB."""
    bench = new_bench()
    bench.validates = False
    ranges = tuple((2 * number, 2 * number) for number in range(MAX_RANGES))
    tracemalloc.start()
    for number in range(400):
        hello = Hello(node=f"w{number}", role="worker", session="s", clients=ranges)
        bench.say(b"%d" % number, hello)
        hello = Hello(node=f"w{number}", role="worker", session="s", config="x" * 20_000)
        bench.say(b"x%d" % number, hello)
        bench.sent.clear()
        bench.logs.clear()
    assert tracemalloc.get_traced_memory()[0] < 5 << 20
    tracemalloc.stop()


def test_a_node_takes_little_memory_once_it_has_left(bench):
    bench.joined("agg", "aggregator", total_clients=10_000)
    ranges = tuple((2 * number, 2 * number) for number in range(MAX_RANGES))
    peer = bench.joined("w1", clients=ranges, config="x" * 20_000)
    node = bench.core._mailboxes.runs["r"].nodes["w1"]
    assert (node.hello.clients, node.hello.config) == (ranges, "")
    bench.say(peer, Goodbye())
    assert node.hello.clients == ()
    # The same session may return, with its clients.
    bench.joined("w1", clients=ranges)
    assert node.hello.clients == ranges
    bench.say(peer, Goodbye())
    bench.restart()
    assert bench.core._mailboxes.runs["r"].nodes["w1"].hello.clients == ()


def test_a_node_that_waits_brings_its_clients_along(bench):
    bench.standing.add(b"w1:s1")
    bench.join("w1", clients=((0, 3), (5, 5)))
    bench.take(b"w1:s1")
    bench.joined("agg", "aggregator")
    bench.wake()
    assert bench.take(b"w1:s1", Welcome)
    assert bench.said("joined")[-1][1]["clients"] == [[0, 3], [5, 5]]


def test_two_nodes_that_wait_under_one_name(bench):
    """The first one owns the name; nobody drives it out by waiting later."""
    bench.standing |= {b"w1:s1", b"w1:s2"}
    bench.join("w1", session="s1", key="first")
    bench.join("w1", session="s2", key="second")
    bench.sent.clear()
    bench.joined("agg", "aggregator")
    bench.wake()
    assert bench.take(b"w1:s1", Welcome)
    assert bench.take(b"w1:s2")[-1].code == "name"


def joins(bench):
    return len(bench.said("joined", "left"))


def test_a_flood_of_hellos_and_goodbyes_does_not_fill_the_inbox(bench):
    bench.joined("agg", "aggregator")
    for number in range(500):
        peer = bench.join("w1", session=f"s{number}")
        if number >= JOINS_AT_ONCE:
            code, reason = rejected(bench, peer)
            assert (code, "joins_per_s" in reason) == ("limit", True)
            assert reason.endswith("start it again after 1 s")
        bench.say(peer, Goodbye())
    assert joins(bench) == 1 + 2 * JOINS_AT_ONCE
    # The rate of this name is its own.
    assert rejected(bench, bench.join("w2")) is None
    bench.now += 3.0
    for number in range(500, 510):
        bench.say(bench.join("w1", session=f"s{number}"), Goodbye())
    assert joins(bench) == 2 + 2 * (JOINS_AT_ONCE + 3)


def test_a_source_with_many_names_joins_at_a_rate_too(new_bench):
    bench = new_bench(limits=Limits(sessions=50))
    bench.joined("agg", "aggregator")
    for number in range(200):
        bench.say(bench.join(f"w{number}", origin=FAR), Goodbye())
    assert joins(bench) == 1 + 2 * 100


def test_a_thousand_honest_nodes_start_at_once_and_again(bench):
    bench.validates = False
    bench.joined("agg", "aggregator", total_clients=1000)
    for session in ("1", "2"):
        for number in range(1000):
            peer = bench.join(
                f"w{number}", session=session, clients=((number, number),), origin=FAR
            )
            assert bench.take(peer, Welcome)


def test_a_reconnect_is_no_join(bench):
    bench.joined("agg", "aggregator")
    for _ in range(3 * JOINS_AT_ONCE):
        assert rejected(bench, bench.join("w1")) is None
    assert joins(bench) == 2


def test_sources_are_bounded_in_memory():
    quotas = Quotas(Limits())
    for number in range(20_000):
        origin = Origin("", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        assert quotas.may_join(origin, Bucket(1), 0.0)
    assert len(quotas._joins) <= 10_000


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        (Origin("", ""), ""),
        (Origin("", "127.0.0.1"), ""),
        (Origin("", "127.8.8.8"), ""),
        (Origin("", "::1"), ""),
        (Origin("", "::ffff:127.0.0.1"), ""),
        (Origin("", "10.0.0.7"), "10.0.0.7"),
        (Origin("", "fe80::1%eth0"), "fe80::1%eth0"),
        (Origin("", "::ffff:10.0.0.7"), "::ffff:10.0.0.7"),
        (Origin("", "2001:db8:1:2::7"), "2001:db8:1:2::/64"),
        (Origin("", "2001:db8:1:2:ffff::1"), "2001:db8:1:2::/64"),
        (Origin("", "2001:db8:1:3::7"), "2001:db8:1:3::/64"),
        (Origin("", "unknown"), "unknown"),
        (KEY, KEY.key),
    ],
)
def test_the_source_of_a_connection(origin, source):
    assert source_of(origin) == source


def test_a_bucket_never_holds_more_than_its_size():
    bucket = Bucket(2)
    assert [bucket.take(at, 1.0) for at in (9.0, 9.0, 9.0, 10.0, 10.5, 99.0, 99.0, 99.0)] == [
        True, True, False, True, False, True, True, False,
    ]  # fmt: skip
    assert not bucket.take(50.0, 1.0), "a clock that is set back gives nothing"


# ---- the one run of a broker


def test_a_broker_of_one_run_admits_to_no_other(limited):
    bench = limited(only_run="r")
    assert rejected(bench, bench.join("b", "aggregator", run="b"))[0] == "run"
    assert rejected(bench, bench.join("w1", run="b"))[0] == "run"
    assert rejected(bench, bench.join("w1")) is None
    assert rejected(bench, bench.join("w2", run="r")) is None


def test_a_worker_without_a_run_waits_for_the_one_that_the_broker_serves(new_bench):
    bench = new_bench(only_run="r")
    assert isinstance(bench.take(bench.join("w1"))[0], Wait)
    bench.standing.add(b"w1:s1")
    bench.joined("agg", "aggregator")
    bench.wake()
    assert bench.take(b"w1:s1", Welcome)


# ---- names


@pytest.mark.parametrize("session", ["/etc", "..", "a b", "x" * 101, "a\n"])
def test_a_session_id_is_a_name(bench, session):
    bench.joined("agg", "aggregator")
    assert rejected(bench, bench.join("w1", session=session, peer=b"p"))[0] == "session"


@pytest.mark.parametrize("run", ["/etc/x", "../x", "a/b"])
def test_no_run_is_opened_under_a_path(bench, run):
    assert rejected(bench, bench.join("agg", "aggregator", run=run))[0] == "run"
    assert bench.entries == []


@pytest.mark.parametrize(
    ("ranges", "allowed", "beyond"),
    [
        (((0, 9),), ((0, 9),), None),
        (((0, 9),), ((5, 9), (0, 4)), None),
        (((0, 9),), ((0, 4), (6, 9)), 5),
        (((3, 4), (8, 12)), ((0, 10),), 11),
        ((), (), None),
        (((0, 0),), (), 0),
        (((2, 7),), ((0, 5), (1, 2), (4, 8)), None),
    ],
)
def test_ranges_within_ranges(ranges, allowed, beyond):
    assert first_beyond(ranges, allowed) == beyond
