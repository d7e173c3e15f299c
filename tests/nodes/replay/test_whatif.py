"""``--set``: recorded results with other settings, compared with sums computed here."""

import math

import pytest
import torch

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.replay.whatif import WhatIf, changed_setup
from tests.golden.points import Points
from tests.nodes.replay import material
from tests.nodes.replay.material import (
    BUFFERED,
    GOLDEN,
    NAMES,
    learned,
    number,
    replay,
    rewrite,
    update,
    vector,
)
from tests.own_code import OWN_CODE

STREAM = GOLDEN / "fedprox-stream"
LATE = GOLDEN / "fedsgd-late"
ROUNDS = GOLDEN / "fedavg-rounds"
SAME = {
    "fedavg-buffered": "schedule.size=3",
    "fedavg-rounds": "schedule.late=discount",
    "fedprox-stream": "schedule.mixing=0.6",
    "fedsgd-late": "algorithm.lr=0.5",
    "fedavg-quantized": "schedule.size=3",
}


def fold(folder, *settings):
    """Fold under another rule; return the points, the model, and the fold."""
    trace = Trace(folder)
    other = WhatIf(trace, changed_setup(trace, settings, OWN_CODE), OWN_CODE)
    points = list(other.points())
    return points, vector(other._algorithm.tensors(other._current.state)), other


def start(folder):
    """Return the first model as one vector: what the first task held."""
    return update(folder, number(folder, 0, kind="task"))


def versions(folder):
    """Return the number of the last message that each recorded version holds."""
    return [each.body["position"] for _, each in material.messages(folder, kind="version")]


def results(folder):
    """Return (number, version it was trained from, n) of all results, in order."""
    return [
        (seq, each.body["model_version"], each.body["numbers"]["n"])
        for seq, each in material.messages(folder, kind="result")
    ]


def by_hand(folder, size, weight, step):
    """Fold asynchronous results: ``weight(staleness)``, ``step(x, [(w, update), ...])``.

    What comes after the last version of the recorded run counts for neither rule.
    """
    x, version, buffer, born, used = start(folder), 0, [], {}, 0
    run = Replay(Trace(folder), allowed=OWN_CODE)
    finishing = False
    for each in run.steps():
        if finishing:
            break
        finishing = bool(run.core.state_snapshot()["finishing"])
        event = each.event
        if isinstance(event, Delivery) and event.message.kind == "result":
            found = weight(version - born[event.message.re])
            if found is not None:
                buffer.append((found, update(folder, event.seq)))
                used += 1
            if len(buffer) == size:
                x, version, buffer = step(x, buffer), version + 1, []
        for action in each.actions:
            if isinstance(action, PostMessage) and action.message.kind == "task":
                born[action.message.id] = version
    return x, version, used


def mean(server_lr):
    def step(x, buffer):
        return x + server_lr * sum(w * u for w, u in buffer) / len(buffer)

    return step


def mix(x, buffer):
    ((alpha, model),) = buffer
    return (1 - alpha) * x + alpha * model


# ---- the recorded rule


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_under_the_recorded_rule_both_curves_are_equal_to_all_digits(name):
    """Of the models; the scores are the evaluator's, and may be of another kind of CPU."""
    trace = Trace(GOLDEN / name)
    points, weights, _ = fold(GOLDEN / name, SAME[name])
    run = Replay(trace, allowed=OWN_CODE)
    for _ in run.steps():
        pass
    assert torch.equal(weights, vector(run.core.tensors()))
    assert len(points) == len(material.messages(GOLDEN / name, kind="evaluate"))
    for point in points:
        assert point.results[0] == point.results[1]
        assert point.versions[0] == point.versions[1]
        assert point.recorded is None or point.other == pytest.approx(point.recorded, abs=1e-6)
    assert points[-1].versions == (12, 12)


def test_a_point_nobody_scored_has_no_recorded_metrics(tmp_path):
    """The record ends before the answer to the last evaluation."""
    asked = number(ROUNDS, -1, kind="evaluate")
    folder = rewrite(ROUNDS, tmp_path, until=asked)
    points, _, _ = fold(folder, SAME["fedavg-rounds"])
    assert len(points) == len(material.messages(ROUNDS, kind="evaluate"))
    assert points[-1].recorded is None
    output = replay(folder, "--set", SAME["fedavg-rounds"]).output
    assert output.split("\n")[len(points) + 1].split()[3:5] == ["-", "-"]


def test_the_table_shows_both_rules_side_by_side():
    lines = replay(BUFFERED, "--set", "schedule.size=2").output.split("\n")
    points, _, _ = fold(BUFFERED, "schedule.size=2")
    assert "schedule.size=2" in lines[0]
    rows = [line.split() for line in lines[2 : 2 + len(points)]]
    for row, point in zip(rows, points, strict=True):
        assert row[1:3] == [str(point.results[0]), str(point.versions[0])]
        assert row[6:8] == [str(point.results[1]), str(point.versions[1])]
        assert row[3] == (f"{point.recorded['accuracy']:.4f}" if point.recorded else "-")
        assert row[9] == f"{point.other['loss']:.4f}"
    assert "not from those on the right" in lines[2 + len(points)]


# ---- other rules, against sums made here


