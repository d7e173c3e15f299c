"""A name, and the place of a run's aggregator, belong to their first owner for the run's life."""

import msgspec
import pytest

from fedmq.broker.access.owners import is_owner, key_of, owner_of, session_number
from fedmq.broker.access.rights import Origin, Rights
from fedmq.broker.core.events import ReceivedFrom
from fedmq.broker.ledger.entries import Accepted, Opened
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    Deliver,
    Goodbye,
    Heartbeat,
    Message,
    Post,
    Reject,
    RunEnded,
    UnknownSession,
    Welcome,
)

ANN, BOB, EVE = (letter * 40 for letter in "abe")


def rights(key, **more):
    return Rights(name=f"key-{key[0]}", key=key, **more)


def code(bench, peer):
    """Take the answer to a Hello: the code of a rejection, or "" for a Welcome."""
    frame = bench.take(peer)[0]
    return frame.code if isinstance(frame, Reject) else ""


# ---- names


@pytest.mark.parametrize("secret", ["", "another"])
@pytest.mark.parametrize("away", ["said goodbye", "lapsed", "before a restart"])
def test_a_name_stays_its_nodes_while_the_node_is_away(bench, secret, away):
    bench.joined("agg", "aggregator")
    worker = bench.joined("w1", clients=((0, 4),))
    if away == "said goodbye":
        bench.say(worker, Goodbye())
    else:
        bench.wake(30.0)
    if away == "before a restart":
        bench.restart()
    thief = bench.join("w1", session="2", key=secret, clients=((0, 4),))
    assert code(bench, thief) == "name"
    assert code(bench, bench.join("w1", session="3", clients=((0, 4),))) == ""


def test_a_node_without_a_secret_owns_its_name_with_this_session_alone(bench):
    bench.joined("agg", "aggregator")
    worker = bench.joined("w1", session="1", key="")
    assert code(bench, bench.join("w1", session="1", key="", peer=b"again")) == ""
    bench.say(b"again", Goodbye())
    assert code(bench, bench.join("w1", session="2", key="")) == "name"
    assert code(bench, bench.join("w1", session="1", key="", peer=worker)) == ""


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["agg", "usurper"])
def test_the_aggregators_place_is_its_owners(bench, name, restart):
    agg = bench.joined("agg", "aggregator", session="1")
    bench.timer(agg, "t", 100.0)
    bench.post(agg, "checkpoint", "secret state")
    bench.wake(30.0)
    if restart:
        bench.restart()
    for session in ("zzzz", "ffff", "2"):
        peer = bench.join(name, "aggregator", session, key="another")
        assert code(bench, peer) == ("name" if name == "agg" else "run")
        bench.say(peer, Goodbye())
    back = bench.join("agg", "aggregator", session="2")
    assert bench.take(back, Welcome)[0].checkpoint is not None


def test_the_ledger_holds_a_digest_and_never_the_secret(bench):
    agg = bench.joined("agg", "aggregator", key="very secret 1")
    bench.joined("w1", key="very secret 2")
    bench.say(agg, Goodbye())
    bench.joined("agg", "aggregator", session="2", key="very secret 1")
    data = b"".join(msgspec.msgpack.encode(entry) for entry in bench.entries)
    assert b"very secret" not in data
    [opened] = [entry for entry in bench.entries if isinstance(entry, Opened)]
    joined = [body for _, body in bench.said("joined")]
    assert opened.owner == joined[0]["owner"] == owner_of("", "very secret 1", "any")
    assert all("key" not in body for body in joined)


def test_a_ledger_with_the_secrets_themselves_is_continued(bench):
    """0.1.0 wrote them into `joined`, and no owner into `opened`."""
    bench.joined("agg", "aggregator", session="1", key="ka")
    bench.joined("w1", session="1", key="kw")
    bench.joined("w2", session="1", key="")
    for index, entry in enumerate(bench.entries):
        if isinstance(entry, Opened):
            bench.entries[index] = msgspec.structs.replace(entry, owner="")
        elif isinstance(entry, Accepted):
            message = entry.read()
            body = {k: v for k, v in message.body.items() if k != "owner"}
            secret = {"agg": "ka", "w1": "kw"}.get(body["node"])
            body |= {"key": secret} if secret else {}
            data = encode_message(msgspec.structs.replace(message, body=body))
            bench.entries[index] = msgspec.structs.replace(entry, message=data)
    bench.restart()
    assert code(bench, bench.join("agg", "aggregator", "2", key="kx")) == "name"
    assert code(bench, bench.join("agg2", "aggregator", "2", key="kx")) == "run"
    assert code(bench, bench.join("w1", session="2", key="kx")) == "name"
    assert code(bench, bench.join("w2", session="2", key="")) == "name"
    assert code(bench, bench.join("agg", "aggregator", "2", key="ka")) == ""
    assert code(bench, bench.join("w1", session="2", key="kw")) == ""
    assert code(bench, bench.join("w2", session="1", key="")) == ""


