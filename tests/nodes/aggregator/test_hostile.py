"""Whatever a worker or an evaluator says, the aggregator answers, counts, and goes on."""

import contextlib
import re
import threading

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.broker.errors import WireError
from fedmq.broker.link.events import Delivery
from fedmq.broker.wire.encoding import decode_message, encode_message
from fedmq.nodes.aggregator.computed import Computed
from tests.algorithms.fleet import Fleet, changed, make_setup, with_data

ROUNDS = make_setup({"name": "rounds", "fraction": 1.0}, versions=2)
STREAM = make_setup({"name": "stream", "concurrency": 2}, versions=2)
NORMED = make_setup({"name": "rounds", "fraction": 1.0}, "Normed", versions=2)
SCORED = make_setup({"name": "rounds", "fraction": 1.0}, evaluate_every=1, target_accuracy=1.0)


def with_value(message, data, value):
    """Return a result whose first weight is another."""
    weights = np.frombuffer(data[0], dtype=np.float32).copy()
    weights[0] = value
    return with_data(message, [weights.tobytes(), *data[1:]])


def with_shape(message, data, name, dtype, shape, size):
    """Return a result with one tensor."""
    meta = {"tensors": [[name, dtype, shape]]}
    group = {"name": "weights", "codec": "raw@1", "meta": meta, "buffers": 1}
    return with_data(message, [bytes(size)], body={"groups": [group]})


