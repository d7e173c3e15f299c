"""The kinds of attacks of the drill, each with the typed answer that it gets in both columns."""

from functools import partial

import msgpack
from msgspec import Struct

from fedmq.broker.rejections import Code, RejectCode
from tests.attacks import acts
from tests.attacks.acts import hellos, posts, raw, sends
from tests.attacks.honest import MODEL
from tests.attacks.peer import VERSION, digest
from tests.attacks.world import MALLORY, public_key

IGNORED, NO_BYTES, WAITS, UNKNOWN_SESSION = "ignored", "no bytes", "waits", "unknown session"


class Kind(Struct, frozen=True):
    """A kind of attack.

    attack: takes the stage, and returns the peer whose answer counts.
    loopback, keys: the first typed answer that it gets in each column; None where there is no
        such attack.
    accepted: messages of the attacker that the broker rightly accepts.
    """

    name: str
    attack: object
    loopback: object
    keys: object = "as loopback"
    accepted: int = 0

    def expected(self, keys):
        return self.loopback if not keys or self.keys == "as loopback" else self.keys


def deep(depth):
    body = {}
    for _ in range(depth):
        body = {"a": body}
    return body


def header_of(size):
    return msgpack.packb({"v": VERSION, "kind": "beat", "x": b"x" * size})


def batch(*headers):
    return msgpack.packb([[each, 0] for each in headers])


BEAT = msgpack.packb({"v": VERSION, "kind": "beat"})
LIE = [{"digest": digest(b"lie"), "size": 1 << 40}]
OTHERS_OWN = ("welcome", "wait", "reject", "receipt", "full", "deliver", "stranger", "enrolled")