# ---- the order of sessions


@pytest.mark.parametrize(
    ("session", "number"),
    [
        ("zzzz", 0),
        ("s1", 0),
        ("", 0),
        ("00000000000000ff-abcd", 255),
        ("1893a0b2c4d5e6f7-00000001", 0x1893A0B2C4D5E6F7),
        ("f" * 100, (1 << 64) - 1),
        ("FF", 0),
    ],
)
def test_the_number_of_a_session(session, number):
    assert session_number(session) == number


def test_sessions_are_not_ordered_as_text(bench):
    """A session zzzz once locked the true aggregator out, also after a restart of the broker."""
    peer = bench.joined("agg", "aggregator", session="zzzz")
    bench.say(peer, Goodbye())
    bench.restart()
    new = bench.joined("agg", "aggregator", session="1893a0b2c4d5e6f7-00000001")
    assert code(bench, bench.join("agg", "aggregator", session="zzzzz")) == "replaced"
    assert bench.say(new, Heartbeat())
    bench.joined("w", session="9-a")
    assert code(bench, bench.join("w", session="10-a")) == ""


def test_of_sessions_without_a_number_the_last_one_counts(bench):
    bench.joined("agg", "aggregator")
    old = bench.joined("w1", session="x")
    assert code(bench, bench.join("w1", session="a-is-hex-ten")) == ""
    assert bench.take(old, Reject)[0].code == "replaced"
    assert code(bench, bench.join("w1", session="w")) == "replaced"


# ---- keys


@pytest.fixture
def keyed(bench):
    bench.allow(rights(ANN), rights(BOB), rights(EVE))
    bench.joined("agg", "aggregator", session="1", origin=Origin(ANN))
    bench.joined("w1", clients=((0, 4),), origin=Origin(BOB))
    return bench


def test_the_name_of_another_key_is_rejected_with_both_possible_causes(keyed):
    name = rights(BOB).name
    [reject] = keyed.take(keyed.join(name, origin=Origin(EVE)))
    assert reject.code == "name"
    assert reject.reason == (
        f"the name {name!r} is that of another authorised key; this one is {rights(EVE).name}: "
        "set another name with --name or, if this node uses the wrong key, choose the right one "
        "with --key or --keys"
    )


def test_with_keys_the_key_is_the_owner_whatever_secret_comes_with_it(keyed):
    assert [body["owner"] for _, body in keyed.said("joined")] == [ANN, BOB]
    thief = keyed.join("w1", session="2", origin=Origin(EVE))  # with the secret of w1
    assert code(keyed, thief) == "name"
    assert code(keyed, keyed.join("w1", session="2", key="new", origin=Origin(BOB))) == ""
    keyed.restart()
    keyed.allow(rights(ANN), rights(BOB), rights(EVE))
    assert code(keyed, keyed.join("w1", session="3", origin=Origin(EVE))) == "name"
    assert code(keyed, keyed.join("x", "aggregator", "3", origin=Origin(EVE))) == "run"
    assert code(keyed, keyed.join("agg", "aggregator", "3", origin=Origin(ANN))) == ""