FAULTS = {
    "a foreign task": (lambda m, d: (changed(m, re="aggregator/999"), d), "no task .* is out"),
    "no task": (lambda m, d: (changed(m, re=None), d), "no task None is out"),
    "a wrong sender": (lambda m, d: (changed(m, sender="w1"), d), "is not with w1"),
    "NaN": (lambda m, d: with_value(m, d, np.nan), "NaN or infinite"),
    "infinity": (lambda m, d: with_value(m, d, np.inf), "NaN or infinite"),
    "a wrong shape": (
        lambda m, d: with_shape(m, d, "weight", "float32", [4], 16),
        r"expected weight as torch.float32 \[2, 2\], got torch.float32 \[4\]",
    ),
    "a missing tensor": (
        lambda m, d: with_shape(m, d, "weight", "float32", [2, 2], 16),
        "expected a tensor 'bias', it is missing",
    ),
    "a wrong dtype": (
        lambda m, d: with_shape(m, d, "weight", "float64", [2, 2], 32),
        r"expected weight as torch.float32 \[2, 2\], got torch.float64",
    ),
    "an impossible shape": (
        lambda m, d: with_shape(m, d, "weight", "float32", [0, 1 << 39, 1 << 39], 0),
        "shape",
    ),
    "too few bytes": (
        lambda m, d: with_shape(m, d, "weight", "float32", [2, 2], 15),
        "has 15 bytes, its tensors need 16",
    ),
    "no numbers": (lambda m, d: (changed(m, body={"numbers": None}), d), "expected numbers"),
    "no examples": (lambda m, d: (changed(m, body={"numbers": {"n": 0}}), d), "expected n"),
    "no groups": (lambda m, d: (changed(m, body={"groups": {}}), d), "expected groups"),
    "groups of nothing": (lambda m, d: (changed(m, body={"groups": [1]}), d), "expected a group"),
    "buffers that are not there": (
        lambda m, d: (changed(m, blobs=()), ()),
        "has 1 buffers, the message has fewer",
    ),
    "a group twice": (
        lambda m, d: with_data(m, [d[0], d[0]], body={"groups": m.body["groups"] * 2}),
        "at most once",
    ),
    "an unknown codec": (
        lambda m, d: (changed(m, body={"groups": [{**m.body["groups"][0], "codec": "zip@1"}]}), d),
        "unknown codec 'zip'",
    ),
    "another version": (
        lambda m, d: (changed(m, body={"groups": [{**m.body["groups"][0], "codec": "raw@2"}]}), d),
        "version 1, got 2",
    ),
}
CODES = {
    "a foreign task": "unknown-task",
    "no task": "unknown-task",
    "a wrong sender": "wrong-node",
    "NaN": "not-finite",
    "infinity": "not-finite",
    "a wrong shape": "wrong-shape",
    "a missing tensor": "wrong-shape",
    "a wrong dtype": "wrong-shape",
    "no examples": "malformed",
}
"""Of all others, the bytes cannot be decoded."""
KEEPS_ITS_TASK = {"a foreign task", "no task", "a wrong sender"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("setup", [ROUNDS, STREAM], ids=["rounds", "stream"])
def test_a_result_that_cannot_be_used_is_refused_and_counted_and_the_run_goes_on(setup, fault):
    spoil, message = FAULTS[fault]
    fleet = Fleet(setup)
    good = fleet.work(*fleet.tasks.pop(0))
    reason = fleet.reason(*spoil(*good))
    assert reason is not None
    assert re.search(message, reason), reason
    assert fleet.codes[fleet.seq] == CODES.get(fault, "undecodable")
    assert fleet.counts == (0, 0, 1, 0)
    assert len(fleet.core._tasks.in_flight) == (
        2 if setup is STREAM or fault in KEEPS_ITS_TASK else 1
    )
    if fault in KEEPS_ITS_TASK:
        fleet.hear(*good)
    assert fleet.run().finished == "2 versions committed"
    assert all(torch.isfinite(each).all() for each in fleet.core.tensors().values())


def test_a_second_result_of_a_task_is_refused():
    fleet = Fleet(ROUNDS)
    result = fleet.work(*fleet.tasks.pop())
    fleet.hear(*result)
    assert "no task" in fleet.reason(*result)
    assert fleet.run().counts == (4, 0, 1, 0)


def test_a_result_that_is_too_stale_is_told_so_and_counted_apart():
    schedule = {"name": "buffered", "size": 1, "concurrency": 2, "max_staleness": 0}
    fleet = Fleet(make_setup(schedule, versions=3))
    late = fleet.work(*fleet.tasks.pop(0))
    fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert fleet.reason(*late) == "too stale: 1 versions behind"
    assert fleet.codes[fleet.seq] == "stale"
    assert fleet.counts == (1, 1, 0, 0)
    assert len(fleet.core._tasks.in_flight) == 2
    assert fleet.run().finished


def test_a_held_result_that_turns_out_bad_does_not_close_the_round():
    """Both are in, one is refused when its turn comes: the round needs another."""
    setup = make_setup({"name": "rounds", "fraction": 1.0, "min_results": 2}, versions=1)
    fleet = Fleet(setup)
    first, second = fleet.work(*fleet.tasks.pop(0)), fleet.work(*fleet.tasks.pop(0))
    seq = fleet.hear(*with_value(*second, np.nan))
    assert seq not in fleet.done_with
    fleet.hear(*first)
    assert "NaN" in fleet.done_with[seq]
    assert fleet.core.version == 0
    assert len(fleet.tasks) == 1
    assert fleet.run().finished


def test_nobody_answers_for_a_client_that_was_never_theirs():
    """Its host is away, but a task is with whom it was sent to."""
    fleet = Fleet(ROUNDS)
    message, data = fleet.work(*fleet.tasks.pop(0))
    fleet.leave("w0")
    assert fleet.reason(changed(message, sender="w1"), data)
    assert fleet.counts[2] == 1
    assert fleet.reason(message, data) is not None
    assert fleet.counts[2] == 1


@pytest.mark.parametrize(
    ("metrics", "code"),
    [
        ({"accuracy": 2.0}, "out-of-range"),
        ({"accuracy": np.inf}, "not-finite"),
        ({"accuracy": 0.5, "loss": np.nan}, "not-finite"),
        ({"accuracy": [1.0]}, "malformed"),
        (None, "malformed"),
    ],
)
def test_an_impossible_score_is_refused_and_does_not_end_the_run(metrics, code):
    fleet = Fleet(SCORED)
    fleet.join_evaluator()
    task, _ = fleet.evaluations.pop(0)
    seq = fleet.say("score", {"metrics": metrics}, "evaluator", task.id)
    assert fleet.codes[seq] == code
    assert fleet.finished is None
    again = fleet.say("score", {"metrics": {"accuracy": 1.0}}, "evaluator", task.id)
    assert fleet.codes[again] == "unknown-task"
    assert fleet.finished is None


def test_a_target_that_only_impossible_scores_reach_ends_the_run_as_failed():
    fleet = Fleet(
        make_setup(
            {"name": "rounds", "fraction": 1.0},
            versions=30,
            evaluate_every=1,
            target_accuracy=1.0,
            failures=3,
        )
    )
    fleet.join_evaluator()
    while fleet.finished is None:
        if fleet.evaluations:
            task, _ = fleet.evaluations.pop(0)
            fleet.say("score", {"metrics": {"accuracy": 2.0}}, "evaluator", task.id)
        else:
            fleet.hear(*fleet.work(*fleet.tasks.pop(0)))
    assert "3 evaluations in a row failed" in fleet.finished
    assert "expected 'accuracy' from -inf to 1, got 2" in fleet.finished


def test_a_score_of_a_version_that_was_never_asked_is_refused():
    fleet = Fleet(SCORED)
    fleet.join_evaluator()
    seq = fleet.say("score", {"metrics": {"accuracy": 1.0}}, "evaluator", "aggregator/999")
    assert fleet.codes[seq] == "unknown-task"
    assert fleet.finished is None


@pytest.mark.parametrize(
    ("n", "code"), [(10**9, ""), (10**9 + 1, "malformed"), (1e30, "malformed")]
)
def test_a_number_of_examples_has_a_documented_limit(n, code):
    fleet = Fleet(STREAM)
    message, data = fleet.work(*fleet.tasks.pop(0))
    seq = fleet.hear(changed(message, body={"numbers": {**message.body["numbers"], "n": n}}), data)
    assert fleet.codes[seq] == code


def test_a_run_limits_the_number_of_examples():
    fleet = Fleet(make_setup({"name": "stream", "concurrency": 2}, versions=2, max_examples=100))
    message, data = fleet.work(*fleet.tasks.pop(0))
    body = {"numbers": {**message.body["numbers"], "n": 101}}
    reason = fleet.reason(changed(message, body=body), data)
    assert reason == "expected at most 100 examples (run.max_examples), got 101"
    assert fleet.codes[fleet.seq] == "too-large"
    assert fleet.run().finished == "2 versions committed"


@pytest.mark.parametrize("schedule", ["rounds", "stream"])
def test_an_update_out_of_all_proportion_is_refused(schedule):
    """A value of 1e20 with n = 75 is far from float32's limit; of the model nothing was left."""
    fleet = Fleet(ROUNDS if schedule == "rounds" else STREAM)
    good = fleet.work(*fleet.tasks.pop(0))
    reason = fleet.reason(*with_value(*good, 1e20))
    assert reason == "the result holds values as large as 1e+20"
    assert fleet.codes[fleet.seq] == "too-large"
    assert fleet.run().finished == "2 versions committed"
    assert all(each.abs().max() < 10 for each in fleet.core.tensors().values())


@pytest.mark.parametrize("schedule", ["rounds", "stream"])
def test_a_run_limits_the_norm_of_an_update(schedule):
    settings = {"rounds": {"fraction": 1.0}, "stream": {"concurrency": 2}}[schedule]
    fleet = Fleet(make_setup({"name": schedule, **settings}, versions=2, max_update_norm=5.0))
    good = fleet.work(*fleet.tasks.pop(0))
    reason = fleet.reason(*with_value(*good, 100.0))
    assert reason.startswith("expected an update of norm 5 at most (run.max_update_norm), got ")
    assert fleet.codes[fleet.seq] == "too-large"
    assert fleet.run().counts[0] >= 2


def test_runs_of_older_releases_are_folded_without_these_checks():
    """Their ledgers replay: what was used is used."""
    fleet = Fleet(STREAM, computed=Computed(rules=1))
    good = fleet.work(*fleet.tasks.pop(0))
    assert fleet.reason(*with_value(*good, 1e20)) == ""
    fleet = Fleet(SCORED, computed=Computed(rules=1))
    fleet.join_evaluator()
    task, _ = fleet.evaluations.pop(0)
    fleet.say("score", {"metrics": {"accuracy": 2.0}}, "evaluator", task.id)
    assert fleet.finished == "accuracy 2.0000 reached the target of 1"


@pytest.mark.parametrize("kind", ["task", "evaluate", "hello", "x"])
def test_a_message_of_another_kind_is_refused(kind):
    fleet = Fleet(ROUNDS)
    seq = fleet.say(kind, {}, "w0")
    assert fleet.done_with[seq] == f"an aggregator takes no {kind!r} messages"
    assert fleet.codes[seq] == "unknown-kind"
    assert fleet.run().finished


# ---- anything at all

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5) | st.integers(0, 9) | st.booleans(), inner, max_size=4
        )
    ),
    max_leaves=10,
)
numbers = anything | st.fixed_dictionaries(
    {"n": st.integers(-1, 5) | anything}, optional={"reply": st.just("model") | anything}
)
rows = (
    st.tuples(
        st.sampled_from(["weight", "bias", "0.weight"]) | anything,
        st.sampled_from(["float32", "int64", "bool"]) | anything,
        st.lists(st.integers(-1, 3), max_size=3) | anything,
    ).map(list)
    | anything
)
groups = st.lists(
    anything
    | st.fixed_dictionaries(
        {
            "name": st.sampled_from(["weights", "exact"]) | anything,
            "codec": st.sampled_from(["raw@1", "cast@1(float16)", "raw@2", "x"]) | anything,
            "meta": st.fixed_dictionaries(
                {"tensors": st.lists(rows, max_size=3) | anything}, optional={"dtypes": anything}
            )
            | anything,
            "buffers": st.integers(-1, 3) | anything,
        }
    ),
    max_size=3,
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "numbers": numbers,
        "groups": groups | anything,
        "client": anything,
        "model_version": anything,
        "metrics": anything | st.fixed_dictionaries({"accuracy": anything}),
        "reason": anything,
    },
)


