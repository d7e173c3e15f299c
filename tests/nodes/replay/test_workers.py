"""``--worker``: train recorded tasks again and compare the results with the record."""

import re

import pytest
import torch

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.wire.schema import Blob
from fedmq.nodes.replay.fold import recorded_setup
from fedmq.nodes.replay.workers import Retraining, depends_on_device
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from fedmq.nodes.trace.differences import ABSENT, Difference, DifferenceKind, Field, Gap, InGroup
from tests.nodes.replay import material
from tests.nodes.replay.material import (
    BUFFERED,
    GOLDEN,
    NAMES,
    edit,
    refused,
    replay,
    rewrite,
    scaled,
)
from tests.own_code import OWN_CODE
from tests.sim.history import setup_of

NODES = ("worker-0", "worker-1", "evaluator")
OTHER = "cpu of another kind"


def on_this_kind(name, node):
    """The same bytes are promised where they were recorded, and on the like of it."""
    devices = {m.body.get("device", kind_of("cpu")) for _, m in answers(GOLDEN / name, node)}
    return devices == {kind_of("cpu")}


def answers(folder, node):
    kinds = ("result", "score")
    return [each for each in material.messages(folder, sender=node) if each[1].kind in kinds]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """A run of this machine, whatever its kind of CPU, of what the golden trace is of."""
    folder = tmp_path_factory.mktemp("rounds")
    setup = recorded_setup(Trace(GOLDEN / "fedavg-rounds"), allowed=OWN_CODE)
    simulation = Simulation(setup, 2, folder, 3, Chances(train_s=0.3))
    assert simulation.run(0.0, 400.0)
    simulation.close()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_node_of_a_golden_trace(name, node):
    if not on_this_kind(name, node):
        pytest.skip("recorded on another kind of CPU, or by another torch")
    recorded = answers(GOLDEN / name, node)
    *lines, last = replay(GOLDEN / name, "--worker", node).output.strip().split("\n")
    count = len(recorded)
    done = f"evaluated {count} models again" if node == "evaluator" else f"retrained {count} tasks"
    assert last == f"{done}: all results match the record"
    assert len(lines) == len(recorded)
    for (seq, answer), line in zip(recorded, lines, strict=True):
        assert line.startswith(f"{answer.re}, result in entry {seq}: same bytes")


def test_one_task(rounds):
    seq, answer = answers(rounds, "worker-1")[5]
    output = replay(rounds, "--worker", "worker-1", "--task", answer.re).output
    assert output.startswith(f"{answer.re}, result in entry {seq}: ")
    assert output.endswith("retrained 1 task: all results match the record\n")


def test_an_unknown_node(rounds):
    sentence = refused(rounds, "--worker", "worker-9")
    assert "worker-0" in sentence
    assert "'worker-9'" in sentence


def test_the_aggregator_trains_nothing(rounds):
    assert "'aggregator'" in refused(rounds, "--worker", "aggregator")


@pytest.mark.parametrize("task", ["aggregator/999", "x", None])
def test_a_task_that_the_worker_has_no_result_of(rounds, task):
    """There is none, it is no task, or it is another worker's."""
    task = task or answers(rounds, "worker-1")[0][1].re
    sentence = refused(rounds, "--worker", "worker-0", "--task", task)
    assert f"'{task}'" in sentence
    assert answers(rounds, "worker-0")[0][1].re in sentence


# ---- results that are other


def changed(rounds, tmp_path, factor, index=3, **fields):
    """Return a trace in which a result of worker-0 is ``factor`` times as large; its number."""
    seq, answer = answers(rounds, "worker-0")[index]
    # All but the one integer of the model, a count of batches.
    floats = [at for at, blob in enumerate(answer.blobs) if blob.size != 8]
    others = {at: scaled(rounds, seq, factor, at) for at in floats}
    blobs = tuple(others[at][0] if at in others else blob for at, blob in enumerate(answer.blobs))
    data = [("worker-0", each) for _, each in others.values()]
    folder = rewrite(rounds, tmp_path, {seq: edit(blobs=blobs, body=fields)}, blobs=data)
    return folder, seq, answer