def test_a_frame_with_another_key_is_not_handled_in_the_session(keyed):
    """A routing id is the peer's own choice; it is free once its connection is closed."""
    worker = b"w1:s1"
    keyed.post(b"agg:1", "client/0", "task")
    keyed.take(worker)
    entries = len(keyed.entries)
    for frame in (Heartbeat(), Goodbye(), RunEnded()):
        keyed.say(worker, frame, origin=Origin(EVE))
        assert keyed.take(worker) == ([] if isinstance(frame, Goodbye) else [UnknownSession()])
    keyed.post(b"agg:1", "client/1", "for the true node only")
    keyed.wake(keyed.now + 1.0)
    assert keyed.take(worker) == []
    assert len(keyed.entries) == entries + 1
    # Its own session goes on over another connection.
    back = keyed.join("w1", clients=((0, 4),), origin=Origin(BOB), peer=b"new", got=entries)
    assert keyed.texts(back) == ["for the true node only"]
    assert keyed.said("left") == []


def test_a_hello_with_another_key_takes_the_connection_not_the_session(keyed):
    worker = b"w1:s1"
    assert code(keyed, keyed.join("w9", peer=worker, origin=Origin(EVE))) == ""
    assert code(keyed, keyed.join("w1", peer=b"other", origin=Origin(EVE))) == "name"
    keyed.joined("w1", clients=((0, 4),), origin=Origin(BOB), peer=b"new")
    assert keyed.said("left") == []


def test_after_the_end_too_a_session_belongs_to_its_key(keyed):
    keyed.tell(b"agg:1", RunEnded(reason="done"))
    keyed.take(b"w1:s1")
    keyed.say(b"w1:s1", Goodbye(), origin=Origin(EVE))
    keyed.say(b"agg:1", Goodbye())
    assert not keyed.core.idle
    keyed.join("w1", peer=b"new", origin=Origin(BOB))
    keyed.say(b"new", Goodbye())
    assert keyed.core.idle


def test_a_key_that_replaces_another_gets_its_names_and_its_run(keyed):
    keyed.allow(rights(EVE, replaces=(ANN, BOB)))
    assert keyed.take(b"agg:1", Reject)[0].code == "key"
    assert {*keyed.disconnected} == {b"agg:1", b"w1:s1"}
    agg = keyed.join("agg", "aggregator", session="0", origin=Origin(EVE))
    assert code(keyed, agg) == "", "sessions of different owners have no order"
    assert code(keyed, keyed.join("w1", session="0", origin=Origin(EVE))) == ""
    keyed.restart()
    keyed.allow(rights(ANN), rights(EVE))
    assert code(keyed, keyed.join("agg", "aggregator", session="9", origin=Origin(ANN))) == "name"
    assert code(keyed, keyed.join("agg", "aggregator", session="9", origin=Origin(EVE))) == ""


def test_owners():
    assert key_of(ANN) == ANN
    assert key_of(owner_of("", "secret", "s")) == ""
    assert owner_of("", "x", "s") != owner_of("", "", "x")
    assert is_owner(EVE, rights(EVE, replaces=(ANN,)), ANN)
    assert not is_owner(ANN, rights(ANN), EVE)


# ---- revocation


def test_a_revoked_key_loses_its_sessions_and_is_rejected_by_name(keyed):
    keyed.post(b"agg:1", "client/0", "task")
    keyed.take(b"w1:s1")
    keyed.allow(rights(ANN))
    [reject] = keyed.take(b"w1:s1")
    assert (reject.code, reject.reason) == ("key", "the key key-b has been revoked")
    assert keyed.disconnected == [b"w1:s1"]
    [(_, body)] = keyed.said("left")
    assert (body["node"], "interrupted" in body) == ("w1", False)
    entries = len(keyed.entries)
    keyed.post(b"w1:s1", "aggregator", "late")
    keyed.say(b"w1:s1", Heartbeat())
    keyed.join("w1", session="2", origin=Origin(BOB))
    assert [each.code for each in keyed.take(b"w1:s1")] == ["key", "key"]
    assert keyed.take(b"w1:2")[0].reason == "the key key-b has been revoked"
    assert len(keyed.entries) == entries
    # Its clients' messages go to another node, not under its name.
    assert code(keyed, keyed.join("w1", session="5", origin=Origin(ANN))) == "name"
    assert keyed.texts(keyed.join("w2", clients=((0, 4),), origin=Origin(ANN))) == ["task"]


