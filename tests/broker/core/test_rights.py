"""Who may post what to whom: the table, row by row, and what each key may be."""

import itertools
from pathlib import Path

import pytest

from fedmq.broker.access.rights import ANY, KINDS, LOCAL, TABLE, MayPost, Origin, Rights
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.rejections import Code
from fedmq.broker.wire.addresses import ROLES
from fedmq.broker.wire.schema import Deliver, Reject, RunEnded, Wait, Welcome

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
TRACES = sorted((ROOT / "tests" / "golden" / "traces").rglob("ledger"))
PLACES = ("client/0", "client/9", "evaluator", "aggregator", "record", "checkpoint", "timer")
PEERS = {"aggregator": b"agg:s1", "evaluator": b"ev:s1", "worker": b"w1:s1", "observer": b"eye:s1"}
ANSWERS = {"worker": ("result", "failed", "score"), "evaluator": ("failed", "score")}
BODY = {"token": "t", "after_s": 1.0, "back": [[0, 1]], "away": [[4, 4]]}
ALLOWED = {
    ("aggregator", "task", "client/0"),
    ("aggregator", "task", "client/9"),
    ("aggregator", "evaluate", "client/0"),
    ("aggregator", "evaluate", "client/9"),
    ("aggregator", "evaluate", "evaluator"),
    ("aggregator", "run", "record"),
    ("aggregator", "run", "checkpoint"),
    ("aggregator", "version", "record"),
    ("aggregator", "version", "checkpoint"),
    ("aggregator", "finished", "record"),
    ("aggregator", "finished", "checkpoint"),
    ("aggregator", "timer", "timer"),
    ("worker", "availability", "aggregator"),
    *{("aggregator", "own", place) for place in PLACES},
}
"""What may be posted unasked; ``own`` is a kind that the table does not name."""
KNOWN = (
    *("task", "evaluate", "run", "version", "finished", "timer"),
    *("result", "failed", "score", "availability"),
)


@pytest.fixture
def room(bench):
    bench.joined("agg", "aggregator")
    bench.joined("ev", "evaluator")
    bench.joined("w1", clients=((0, 4),))
    bench.joined("eye", "observer")
    bench.sent.clear()
    return bench