def test_a_changed_result_is_found(rounds, tmp_path):
    folder, seq, answer = changed(rounds, tmp_path, 1 + 1e-6)
    output = replay(folder, "--worker", "worker-0", code=1).output
    count = len(answers(rounds, "worker-0"))
    assert f"{answer.re}, result in entry {seq}: differs" in output
    assert "elements differ, by at most" in output
    assert f"retrained {count} tasks: {count - 1} of {count} results match the record" in output
    assert output.count("differs") == 1


@pytest.mark.parametrize(
    "fields",
    [{"client": 2}, {"model_version": 9}, {"numbers": {"n": 5, "reply": "update"}}],
    ids=str,
)
def test_a_changed_field_of_a_result_is_found(rounds, fields, tmp_path):
    seq, answer = answers(rounds, "worker-0")[0]
    folder = rewrite(rounds, tmp_path, {seq: edit(body=fields)})
    output = replay(folder, "--worker", "worker-0", "--task", answer.re, code=1).output
    assert f"body.{next(iter(fields))}" in output


def test_a_changed_score_is_found(rounds, tmp_path):
    seq, answer = answers(rounds, "evaluator")[1]
    metrics = {**answer.body["metrics"], "accuracy": 0.99}
    folder = rewrite(rounds, tmp_path, {seq: edit(body={"metrics": metrics})})
    output = replay(folder, "--worker", "evaluator", code=1).output
    assert f"{answer.re}, result in entry {seq}: differs" in output
    assert "body.metrics.accuracy: 0.99 in the record" in output


def test_a_changed_task_makes_another_result(rounds, tmp_path):
    seq, task = material.messages(rounds, kind="task")[0]
    blob, data = scaled(rounds, seq, 1.01)
    change = edit(blobs=(blob, *task.blobs[1:]))
    folder = rewrite(rounds, tmp_path, {seq: change}, blobs=[("aggregator", data)])
    node = next(m.sender for _, m in material.messages(rounds, kind="result") if m.re == task.id)
    assert "differs" in replay(folder, "--worker", node, "--task", task.id, code=1).output


def test_how_long_it_took_does_not_matter(rounds, tmp_path):
    seq, answer = answers(rounds, "worker-0")[0]
    folder = rewrite(rounds, tmp_path, {seq: edit(body={"elapsed_s": 9.0})})
    assert "same bytes" in replay(folder, "--worker", "worker-0", "--task", answer.re).output


# ---- another kind of device


def test_within_the_tolerance_of_another_device(rounds, tmp_path):
    folder, seq, answer = changed(rounds, tmp_path, 1 + 1e-6, device=OTHER)
    output = replay(folder, "--worker", "worker-0").output
    line = next(
        each
        for each in output.split("\n")
        if each.startswith(f"{answer.re}, result in entry {seq}: ")
    )
    apart = float(re.search(r"distance (\S+) ", line)[1])
    assert 0.5e-6 < apart < 2e-6
    assert OTHER in line
    assert "tolerance 0.001" in line
    assert "match the record" in output


def with_signed_zeros(rounds, tmp_path, **fields):
    """Return a trace in which the zeros of a result are others: -0.0 for 0.0 and back."""
    seq, answer = answers(rounds, "worker-0")[3]
    data = bytes(Trace(rounds).blob(answer, 0))
    values = torch.frombuffer(bytearray(data), dtype=torch.float32)
    assert (values == 0).any()
    other = torch.where(values == 0, -values, values).numpy().tobytes()
    change = edit(blobs=(Blob.of(other), *answer.blobs[1:]), body=fields)
    folder = rewrite(rounds, tmp_path, {seq: change}, blobs=[("worker-0", other)])
    return folder, seq, answer