KINDS = [
    # ---- forged messages
    Kind("a task", posts("task", "client/0", {"client": 0}), Code.NOT_ALLOWED),
    Kind("a task to its own client", posts("task", "client/9", {"client": 9}), Code.NOT_ALLOWED),
    Kind(
        "a task with the aggregator's next id", acts.takes_the_aggregators_next_id, Code.NOT_ALLOWED
    ),
    Kind(
        "a task from the aggregator",
        acts.forges_the_aggregators_next_task,
        Code.NOT_OWN,
    ),
    Kind("a result from another worker", posts("result", "aggregator", sender="w1"), Code.NOT_OWN),
    Kind("a message from the broker", posts("joined", "aggregator", sender="broker"), Code.NOT_OWN),
    Kind("a message of another run", posts("result", "aggregator", run="q"), Code.NOT_OWN),
    *(
        Kind(f"a {kind} of its own", posts(kind, "aggregator"), Code.RESERVED_KIND)
        for kind in ("joined", "left", "tick", "refused", "continued")
    ),
    Kind("an evaluation", posts("evaluate", "evaluator"), Code.NOT_ALLOWED),
    Kind("an evaluation by a client", posts("evaluate", "client/0"), Code.NOT_ALLOWED),
    Kind("a version record", posts("version", "record", {"version": 99}), Code.NOT_ALLOWED),
    Kind("the record of the end", posts("finished", "record"), Code.NOT_ALLOWED),
    Kind("a checkpoint", posts("version", "checkpoint", {"version": 99}), Code.NOT_ALLOWED),
    Kind("a timer", posts("timer", "timer", {"token": "x", "after_s": 0}), Code.NOT_ALLOWED),
    Kind("a result for the evaluator", posts("result", "evaluator"), Code.NOT_ALLOWED),
    Kind("a note to another node", posts("note", "node/w1"), (Code.NOT_ALLOWED, Code.NO_ADDRESS)),
    *(
        Kind(f"a message to {to!r}", posts("result", to), (Code.NOT_ALLOWED, Code.NO_ADDRESS))
        for to in ("client/09", "client/-1", "client/\u0663", "client/10", "../w1", "broker")
    ),
    Kind("a result never asked for", acts.answers_without_its_own_delivery, Code.NOT_ASKED),
    Kind("a kind of its own invention", posts("gossip", "aggregator"), Code.NOT_ASKED),
    Kind("a result for another's task", acts.answers_another_task, Code.NOT_ASKED),
    Kind(
        "a result for another's task, consuming it",
        acts.answers_another_task_and_consumes_it,
        Code.NOT_ASKED,
    ),
    Kind("a second result for its task", acts.answers_twice, Code.NOT_ASKED, accepted=1),
    Kind("a score by a worker", acts.answers_its_own_task_as_a_score, Code.NOT_ASKED),
    Kind("an evaluator's task", acts.evaluates, Code.NOT_ALLOWED),
    Kind("an evaluator's evaluation", partial(acts.evaluates, kind="evaluate"), Code.NOT_ALLOWED),
    Kind(
        "an evaluator's score that nobody asked for",
        partial(acts.evaluates, kind="score", to="aggregator", re="aggregator/0"),
        Code.NOT_ASKED,
    ),
    Kind("an observer's result", acts.is_an_observer, Code.NOT_ALLOWED),
    Kind("an observer's task", partial(acts.is_an_observer, kind="task"), Code.NOT_ALLOWED),
    # ---- what belongs to others
    Kind("done with others' messages", acts.done_of_others, IGNORED),
    Kind("a rejection of others' tasks", acts.rejects_the_tasks_of_others, IGNORED),
    Kind("another client's model", acts.wants_the_model_of_another_client, NO_BYTES),
    Kind("another client's update", partial(acts.wants, owner="w1", data=b"update"), NO_BYTES),
    Kind("the checkpoint's model", partial(acts.wants, data=MODEL), NO_BYTES),
    Kind(
        "a blob by the name of the broker",
        partial(acts.wants, owner="broker", data=MODEL),
        NO_BYTES,
    ),
    Kind("a blob by its own name", partial(acts.wants, owner=MALLORY, data=MODEL), NO_BYTES),
    Kind("its model after it is done", acts.wants_its_model_after_it_is_done, NO_BYTES),
    Kind("a blob before Hello", acts.wants_before_it_says_hello, UNKNOWN_SESSION),
    Kind("a post before Hello", acts.posts_before_it_says_hello, UNKNOWN_SESSION),
    Kind("the end of the run", sends("over", reason="mine"), RejectCode.UNEXPECTED),
    *(
        Kind(f"a {kind} frame", sends(kind, **fields), RejectCode.UNEXPECTED)
        for kind, fields in {
            "welcome": {"run": "r", "beat_s": 1.0, "lease_s": 1.0},
            "wait": {},
            "reject": {"code": "x", "reason": "x"},
            "receipt": {"upto": 1 << 60},
            "full": {"reason": "x"},
            "deliver": {"seq": 0, "at": 0.0, "message": b""},
            "stranger": {},
            "enrolled": {"key": public_key("w1")},
        }.items()
    ),
    # ---- names, sessions, roles
    *(
        Kind(
            f"the name of a worker that is {state}",
            partial(acts.takes_a_name, state=state),
            RejectCode.NAME,
        )
        for state in ("alive", "away", "restarted")
    ),
    *(
        Kind(
            f"the place of an aggregator that is {state}",
            partial(acts.takes_the_place, state=state),
            RejectCode.NAME,
            RejectCode.ROLE,
        )
        for state in ("alive", "away", "restarted")
    ),
    *(
        Kind(
            f"the place of an absent aggregator with the session {session[:8]!r}",
            partial(acts.takes_the_place, state="away", session=session),
            RejectCode.NAME,
            RejectCode.ROLE,
        )
        for session in ("zzzz", "f" * 100, "9" * 100)
    ),
    Kind(
        "the place of an absent aggregator under another name",
        partial(acts.takes_the_place, state="away", name="second"),
        RejectCode.RUN,
        RejectCode.ROLE,
    ),
    Kind(
        "a second aggregator",
        partial(acts.takes_the_place, state="alive", name="second"),
        RejectCode.RUN,
        RejectCode.ROLE,
    ),
    Kind("the session of another", acts.repeats_a_session, RejectCode.NAME),
    Kind("the routing id of another", acts.claims_a_routing_id, None, UNKNOWN_SESSION),
    Kind(
        "the name of a worker as an evaluator",
        hellos("w1", "evaluator"),
        RejectCode.NAME,
        RejectCode.ROLE,
    ),
    Kind("a second evaluator", hellos("eva2", "evaluator"), RejectCode.CLIENT, RejectCode.ROLE),
    Kind("a role that does not exist", hellos("x", "admin"), RejectCode.ROLE),
    Kind("the role of the broker", hellos("x", "broker"), RejectCode.ROLE),
    *(
        Kind(f"the name {name[:16]!r}", hellos(name), RejectCode.NAME)
        for name in (
            *("../x", "/etc/passwd", ".", "..", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[31mred"),
            *("\u202ex", "n\u00f6de", "-rf", "broker", "record", "x" * 101),
        )
    ),
    Kind("a name of 121 characters", hellos("x" * 121), RejectCode.UNREADABLE),
    *(
        Kind(f"the run {run[:16]!r}", hellos("x", run=run), RejectCode.RUN)
        for run in ("/etc/x", "../x", "a\0b", "a\nb", "\u202ex", "x" * 101, "C:\\x")
    ),
    *(
        Kind(
            f"a new run {run[:16]!r}",
            hellos("x", "aggregator", run, config="x", total_clients=1),
            RejectCode.RUN,
        )
        for run in ("/etc/x", "../x", "a\nb", "")
    ),
    # ---- clients, runs, sizes
    Kind("clients of others", hellos("x", clients=[[0, 4]]), RejectCode.CLIENT),
    Kind("one client of another", hellos("x", clients=[[4, 4]]), RejectCode.CLIENT),
    Kind("clients that the run lacks", hellos("x", clients=[[10, 10]]), RejectCode.CLIENT),
    Kind("clients from high to low", hellos("x", clients=[[9, 8]]), RejectCode.CLIENT),
    Kind("the same client twice", hellos("x", clients=[[9, 9], [9, 9]]), RejectCode.CLIENT),
    Kind(
        "2^20 clients",
        hellos("x", clients=[[0, 1 << 20]]),
        (RejectCode.LIMIT, RejectCode.CLIENT),
    ),
    Kind(
        "2^62 clients",
        hellos("x", clients=[[0, 1 << 62]]),
        (RejectCode.LIMIT, RejectCode.CLIENT),
    ),
    Kind(
        "more clients than a node may host",
        hellos("x", clients=[[0, 8]]),
        RejectCode.LIMIT,
        (RejectCode.LIMIT, RejectCode.CLIENT),
    ),
    Kind(
        "1,001 ranges",
        hellos("x", clients=[[9, 9]] * 1001),
        (RejectCode.LIMIT, RejectCode.CLIENT),
    ),
    Kind(
        "a run of 2^62 clients",
        hellos("x", "aggregator", "q", config="x", total_clients=1 << 62),
        RejectCode.RUN,
    ),
    Kind("very many runs", partial(acts.opens_runs, count=5), RejectCode.LIMIT, RejectCode.ROLE),
    Kind("very many names", partial(acts.joins_often, count=60), RejectCode.LIMIT),
    Kind(
        "a run that does not exist", hellos("x", run="q"), "waits", (RejectCode.RUN, RejectCode.KEY)
    ),
    Kind(
        "another configuration",
        acts.asks_for_another_configuration,
        RejectCode.NAME,
        RejectCode.ROLE,
    ),
    Kind("a worker's configuration of 60 kB", hellos("x", config="x" * 60_000), RejectCode.CONFIG),
    Kind(
        "a new run's configuration of 60 kB",
        hellos("x", "aggregator", "q", config="x" * 60_000, total_clients=1),
        RejectCode.CONFIG,
    ),
    # ---- bytes
    Kind("done with 50,000 messages", sends("done", seqs=[100] * 50_000), RejectCode.UNREADABLE),
    Kind(
        "a post that consumes 50,000 messages",
        sends("post", message=b"x" * 40, consumes=[100] * 50_000),
        RejectCode.UNREADABLE,
    ),
    Kind(
        "12,000 rejections in one frame",
        sends("done", refused=dict.fromkeys(range(12_000), "")),
        RejectCode.UNREADABLE,
    ),
    Kind("a header of 64 KiB", raw(lambda: header_of(1 << 16)), RejectCode.UNREADABLE),
    Kind("no header", raw(b""), RejectCode.UNREADABLE),
    Kind("text", raw(b"GET / HTTP/1.1\r\n\r\n"), RejectCode.UNREADABLE),
    Kind("a frame without a kind", raw(msgpack.packb({"v": VERSION})), RejectCode.UNREADABLE),
    Kind("an unknown kind of frame", sends("shell", command="id"), RejectCode.UNREADABLE),
    Kind("a frame of version 0", sends("beat", v=[0, 1]), RejectCode.VERSION),
    Kind("a frame of version 9", sends("beat", v=[9, 0]), RejectCode.VERSION),
    Kind("an unknown frame of version 9", sends("shell", v=[9, 0]), RejectCode.VERSION),
    Kind("a batch of batches", raw(batch(batch(BEAT))), RejectCode.UNREADABLE),
    Kind("an empty batch", raw(msgpack.packb([])), RejectCode.UNREADABLE),
    Kind("a batch with one bad frame", raw(batch(BEAT, b"bad")), RejectCode.UNREADABLE),
    Kind("a batch of -1 buffers", raw(msgpack.packb([[BEAT, -1]])), RejectCode.UNREADABLE),
    Kind("65 buffers", raw(BEAT, *[b"x"] * 65), RejectCode.UNREADABLE),
    Kind("a message that is none", sends("post", message=b"x" * 40), Code.UNREADABLE),
    Kind("a message of 50 kB", partial(acts.answers, body={"x": "x" * 50_000}), Code.UNREADABLE),
    Kind("a body 33 deep", partial(acts.answers, body=deep(33)), Code.TOO_DEEP),
    Kind(
        "a body 400 deep",
        partial(acts.answers, body=deep(400)),
        (Code.TOO_DEEP, Code.UNREADABLE),
    ),
    Kind(
        "65 blobs",
        partial(acts.answers, blobs=LIE * 65),
        Code.UNREADABLE,
    ),
    Kind(
        "a blob with a wrong digest",
        partial(acts.answers, buffers=[b"truth"], blobs=[{"digest": b"x" * 16, "size": 5}]),
        Code.BAD_BLOB,
    ),
    Kind(
        "a blob with a wrong size",
        partial(
            acts.answers,
            buffers=[b"truth"],
            blobs=[{"digest": digest(b"truth"), "size": 9}],
        ),
        Code.BAD_BLOB,
    ),
    Kind(
        "an empty blob with a digest",
        partial(acts.answers, blobs=[{"digest": b"x" * 16, "size": 0}]),
        Code.BAD_BLOB,
    ),
    Kind(
        "a blob that is not among the message's",
        acts.sends_a_blob_that_no_message_names,
        Code.BAD_BLOB,
    ),
    Kind("a number that was skipped", sends("done", n=1 << 40), UNKNOWN_SESSION),
    Kind("credit for what was never sent", sends("beat", taken=1 << 60), IGNORED),
    Kind("bytes read that were never pointed to", sends("done", read=1 << 62), IGNORED),
    # ---- keys and invites
    Kind(
        "a key handed in without an invite",
        acts.enrolls,
        RejectCode.UNEXPECTED,
        (RejectCode.INVITE, RejectCode.UNEXPECTED),
    ),
    Kind(
        "an invite that has expired",
        partial(acts.enrolls, invite="expired"),
        None,
        RejectCode.INVITE,
    ),
    Kind(
        "an invite that is used up",
        partial(acts.enrolls, invite="used-up"),
        None,
        RejectCode.INVITE,
    ),
    Kind(
        "an invite that was revoked",
        partial(acts.enrolls, invite="revoked"),
        None,
        (RejectCode.KEY, RejectCode.INVITE),
    ),
    Kind("an invite for one, used twice", acts.uses_an_invite_twice, None, RejectCode.INVITE),
    Kind(
        "an invite with the key of an authorised node",
        acts.enrolls_the_key_of_another,
        None,
        RejectCode.KEY,
    ),
    Kind(
        "an invite with its own key",
        partial(acts.enrolls, invite="invite", key="invite"),
        None,
        RejectCode.KEY,
    ),
    Kind(
        "Hello with an invite's key",
        acts.with_an_invite("hello", node="w9", role="worker", session="1", run="r"),
        None,
        (RejectCode.KEY, RejectCode.UNEXPECTED, RejectCode.INVITE),
    ),
    *(
        Kind(
            f"a {kind} with an invite's key",
            acts.with_an_invite(kind, **fields),
            None,
            (RejectCode.KEY, RejectCode.UNEXPECTED, RejectCode.INVITE, UNKNOWN_SESSION),
        )
        for kind, fields in {
            "post": {},
            "want": {"owner": "aggregator", "digest": digest(MODEL), "start": 0, "size": 1},
            "beat": {},
        }.items()
    ),
    Kind(
        "a key that nobody knows", partial(acts.says_hello_with, key="nobody"), None, RejectCode.KEY
    ),
    Kind(
        "a post with a revoked key",
        acts.sends_after_its_key_was_revoked,
        None,
        RejectCode.KEY,
    ),
    Kind(
        "Hello with a revoked key",
        partial(acts.sends_after_its_key_was_revoked, hello=True),
        None,
        RejectCode.KEY,
    ),
    Kind(
        "a client that its key has lost",
        acts.loses_a_client,
        None,
        (RejectCode.KEY, RejectCode.CLIENT),
    ),
    Kind("the same node on two hosts", acts.runs_on_two_hosts, RejectCode.REPLACED),
]