def test_the_table_names_the_kinds_that_the_programs_post():
    assert {*KNOWN, "*"} == KINDS
    assert {row.role for row in TABLE} == {*ROLES} - {"observer"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", [*KNOWN, "own"])
def test_unasked_posts_are_accepted_from_the_aggregator_alone(room, role, kind):
    for place in PLACES:
        before = len(room.refusals())
        room.post(PEERS[role], place, kind=kind, body=BODY)
        refused = room.refusals()[before:]
        assert (refused == []) == ((role, kind, place) in ALLOWED), place
        if refused:
            may_answer = (*ANSWERS.get(role, ()), "own") if role in ANSWERS else ()
            asked = place == "aggregator" and kind in may_answer
            assert refused[0].code == (Code.NOT_ASKED if asked else Code.NOT_ALLOWED), place


def asked(room, kind, to, peer):
    """Post a request to a node; return (number, id) of its delivery."""
    room.take(peer)
    room.post(PEERS["aggregator"], to, kind=kind)
    [deliver] = room.take(peer, Deliver)
    return deliver.seq, room.entries[deliver.seq].read().id


@pytest.mark.parametrize(
    ("role", "kind"), [(role, kind) for role in ANSWERS for kind in (*ANSWERS[role], "own")]
)
def test_an_answer_is_accepted_once(room, role, kind):
    peer = PEERS[role]
    to = "client/3" if role == "worker" else "evaluator"
    seq, name = asked(room, "evaluate", to, peer)
    room.post(peer, "aggregator", kind=kind, re=name, consumes=(seq,))
    assert room.refusals() == []
    assert room.inbox(PEERS["aggregator"])[-1].kind == kind
    room.post(peer, "aggregator", kind=kind, re=name, consumes=(seq,))
    [refusal] = room.refusals()
    assert refusal.code == Code.NOT_ASKED


def test_an_answer_names_what_it_consumes_first(room):
    worker = PEERS["worker"]
    one, first = asked(room, "task", "client/0", worker)
    two, second = asked(room, "task", "client/1", worker)
    posts = [
        ({"re": first}, ()),
        ({"re": second}, (one,)),
        ({}, (one,)),
        ({"re": first}, (two, one)),
        ({"re": first}, (999, one)),
    ]
    for fields, consumes in posts[:3]:
        room.post(worker, "aggregator", kind="result", consumes=consumes, **fields)
    assert [each.code for each in room.refusals()] == [Code.NOT_ASKED] * 3
    # It has given up the first task with the second post; only the other one is left.
    for fields, consumes in posts[3:]:
        room.post(worker, "aggregator", kind="result", consumes=consumes, **fields)
    assert len(room.refusals()) == 5


def test_a_notice_is_no_request(room):
    """Otherwise each rejected post would give the right to another one."""
    worker = PEERS["worker"]
    room.post(worker, "moon")
    [deliver] = room.take(worker, Deliver)
    notice = room.entries[deliver.seq].read()
    assert notice.kind == "refused"
    room.post(worker, "aggregator", kind="result", re=notice.id, consumes=(deliver.seq,))
    assert room.refusals()[-1].code == Code.NOT_ASKED


def test_another_nodes_request_gives_no_right(room):
    other = room.joined("w2", clients=((5, 9),))
    seq, name = asked(room, "task", "client/0", PEERS["worker"])
    room.post(other, "aggregator", kind="result", re=name, consumes=(seq,))
    assert room.refusals()[-1].code == Code.NOT_ASKED
    assert seq in room.pending()


def test_two_answers_at_once_count_once_and_no_blob_of_a_forged_one_is_fetched(room):
    worker = PEERS["worker"]
    seq, name = asked(room, "task", "client/0", worker)
    large = bytes(2 << 20)
    room.post(worker, "aggregator", kind="result", blobs=[large], re="x", consumes=(seq,))
    assert [type(frame) for frame, _ in room.sent[worker]] == [Deliver]  # the notice
    seq, name = asked(room, "task", "client/1", worker)
    for number in range(2):
        room.post(worker, "aggregator", kind="result", id=f"{number}", re=name, consumes=(seq,))
    assert [each.id for each in room.refusals()][1:] == ["1"]


def test_an_answer_that_was_rejected_can_come_again_once_it_is_asked_for(room):
    """After a power failure, a node may answer a task that its broker sends again later."""
    worker = PEERS["worker"]
    room.post(worker, "aggregator", kind="result", id="a", re="agg:s1/0")
    assert room.refusals()[0].code == Code.NOT_ASKED
    seq, name = asked(room, "task", "client/0", worker)
    room.post(worker, "aggregator", kind="result", id="a", re=name, consumes=(seq,))
    assert len(room.refusals()) == 1


@pytest.mark.parametrize("then", ["reconnects", "lapses and returns", "sees the broker restart"])
def test_an_honest_answer_is_accepted_however_the_session_went_on(room, then):
    worker, agg = PEERS["worker"], PEERS["aggregator"]
    seq, name = asked(room, "task", "client/0", worker)
    if then == "lapses and returns":
        for _ in range(15):
            room.wake(room.now + 1.0)
            room.join("agg", "aggregator", got=seq)
        assert [body["node"] for _, body in room.said("left")][-1:] != ["agg"]
    elif then == "sees the broker restart":
        room.restart()
        room.join("agg", "aggregator")
    room.join("w1", clients=((0, 4),), got=seq + 1)
    assert room.take(worker, Deliver) == []
    room.post(worker, "aggregator", kind="result", re=name, consumes=(seq,), n=0)
    room.post(worker, "aggregator", kind="result", re=name, consumes=(seq,), n=0)
    assert room.refusals() == []
    assert [each.kind for each in room.inbox(agg)][-1] == "result"


def test_an_answer_that_is_sent_again_after_a_restart_is_a_duplicate(room):
    worker = PEERS["worker"]
    seq, name = asked(room, "task", "client/0", worker)
    room.post(worker, "aggregator", kind="result", re=name, consumes=(seq,), n=0)
    room.restart()
    room.join("w1", clients=((0, 4),), got=seq + 1)
    room.post(worker, "aggregator", kind="result", re=name, consumes=(seq,), n=0)
    assert room.refusals() == []


def test_a_task_that_moved_with_its_client_is_answered_by_its_new_host_alone(room):
    worker = PEERS["worker"]
    seq, name = asked(room, "task", "client/0", worker)
    room.wake(room.now + 30.0)
    other = room.join("w2", clients=((0, 4),))
    room.join("agg", "aggregator", got=0)
    [deliver] = room.take(other, Deliver)
    assert deliver.seq == seq
    room.post(other, "aggregator", kind="result", re=name, consumes=(seq,))
    assert room.refusals() == []


@pytest.mark.parametrize("trace", TRACES, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_recorded_runs_keep_to_the_table(trace):
    roles, ids = {}, {}
    rows = {(row.role, kind, to): row.asked for row in TABLE for kind in row.kinds for to in row.to}
    for entry in read_entries(trace):
        if not isinstance(entry, Accepted):
            continue
        message = entry.read()
        ids[entry.seq] = message.id
        if message.kind == "joined" and message.sender == "broker":
            roles[message.body["node"]] = message.body["role"]
        if message.sender != "broker":
            to = message.to.partition("/")[0]
            if rows[roles[message.sender], message.kind, to]:
                assert ids[entry.consumes[0]] == message.re


def test_only_an_aggregator_ends_its_run(room):
    for role in ("worker", "evaluator", "observer"):
        room.tell(PEERS[role], RunEnded(reason="mine"))
        [reject] = room.take(PEERS[role], Reject)
        assert reject.code == "unexpected"
    assert not room.core._mailboxes.runs["r"].over


def test_an_observer_is_recorded_and_delivered_to_nobody(room):
    joined = [each for each in room.messages() if each.kind == "joined"]
    assert [(each.body["node"], each.to) for each in joined][-1] == ("eye", "record")
    room.wake(room.now + 30.0)
    left = [each for each in room.messages() if each.kind == "left"]
    assert {each.body["node"]: each.to for each in left}["eye"] == "record"
    assert room.take(room.join("eye", "observer"), Welcome)[0].config == "[run]"
    peer = room.join("eye2", "observer", clients=((5, 5),))
    assert room.take(peer, Reject)[0].code == "client"


# ---- what a key may be

AGG, BOB, EVE = (letter * 40 for letter in "abe")


def rights(key, *roles, **more):
    return Rights(name=f"key-{key[0]}", key=key, roles=roles or ("worker",), **more)


@pytest.fixture
def keyed(bench):
    """A broker whose run r has an aggregator with a key."""
    bench.allow(rights(AGG, "aggregator", "worker"), rights(BOB, clients=((0, 2), (3, 4))))
    bench.joined("agg", "aggregator", origin=Origin(AGG))
    return bench


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"clients": ((0, 4),)}, None),
        ({"clients": ((4, 5),)}, "client"),
        ({"clients": ((9, 9),)}, "client"),
        ({"role": "evaluator"}, "role"),
        ({"role": "aggregator", "run": "r"}, "role"),
        ({"role": "aggregator", "run": "mine"}, "role"),
        ({"origin": Origin(EVE)}, "key"),
        ({"origin": Origin()}, "key"),
    ],
)
def test_a_key_is_held_to_its_rights(keyed, fields, code):
    peer = keyed.join("w1", **{"origin": Origin(BOB), **fields})
    frame = keyed.take(peer)[0]
    assert (None if isinstance(frame, Welcome) else frame.code) == code
    assert len(keyed.core._mailboxes.runs) == 1