@pytest.mark.slow
def test_two_results_at_a_time_by_hand():
    """K = 2, s = 1, nothing too stale: x += server_lr * (u1 + u2) / 2, in order of arrival."""
    points, _, _ = fold(
        BUFFERED, "schedule.size=2", "schedule.staleness=constant", "schedule.max_staleness=none"
    )
    taken = results(BUFFERED)
    evaluated = [m.body["model_version"] for _, m in material.messages(BUFFERED, kind="evaluate")]
    assert evaluated == [0, 3, 6, 9, 12]
    for point, version in zip(points, evaluated, strict=True):
        upto = versions(BUFFERED)[version - 1] if version else -1
        inside = [seq for seq, _, _ in taken if seq <= upto]
        x = start(BUFFERED)
        for one, two in zip(inside[::2], inside[1::2], strict=False):
            x = x + 0.7 * (update(BUFFERED, one) + update(BUFFERED, two)) / 2
        assert point.versions == (version, len(inside) // 2)
        assert point.results[1] == len(inside)
        assert point.other == pytest.approx(score(x), abs=1e-5, nan_ok=True)


def score(x):
    """Return the metrics of a model of the golden traces, given as one vector."""
    problem = Points()
    module = problem.model()
    state, first = module.state_dict(), 0
    for name in learned():
        size = state[name].numel()
        state[name] = x[first : first + size].reshape(state[name].shape)
        first += size
    assert first == x.numel()
    module.load_state_dict(state)
    module.eval()
    with torch.no_grad():
        data = problem.test()
        return problem.metrics(module(data.x), data.y)


def at_most(limit, s):
    return lambda tau: None if tau > limit else s(tau)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "settings", "size", "weight", "step"),
    [
        (BUFFERED, ["schedule.size=1"], 1, at_most(1, lambda t: (1 + t) ** -0.5), mean(0.7)),
        (BUFFERED, ["schedule.size=5"], 5, at_most(1, lambda t: (1 + t) ** -0.5), mean(0.7)),
        (
            BUFFERED,
            ["schedule.staleness=polynomial(2)"],
            3,
            at_most(1, lambda t: (1 + t) ** -2.0),
            mean(0.7),
        ),
        (
            BUFFERED,
            ["schedule.max_staleness=0"],
            3,
            at_most(0, lambda t: 1.0),
            mean(0.7),
        ),
        (
            BUFFERED,
            ["schedule.max_staleness=none"],
            3,
            at_most(math.inf, lambda t: (1 + t) ** -0.5),
            mean(0.7),
        ),
        (
            BUFFERED,
            ["algorithm.server_lr=0.1"],
            3,
            at_most(1, lambda t: (1 + t) ** -0.5),
            mean(0.1),
        ),
        (
            BUFFERED,
            ["algorithm.server_lr=2", "schedule.size=2", "schedule.max_staleness=2"],
            2,
            at_most(2, lambda t: (1 + t) ** -0.5),
            mean(2.0),
        ),
        (STREAM, ["schedule.mixing=0.1"], 1, lambda t: 0.1 / max(t, 1), mix),
        (STREAM, ["schedule.staleness=constant"], 1, lambda t: 0.6, mix),
        (STREAM, ["schedule.max_staleness=2"], 1, at_most(2, lambda t: 0.6 / max(t, 1)), mix),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_asynchronous_rule_is_what_the_sum_gives(folder, settings, size, weight, step):
    points, weights, other = fold(folder, *settings)
    x, version, used = by_hand(folder, size, weight, step)
    assert torch.allclose(weights, x, atol=1e-5)
    assert (other._current.version, other._used) == (version, used)
    assert points[-1].versions[1] <= version
    recorded, _, _ = fold(folder, SAME[folder.name])
    assert [each.recorded for each in points] == [each.recorded for each in recorded]
    assert [each.results[0] for each in points] == [each.results[0] for each in recorded]


def rounds_by_hand(folder, weight, lr=None):
    """Fold synchronous results: each into the round in which it came, n times ``weight``.

    Staleness counts in versions of this rule: a round of which nothing is used makes none.
    """
    x, ours, sent = start(folder), 0, {0: 0}
    first, taken = -1, results(folder)
    for made, last in enumerate(versions(folder), start=1):
        cohort = []
        for seq, trained_from, n in taken:
            if first < seq <= last and (w := weight(ours - sent[trained_from])) is not None:
                cohort.append((n * w, update(folder, seq)))
        if cohort:
            average = sum(w * u for w, u in cohort) / sum(w for w, _ in cohort)
            if lr is not None:
                average[: parameters()] *= -lr
            x, ours = x + average, ours + 1
        sent[made], first = ours, last
    return x, ours


def parameters():
    return sum(each.numel() for each in Points().model().parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "settings", "weight", "lr"),
    [
        (LATE, ["schedule.late=use"], lambda t: 1.0, 0.5),
        (LATE, ["schedule.late=refuse"], lambda t: 1.0 if t == 0 else None, 0.5),
        (LATE, ["schedule.staleness=hinge(1, 0)"], lambda t: 1 / (t + 1), 0.5),
        (LATE, ["algorithm.lr=0.01"], lambda t: (t + 1) ** -0.5, 0.01),
        (LATE, ["algorithm.lr=2.0", "schedule.late=use"], lambda t: 1.0, 2.0),
        (ROUNDS, ["schedule.late=use"], lambda t: 1.0, None),
        (ROUNDS, ["schedule.late=refuse"], lambda t: 1.0 if t == 0 else None, None),
        (ROUNDS, ["schedule.staleness=polynomial(3)"], lambda t: (t + 1.0) ** -3, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_late_results_of_rounds_are_what_the_sum_gives(folder, settings, weight, lr):
    points, weights, other = fold(folder, *settings)
    x, version = rounds_by_hand(folder, weight, lr)
    assert torch.allclose(weights, x, atol=1e-4)
    assert other._current.version == version
    assert points[-1].other == pytest.approx(score(x), abs=1e-3)