def test_a_session_that_its_key_may_not_have_any_more_ends(keyed):
    keyed.allow(rights(ANN), rights(BOB, clients=((0, 3),)))
    assert keyed.take(b"w1:s1", Reject)[0].code == "client"
    again = keyed.join("w1", session="2", clients=((0, 3),), origin=Origin(BOB))
    assert code(keyed, again) == ""
    keyed.allow(rights(ANN), rights(BOB, runs=("q",)))
    assert keyed.take(again, Reject)[0].code == "run"
    keyed.allow(rights(ANN, roles=("worker",)), rights(BOB))
    assert keyed.take(b"agg:1", Reject)[0].code == "role"


def test_what_does_not_concern_a_session_leaves_it_alone(keyed):
    keyed.take(b"w1:s1")
    keyed.allow(rights(ANN), rights(BOB, read_files=True), rights(EVE))
    keyed.say(b"w1:s1", Heartbeat())
    assert [type(frame) for frame in keyed.take(b"w1:s1")] == [Heartbeat]
    assert keyed.core._mailboxes.runs["r"].nodes["w1"].reads_files


def test_posts_of_a_revoked_key_that_wait_for_blobs_come_again_if_it_returns(keyed):
    large = bytes(2 << 20)
    keyed.post(b"w1:s1", "aggregator", "small")
    keyed.post(b"w1:s1", "aggregator", "large", blobs=[large])
    keyed.allow(rights(ANN))
    keyed.allow(rights(ANN), rights(BOB))
    keyed.join("w1", clients=((0, 4),), origin=Origin(BOB), first=1)
    keyed.post(b"w1:s1", "aggregator", "small again", n=1)
    assert [each for each in keyed.texts(b"agg:1") if each.startswith("small")] == [
        "small",
        "small again",
    ]


def test_a_key_that_waits_for_a_run_is_revoked_too(bench):
    bench.allow(rights(ANN), rights(BOB))
    bench.standing.add(b"w1:s1")
    bench.join("w1", origin=Origin(BOB))
    bench.allow(rights(ANN))
    assert bench.take(b"w1:s1")[-1].code == "key"
    bench.joined("agg", "aggregator", origin=Origin(ANN))
    bench.wake()
    assert bench.take(b"w1:s1", Welcome | Deliver) == []


def test_a_broker_that_begins_to_need_keys_ends_keyless_sessions(bench):
    bench.joined("agg", "aggregator")
    bench.restart()
    bench.allow(rights(ANN))
    [(_, body)] = bench.said("left")
    assert body["node"] == "agg"
    assert bench.take(bench.join("agg", "aggregator", session="2"))[0].code == "key"


def test_a_delivery_of_the_same_turn_does_not_reach_the_new_peer(keyed):
    """The driver handles a batch of frames before it sends anything."""
    fields = {"kind": "task", "id": "agg/0", "run": "r", "sender": "agg", "to": "client/0"}
    task = Post(message=encode_message(Message(**fields)))
    with_other_key = ReceivedFrom(b"w1:s1", Heartbeat(), origin=Origin(EVE))
    keyed.take(b"w1:s1")
    keyed.driver.turn([ReceivedFrom(b"agg:1", task, origin=Origin(ANN)), with_other_key])
    assert keyed.take(b"w1:s1") == [UnknownSession()]
    assert keyed.said("left") == []


def test_names_of_lost_keys_are_released_once_their_nodes_have_left(new_bench):
    bench = with_lost_keys(new_bench, release_names=True)
    assert bench.take(bench.join("agg", "aggregator", session="2"))[0].code == "name"
    bench.wake(bench.now + 100.0)  # the leases end
    assert bench.take(bench.join("agg", "aggregator", session="3"), Welcome)
    assert bench.take(bench.join("w1", session="3"), Welcome)


def test_names_of_lost_keys_stay_theirs_unless_the_operator_releases_them(new_bench):
    bench = with_lost_keys(new_bench, release_names=False)
    bench.wake(bench.now + 100.0)
    reject = bench.take(bench.join("agg", "aggregator", session="3"))[0]
    assert (reject.code, "--release-names" in reject.reason) == ("name", True)


def with_lost_keys(new_bench, *, release_names):
    """Return a broker that was started again, whose nodes have lost their secrets."""
    bench = new_bench(release_names=release_names)
    for node, role in (("agg", "aggregator"), ("w1", "worker")):
        bench.joined(node, role, key=f"lost key of {node}")
    bench.restart()
    return bench