def test_a_key_joins_and_learns_of_its_own_runs_only(bench):
    bench.allow(
        rights(AGG, "aggregator"),
        rights(BOB, runs=("b", "c")),
        rights(EVE, "aggregator", "worker", runs=("eve",)),
    )
    agg, bob, eve = Origin(AGG), Origin(BOB), Origin(EVE)
    for run in ("a", "b"):
        bench.joined("agg", "aggregator", run=run, session=run, origin=agg, config="secret")
    assert bench.take(bench.join("x", "aggregator", run="a2", origin=eve), Reject)[0].code == "run"
    assert bench.take(bench.join("x", "aggregator", run="a", origin=eve), Reject)[0].code == "run"
    # With one run of its own, a worker's choice is clear, however many others there are.
    bench.joined("w", origin=bob)
    assert bench.take(bench.join("w", session="2", run="a", origin=bob), Reject)[0].code == "run"
    bench.joined("agg", "aggregator", run="c", session="c", origin=agg)
    [reject] = bench.take(bench.join("w3", origin=bob), Reject)
    assert reject.reason.endswith("choose one with --run-id: b, c")
    [wait] = bench.take(bench.join("w4", run="eve", origin=eve), Wait)
    assert wait.serving == Wait().serving
    assert not any("secret" in str(frame) for peer in bench.sent for frame, _ in bench.sent[peer])


def test_files_are_for_keys_that_may_read_them_and_for_this_host(bench):
    bench.allow(rights(AGG, "aggregator", read_files=True), rights(BOB), keyless=LOCAL)
    bench.join("agg", "aggregator", origin=Origin(AGG, "10.0.0.1"))
    bench.join("w1", origin=Origin(BOB))
    bench.join("w2", origin=Origin("", "127.0.0.1"))
    bench.join("w3", origin=Origin("", "10.0.0.1"))
    nodes = bench.core._mailboxes.runs["r"].nodes
    assert {name: node.reads_files for name, node in nodes.items()} == {
        "agg": True,
        "w1": False,
        "w2": True,
        "w3": False,
    }


def test_numbers_of_the_table_and_of_this_file_agree():
    places = [place.partition("/")[0] for place in PLACES]
    rows = {(row.role, kind, to) for row in TABLE for kind in row.kinds for to in row.to}
    for role, kind, to in itertools.product(ROLES, KNOWN, {*places}):
        here = any((role, kind, place) in ALLOWED for place in PLACES if place.startswith(to))
        answers = to == "aggregator" and kind in ANSWERS.get(role, ())
        assert ((role, kind, to) in rows) == (here or answers)


def test_the_documentation_has_the_same_table():
    lines = (DOCS / "protocol.md").read_text().splitlines()
    start = lines.index("| role | kinds of messages | to | must answer |")
    found = []
    for line in itertools.takewhile(lambda each: each.startswith("|"), lines[start + 2 :]):
        role, kinds, to, asked = (cell.strip() for cell in line.strip("|").split("|"))
        names = tuple(kind.strip("`").replace("other", ANY) for kind in kinds.split(", "))
        places = tuple(place.strip("`") for place in to.split(", "))
        found.append(MayPost(role, names, places, asked == "yes"))
    assert tuple(found) == TABLE