@pytest.mark.slow
@pytest.mark.parametrize("setup", [ROUNDS, STREAM, NORMED], ids=["rounds", "stream", "normed"])
@given(
    kind=st.sampled_from(["result", "failed"]),
    body=bodies,
    data=st.lists(st.binary(max_size=24), max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_no_body_of_a_result_raises(setup, kind, body, data):
    fleet = Fleet(setup)
    task, _ = fleet.tasks.pop(0)
    answer = changed(task, kind=kind, id="w0/1", sender="w0", to="aggregator", re=task.id)
    answer, data = with_data(answer, data, body={"numbers": None, "groups": None, **body})
    seq = fleet.hear(answer, data)
    assert kind == "failed" or fleet.done_with[seq]
    assert fleet.run().finished == "2 versions committed"


@pytest.mark.slow
@given(body=bodies, sender=st.sampled_from(["evaluator", "w0"]))
@settings(deadline=None, max_examples=100)
def test_no_body_of_a_score_raises(body, sender):
    fleet = Fleet(SCORED)
    fleet.join_evaluator()
    task, _ = fleet.evaluations.pop(0)
    seq = fleet.say("score", body, sender, task.id)
    assert isinstance(fleet.done_with[seq], str)
    assert (sender == "evaluator") or "no evaluation" in fleet.done_with[seq]


def nested(depth):
    """Return a list in a list in a list, as bytes that cost one each."""
    return msgspec.Raw(b"\x91" * depth + b"\xc0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        lambda deep: {"numbers": {"n": deep}},
        lambda deep: {"numbers": {"n": 1}, "groups": [deep]},
        lambda deep: {
            "numbers": {"n": 1},
            "groups": [
                {"name": "weights", "codec": "raw@1", "meta": {"tensors": [deep]}, "buffers": 0}
            ],
        },
    ],
    ids=["a number", "a group", "a row"],
)
def test_no_depth_that_can_be_read_raises(body):
    """A node's link reads messages in a thread of its own, where the stack has more room."""
    read = []
    for depth in range(800, 1000):
        fleet = Fleet(STREAM)
        task, _ = fleet.tasks.pop(0)
        answer = changed(task, kind="result", id="w0/1", sender="w0", re=task.id, blobs=())
        data = encode_message(changed(answer, body=body(nested(depth))))
        thread = threading.Thread(target=read_into, args=(read, data))
        thread.start()
        thread.join()
        if not read:
            return
        fleet.act(fleet.core.handle(Delivery(99, 0.0, read.pop())))
        assert fleet.done_with[99]
    raise AssertionError("the decoder has no limit of depth")


def read_into(found, data):
    """Append the message that the bytes are, if they are one."""
    with contextlib.suppress(WireError):
        found.append(decode_message(data))