def test_a_zero_of_another_sign_is_within_the_tolerance_of_another_device(rounds, tmp_path):
    folder, seq, answer = with_signed_zeros(rounds, tmp_path, device=OTHER)
    output = replay(folder, "--worker", "worker-0", "--task", answer.re).output
    assert (
        f"{answer.re}, result in entry {seq}: distance 0 (tolerance 0.001), recorded on " in output
    )
    assert "retrained 1 task: all results match the record, 1 only within the tolerance" in output


def test_a_zero_of_another_sign_differs_on_this_device(rounds, tmp_path):
    folder, seq, answer = with_signed_zeros(rounds, tmp_path)
    output = replay(folder, "--worker", "worker-0", "--task", answer.re, code=1).output
    assert f"{answer.re}, result in entry {seq}: differs" in output
    assert "equal values, different bytes" in output


@pytest.mark.parametrize(
    ("kind", "place", "sides", "gap"),
    [
        (DifferenceKind.MISSING, InGroup("weights", "w"), (ABSENT, "x"), None),
        (DifferenceKind.MISSING, InGroup("weights"), (ABSENT, "x"), None),
        (DifferenceKind.FORM, InGroup("weights", "w"), ("a", "b"), None),
        (DifferenceKind.CODEC, InGroup("weights"), ("a", "b"), None),
        (DifferenceKind.UNDECODABLE, InGroup("weights"), ("a", ABSENT), None),
        (DifferenceKind.VALUES, InGroup("weights", "n"), ("a", "b"), Gap(1, 1, 1.0, rounded=False)),
        (DifferenceKind.FIELD, Field(("body", "metrics.loss")), (1.0, 1.1), None),
        (DifferenceKind.FIELD, Field(("body", "numbers", "n")), (1.0, 1.1), None),
        (DifferenceKind.FIELD, Field(("body", "metrics", "loss")), (1.0, ABSENT), None),
        (DifferenceKind.FIELD, Field(("body", "metrics", "loss")), ("1.0", 1.0), None),
    ],
)
def test_no_device_makes_these_differences(kind, place, sides, gap):
    assert not depends_on_device(Difference(kind, place, sides, gap=gap))


@pytest.mark.parametrize("group", ["weights", "exact", "features", "logits"])
def test_values_of_tensors_and_metrics_depend_on_the_device(group):
    place = InGroup(group, "w")
    assert depends_on_device(Difference(DifferenceKind.VALUES, place, gap=Gap(1, 9, 1e-8)))
    assert depends_on_device(Difference(DifferenceKind.ENCODING, InGroup(group), ("a", "b")))
    loss = Field(("body", "metrics", "loss"))
    assert depends_on_device(Difference(DifferenceKind.FIELD, loss, (0.5, 0.5000001)))


@pytest.mark.parametrize("factor", [1.1, 0.0, -1.0, float("inf")])
def test_beyond_the_tolerance_of_another_device(rounds, factor, tmp_path):
    folder, seq, answer = changed(rounds, tmp_path, factor, device=OTHER)
    output = replay(folder, "--worker", "worker-0", "--task", answer.re, code=1).output
    assert f"{answer.re}, result in entry {seq}: distance " in output
    assert "tolerance 0.001" in output
    assert "elements differ" in output
    assert "retrained 1 task: 0 of 1 results match the record" in output


def test_the_same_bytes_from_another_device_are_the_same_bytes(rounds, tmp_path):
    folder, seq, answer = changed(rounds, tmp_path, 1.0, device=OTHER)
    output = replay(folder, "--worker", "worker-0", "--task", answer.re).output
    assert f"{answer.re}, result in entry {seq}: same bytes" in output


def test_the_distance_is_relative_to_the_record(rounds, tmp_path):
    """|a - b| / |a|, a as recorded: 1.1 times the true one is 1/11 apart."""
    folder, _, answer = changed(rounds, tmp_path, 1.1, device=OTHER)
    trace = Trace(folder)
    again = Retraining(trace, recorded_setup(trace, allowed=OWN_CODE), "worker-0").train_one(
        answer.re
    )
    assert again.distance == pytest.approx(1 / 11, rel=1e-4)
    assert not again.matches


# ---- what a client keeps from task to task


@pytest.fixture(scope="module")
def tallied(tmp_path_factory):
    """A run in which a result tells how many tasks its client has done; nobody crashes."""
    folder = tmp_path_factory.mktemp("tally")
    simulation = Simulation(setup_of(0, 1.0), 2, folder, 5, Chances(train_s=0.3))
    assert simulation.run(1.0, 400.0)
    simulation.close()
    return folder


@pytest.mark.parametrize("node", ["worker-0", "worker-1"])
def test_local_states_are_made_again(tallied, node):
    count = len(answers(tallied, node))
    assert (
        f"retrained {count} tasks: all results match the record"
        in replay(tallied, "--worker", node).output
    )


def late_task(folder):
    """Return the last task of the client that has done most: node, answer."""
    results = [each for _, each in material.messages(folder, kind="result")]
    best = max(results, key=lambda each: each.body["numbers"]["tasks"])
    assert best.body["numbers"]["tasks"] >= 3
    return best


def test_a_late_task_needs_the_earlier_ones(tallied, monkeypatch):
    best = late_task(tallied)
    trained = []
    train = type(recorded_setup(Trace(tallied), allowed=OWN_CODE).algorithm).train

    def counted(self, task, client):
        trained.append(client.index)
        return train(self, task, client)

    monkeypatch.setattr(
        type(recorded_setup(Trace(tallied), allowed=OWN_CODE).algorithm), "train", counted
    )
    output = replay(tallied, "--worker", best.sender, "--task", best.re).output
    assert "retrained 1 task: all results match the record" in output
    assert trained == [best.body["client"]] * best.body["numbers"]["tasks"]


def test_of_clients_that_keep_nothing_no_earlier_task_but_one_is_trained(rounds, monkeypatch):
    by_client = {}
    for _, answer in answers(rounds, "worker-0"):
        by_client.setdefault(answer.body["client"], []).append(answer)
    most = max(by_client.values(), key=len)
    assert len(most) > 3
    trained = []
    kind = type(recorded_setup(Trace(rounds), allowed=OWN_CODE).algorithm)
    train = kind.train
    monkeypatch.setattr(kind, "train", lambda *a: trained.append(1) or train(*a))
    replay(rounds, "--worker", "worker-0", "--task", most[-1].re)
    assert len(trained) <= 2


def test_a_changed_earlier_result_does_not_hide_in_a_later_one(tallied, tmp_path):
    """What is kept follows from the tasks, not from the results as they were recorded."""
    best = late_task(tallied)
    first = next(
        (seq, each)
        for seq, each in material.messages(tallied, kind="result")
        if each.body["client"] == best.body["client"]
    )
    vector = torch.full((40,), 2.0).numpy().tobytes()
    change = edit(blobs=(Blob.of(vector),))
    folder = rewrite(tallied, tmp_path, {first[0]: change}, blobs=[(best.sender, vector)])
    output = replay(folder, "--worker", best.sender, code=1).output
    assert output.count("differs") == 1
    assert f"{first[1].re}, result in entry {first[0]}: differs" in output
    assert "same bytes" in replay(folder, "--worker", best.sender, "--task", best.re).output


def test_a_lossy_codec_is_repeated_too():
    """Results of this run are float16 on the wire."""
    _, answer = answers(BUFFERED, "worker-1")[0]
    assert answer.body["groups"][0]["codec"].startswith("cast")
    assert (
        "all results match the record"
        in replay(BUFFERED, "--worker", "worker-1", "--task", answer.re).output
    )


def test_an_error_of_the_training_is_raised(rounds, monkeypatch):
    trace = Trace(rounds)
    setup = recorded_setup(trace, allowed=OWN_CODE)

    def fails(*_):
        raise MemoryError("too large for this machine")

    monkeypatch.setattr(type(setup.algorithm), "train", fails)
    with pytest.raises(MemoryError, match="too large"):
        list(Retraining(trace, setup, "worker-0").train_all())
