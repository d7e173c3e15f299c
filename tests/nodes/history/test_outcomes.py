"""Counts from a whole ledger; used, stale, rejected and unused add up to all results."""

import io
import json
import math
import tracemalloc

import pytest
from rich.console import Console

from fedmq.broker.ledger.entries import Accepted, Ended, Opened, Refusal
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.cluster import view
from fedmq.nodes.cluster.view import closing_table, line, render
from fedmq.nodes.history.facts import SentTask
from fedmq.nodes.history.outcomes import Outcomes
from fedmq.nodes.history.run import RunHistory
from fedmq.nodes.run_folder.strict_json import not_finite, to_strict_json
from fedmq.nodes.run_folder.summary import spread, summary_of
from fedmq.nodes.run_folder.summary_file import write_summary
from fedmq.nodes.simulation.virtual_run import Chances, Simulation
from tests.sim.history import setup_of

CONFIG = '[run]\nseed = 0\n[schedule]\nname = "rounds"\n[algorithm]\nname = "fedavg"\n'


class Story:
    """A ledger in memory, written entry by entry; an entry's time is its number."""

    def __init__(self, started_at=100.0):
        self.history = RunHistory(started_at)
        self.seq = -1
        self.feed("joined", "broker", node="aggregator", role="aggregator", clients=[])
        for k in range(2):
            self.feed("joined", "broker", node=f"w{k}", role="worker", clients=[[k, k]])

    def entry(self, kind, **fields):
        self.seq += 1
        self.history.feed(kind(seq=self.seq, at=100.0 + self.seq, **fields))
        return self.seq

    def feed(self, kind, sender, name=None, re=None, to="aggregator", **body):
        name = name or f"{sender}/{self.seq + 1}"
        message = Message(kind=kind, id=name, run="r", sender=sender, to=to, re=re, body=body)
        return self.entry(Accepted, message=encode_message(message))

    def begin(self):
        self.feed("run", "aggregator", to="record", config=CONFIG)

    def task(self, number, client, version=0):
        body = {"client": client, "model_version": version}
        return self.feed("task", "aggregator", f"a/{number}", to=f"client/{client}", **body)

    def result(self, number, client, **body):
        return self.feed("result", f"w{client}", re=f"a/{number}", client=client, **body)

    def refuse(self, of, code, reason="?", node="aggregator", **more):
        fields = {"run": "r", "node": node, "id": "x", "reason": reason, "code": code, **more}
        return self.entry(Refusal, **fields, of=of)

    def version(self, number, position, results, late=0, cohort=2):
        body = {"version": number, "position": position, "results": results, "late": late}
        body |= {"cohort": cohort, "mean_staleness": 0.0, "model_digest": "d" * 32}
        self.feed("version", "aggregator", to="record", **body)

    def end(self):
        self.entry(Ended, run="r", reason="enough")
        return summary_of(self.history)


@pytest.fixture
def story():
    found = Story()
    found.begin()
    return found


def counts(summary, *names):
    return tuple(summary["results"][name] for name in names or ALL)


ALL = ("used", "stale", "refused", "unused")


def test_every_result_is_used_stale_refused_or_unused(story):
    for number in range(6):
        story.task(number, number % 2)
    first = story.result(0, 0)
    story.version(1, first, 1)
    story.refuse(story.result(1, 1), "stale")
    story.refuse(story.result(2, 0), "late")
    story.refuse(story.result(3, 1), "not-finite")
    story.result(4, 0)
    summary = story.end()
    assert counts(summary) == (1, 2, 1, 1)
    assert summary["results"]["by_code"] == {"stale": 1, "late": 1, "not-finite": 1}


def test_rejections_after_the_last_version_count(story):
    """The record of the last version does not include them."""
    story.task(0, 0)
    story.version(1, story.result(0, 0), 1)
    for number in range(1, 30):
        story.task(number, 1, 1)
        story.refuse(story.result(number, 1), "not-finite", "the result holds NaN")
    summary = story.end()
    assert counts(summary) == (1, 0, 29, 0)
    assert summary["clients_without_result"] == {
        "1": {"tasks": 29, "code": "not-finite", "reason": "the result holds NaN"}
    }


def test_failed_tasks_are_counted_by_code_without_evaluations(story):
    for number in range(3):
        story.task(number, 0)
    story.feed("failed", "w0", re="a/0", reason="no memory", code="training-failed")
    story.feed("failed", "w0", re="a/1", reason="dropped on demand")
    story.refuse(6, "dead-letter", "parked", node="broker", dead_lettered=True)
    story.feed("evaluate", "aggregator", "a/9", to="client/0", model_version=0)
    story.feed("failed", "w0", re="a/9", reason="no memory", code="training-failed")
    summary = story.end()
    assert counts(summary, "failed", "refused") == (3, 0)
    codes = {"training-failed": 1, "dropped": 1, "dead-letter": 1}
    assert summary["results"]["failed_by_code"] == codes
    assert summary["clients_without_result"]["0"]["tasks"] == 3
    assert summary["clients_without_result"]["0"]["reason"] == "parked"


def test_the_summary_names_100_clients_without_result_and_first_those_that_failed(story):
    for number in range(300):
        story.task(number, number)
    failed = story.task(300, 250)
    story.refuse(failed, "dead-letter", "parked", node="broker", dead_lettered=True)
    summary = summary_of(story.history)  # interrupted
    named = summary["clients_without_result"]
    assert list(named) == [*map(str, range(99)), "250"]
    assert named["250"]["reason"] == "parked"
    assert summary["more_clients_without_result"] == 200
    assert ("", "and 200 more clients") in list(closing_table(summary).rows)
    assert not any("more clients" in text for _, text in closing_table(story.end()).rows)


def test_a_redelivered_task_has_not_failed(story):
    story.task(0, 0)
    refusal = {"run": "r", "node": "broker", "id": "a/0", "reason": "parked", "of": 4}
    story.entry(Refusal, **refusal, dead_lettered=True, code="dead-letter")
    assert summary_of(story.history)["results"]["failed"] == 1
    story.task(0, 0)
    story.version(1, story.result(0, 0), 1)
    summary = story.end()
    assert counts(summary, "failed", "used") == (0, 1)
    assert summary["clients_without_result"] == {}


def test_an_old_ledger_has_no_codes_and_counts_the_same(story):
    story.task(0, 0)
    story.task(1, 0)
    story.refuse(story.result(0, 0), "", "too stale: 2 versions behind")
    story.refuse(story.result(1, 0), "", "of another shape")
    summary = story.end()
    assert counts(summary) == (0, 1, 1, 0)
    assert summary["results"]["by_code"] == {"stale": 1, "unknown": 1}


def test_a_version_number_beyond_all_bounds_does_not_stop_the_summary(story):
    story.task(0, 0)
    story.version((1 << 62) - 1, story.result(0, 0, model_version=0), 1)
    assert counts(story.end()) == (1, 0, 0, 0)
    assert list(story.history.outcomes.staleness) == [(1 << 31) - 1]


def test_counts_need_no_memory_for_the_entries_of_other_runs():
    outcomes = Outcomes()
    tracemalloc.start()
    try:
        outcomes.sent(SentTask(10**9, 0.0, "client/0", 0, None, 0, is_evaluation=False))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    outcomes.rejection(
        Refusal(seq=10**9 + 1, at=0.0, run="r", node="w", id="x", reason="?", of=10**9, code="late")
    )
    assert outcomes.failed == {"late": 1}


def test_posts_that_were_not_accepted_are_not_counted_as_results(story):
    story.refuse(None, "no-address", node="broker")
    assert counts(story.end(), *ALL, "unaccepted") == (0, 0, 0, 0, 1)


def test_cohorts_are_summed_without_late_results(story):
    story.version(1, 3, 2)
    story.version(2, 3, 2, late=1)
    story.version(3, 3, 3, late=1)
    assert story.end()["rounds"] == {"versions": 3, "whole": 2, "wanted": 6, "missing": 1}


def test_a_client_whose_only_result_came_after_the_last_version_is_named(story):
    story.task(0, 0)
    story.task(1, 1)
    story.result(0, 0)
    summary = story.end()
    assert [each["code"] for each in summary["clients_without_result"].values()] == [
        "unused",
        "no-answer",
    ]
    assert counts(summary) == (0, 0, 0, 1)


@pytest.mark.parametrize(("schedule", "seed"), [(0, 5), (1, 2), (2, 3), (3, 4)])
def test_a_run_with_trouble_accounts_for_all_results(tmp_path, schedule, seed):
    simulation = Simulation(
        setup_of(schedule, 1.0), 2, tmp_path / "ledger", seed, Chances(train_s=0.3)
    )
    assert simulation.run(8.0, 400.0)
    simulation.close()
    results = write_summary(tmp_path, 0.0)["results"]
    messages = [e.read() for e in read_entries(tmp_path / "ledger") if isinstance(e, Accepted)]
    assert sum(results[name] for name in ALL) == sum(m.kind == "result" for m in messages)
    (finished,) = [m.body for m in messages if m.kind == "finished"]
    versions = [m.body["results"] for m in messages if m.kind == "version"]
    assert results["used"] == sum(versions) == finished["used"]
    assert results["stale"] == finished["stale"]


# ---- what a person sees


def shown(renderable, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_unknown_values_are_shown_as_dashes():
    said = line(RunHistory(started_at=1.8e9))
    assert said.startswith("time -  version -  accuracy -  used 0")
    assert "staleness -" in said


def test_the_accuracy_of_an_older_version_is_shown_with_the_version(story):
    story.task(0, 0)
    story.feed("evaluate", "aggregator", "a/1", to="evaluator", model_version=0)
    story.feed("score", "w1", re="a/1", metrics={"accuracy": 0.5})
    assert "accuracy 50.00%  used" in line(story.history)
    story.version(1, story.result(0, 0), 1)
    assert "version 1  accuracy 50.00% (v0)  used 1" in line(story.history)
    assert "cohort 1 of 2" in line(story.history)


def test_failures_are_shown_during_a_run(story):
    story.task(0, 0)
    story.refuse(story.result(0, 0), "not-finite")
    assert "rejected 1" in line(story.history)
    assert "rejected 1" in shown(render(story.history))


def test_the_closing_table_names_what_went_wrong(story):
    story.task(0, 0)
    story.task(1, 1)
    story.feed("failed", "w0", re="a/0", reason="no\x1b memory", code="training-failed")
    story.version(1, story.result(1, 1), 1)
    said = shown(closing_table(story.end()), 100)
    assert "1 used, 0 stale, 0 rejected, 0 unused" in said
    assert "1 task: training-failed 1" in said
    assert "0 of 1 complete, 1 of 2 results missing" in said
    assert "no result     client 0: 1 task, last: no\\x1b memory" in said


def test_a_result_that_came_while_the_run_was_ending_is_not_the_last_failure(story):
    story.task(0, 0)
    story.task(1, 1)
    story.version(1, story.result(1, 1), 1)
    story.refuse(story.result(0, 0), "run-over", "the run is over")
    said = shown(closing_table(story.end()), 100)
    assert "run-over 1" in said
    assert "last failure" not in said
    assert "no result" not in said


def test_bytes_on_the_wire_of_an_interrupted_run_are_unknown(story):
    story.task(0, 0)
    summary = summary_of(story.history)
    assert summary["bytes"]["down"]["wire"] is None
    assert "payload, - on the wire" in shown(closing_table(summary))
    assert "ended" not in shown(closing_table(summary))
    assert "first task after 4.0 s" in shown(closing_table(summary))
    json.dumps(summary, allow_nan=False)


def test_a_run_without_a_task_has_no_first_task_time(story):
    assert "first task after -" in shown(closing_table(summary_of(story.history)))


def test_the_newest_failure_is_shown_with_its_place(story):
    story.task(0, 0)
    story.task(1, 1)
    story.refuse(story.result(1, 1), "not-finite", "the result holds NaN")
    assert "rejected 1  last failure: result of client 1: the result holds NaN" in line(
        story.history
    )
    body = {"reason": "ValueError: no", "code": "training-failed", "where": "mine.py:7"}
    story.feed("failed", "w0", re="a/0", **body)
    text = "task of client 0: ValueError: no (mine.py:7)"
    assert f"rejected 1  failed 1  last failure: {text}" in line(story.history)
    assert text in shown(render(story.history), 120)
    (head,) = (each for each in shown(render(story.history)).splitlines() if "state" in each)
    assert head.split() == ["node", "state", "done", "failed"]
    summary = story.end()
    assert text in shown(closing_table(summary), 120)
    assert summary["last_failure"] == {"what": "task", "client": 0, **body}
    story.task(2, 1)
    story.refuse(story.result(2, 1), "late", "too stale")
    assert text in line(story.history)


def test_failed_evaluations_are_counted_separately(story):
    for number in range(3):
        story.feed("evaluate", "aggregator", f"a/{number}", to="evaluator", model_version=number)
    story.feed("failed", "w0", re="a/0", reason="no metric", where="mine.py:9")
    assert "last failure: evaluation: no metric (mine.py:9)" in line(story.history)
    story.feed("score", "w1", re="a/1", metrics={"accuracy": 0.5})
    story.refuse(story.seq - 2, "dead-letter", "parked")
    assert "failed evaluations 2  last failure: evaluation: parked" in line(story.history)
    summary = story.end()
    assert summary["results"]["failed_evaluations"] == 2
    assert summary["results"]["failed"] == 0
    assert "evaluations   2 failed" in shown(closing_table(summary), 100)


def test_the_status_of_a_failed_run_is_failed(story):
    assert summary_of(story.history)["status"] == "interrupted"
    story.feed("finished", "aggregator", to="checkpoint", reason="12 tasks", failed=True)
    summary = story.end()
    assert (summary["status"], summary["ended"]) == ("failed", "enough")
    assert "status      failed" in shown(closing_table(summary))
    assert json.loads(json.dumps(summary)) == summary


def test_the_status_of_a_run_that_reached_its_goal_is_finished(story):
    story.feed("finished", "aggregator", to="checkpoint", reason="2 versions")
    assert story.end()["status"] == "finished"


def test_a_waiting_run_names_the_clients_it_waits_for():
    story = Story()
    story.entry(Opened, run="r", config=CONFIG, total_clients=6)
    story.begin()
    assert story.history.missing_clients == [(2, 5)]
    assert "waiting for" not in line(story.history)
    assert line(story.history, waits=True).endswith("waiting for clients 2-5")
    assert "waiting for clients 2-5" in shown(render(story.history, waits=True))
    story.feed("left", "broker", node="w0", reason="lease")
    assert story.history.missing_clients == [(0, 0), (2, 5)]
    story.task(0, 1)
    assert story.history.missing_clients == []  # one is at work
    assert line(story.history, waits=True).endswith("waiting for results of client 1")
    story.result(0, 1)
    assert line(story.history, waits=True).endswith("waiting for clients 0, 2-5")
    story.end()
    assert story.history.missing_clients == []


def test_a_waiting_run_prints_few_lines(monkeypatch):
    now = 0.0
    monkeypatch.setattr(view.time, "monotonic", lambda: now)
    story = Story()
    story.entry(Opened, run="r", config=CONFIG, total_clients=3)
    story.begin()
    out = io.StringIO()
    with view.LiveView(Console(file=out, width=40), "title", pytest.fail) as shower:
        for _ in range(3000):
            now += 0.1
            shower.show(story.history)
    first, *lines = out.getvalue().splitlines()
    assert first == "title"
    assert 5 <= len(lines) <= 6
    assert all(each.endswith("waiting for client 2") for each in lines)


def test_a_metric_that_is_not_finite_is_null_and_listed_in_the_summary(story, tmp_path):
    for number, (accuracy, loss) in enumerate([(0.5, math.inf), (math.nan, -math.inf)]):
        story.feed("evaluate", "aggregator", f"a/{number}", to="evaluator", model_version=number)
        metrics = {"accuracy": accuracy, "loss": loss, "mae": 0.25}
        story.feed("score", "w0", re=f"a/{number}", metrics=metrics)
        render(story.history)
    summary = summary_of(story.history)
    assert summary["not_finite"] == {
        "final_accuracy": "NaN",
        "metrics.accuracy": "NaN",
        "metrics.loss": "-Infinity",
        "curve[0].loss": "Infinity",
        "curve[1].accuracy": "NaN",
        "curve[1].loss": "-Infinity",
    }
    assert summary["best_accuracy"] == 0.5
    read = json.loads(to_strict_json(summary), parse_constant=pytest.fail)
    assert read["metrics"] == {"accuracy": None, "loss": None, "mae": 0.25}
    assert [point["loss"] for point in read["curve"]] == [None, None]
    assert [point["metrics"] for point in read["curve"]] == [{"mae": 0.25}, {"mae": 0.25}]
    assert "nan% (best 50.00%)" in shown(closing_table(summary))


def test_a_late_second_score_that_was_rejected_leaves_the_first_in_the_curve(story):
    story.feed("evaluate", "aggregator", "a/0", to="evaluator", model_version=0)
    story.feed("score", "w0", re="a/0", metrics={"accuracy": 0.5})
    first = story.seq
    story.feed("score", "w0", re="a/0", metrics={"accuracy": 0.9})
    story.refuse(story.seq, "unknown-task")
    story.refuse(first, "unknown-task")
    assert story.history.curve[0].accuracy == 0.5


def test_a_score_that_was_rejected_is_not_in_the_curve(story):
    for number, accuracy in enumerate([0.5, 2.0]):
        story.feed("evaluate", "aggregator", f"a/{number}", to="evaluator", model_version=number)
        story.feed("score", "w0", re=f"a/{number}", metrics={"accuracy": accuracy})
    story.refuse(story.seq, "out-of-range")
    assert [point.accuracy for point in story.history.curve] == [0.5]
    assert story.history.outcomes.failed_evaluations == 1
    assert summary_of(story.history)["best_accuracy"] == 0.5
    for client, accuracy in ((0, 0.5), (1, 2.0)):
        about = {"model_version": 2, "client": client}
        story.feed("evaluate", "aggregator", f"e/{client}", to=f"client/{client}", **about)
        story.feed("score", f"w{client}", re=f"e/{client}", metrics={"accuracy": accuracy})
    assert story.history.accuracy == 1.25
    story.refuse(story.seq, "out-of-range")
    assert story.history.accuracy == 0.5


def test_clients_whose_accuracy_is_nan_are_counted_separately(story):
    for client, accuracy in ((0, 0.5), (1, math.nan)):
        story.task(client, client)
        about = {"model_version": 0, "client": client}
        story.feed("evaluate", "aggregator", f"e/{client}", to=f"client/{client}", **about)
        story.feed("score", f"w{client}", re=f"e/{client}", metrics={"accuracy": accuracy})
    clients = summary_of(story.history)["clients"]
    assert clients["mean"] == clients["worst_decile"] == 0.5
    assert (clients["count"], clients["not_finite"]) == (1, 1)
    assert "mean 50.00%, worst tenth 50.00%, spread 0.00%" in shown(
        closing_table(summary_of(story.history))
    )


def test_a_spread_without_finite_values_is_nan():
    found = spread([math.nan, math.inf])
    assert (found["count"], found["not_finite"]) == (0, 2)
    assert math.isnan(found["mean"])


def test_the_number_of_listed_values_is_bounded():
    content = {"curve": [{"loss": math.nan}] * 5000, "rest": (1, None, "x", True)}
    assert len(not_finite(content)) == 100
    read = json.loads(to_strict_json(content), parse_constant=pytest.fail)
    assert read == {"curve": [{"loss": None}] * 5000, "rest": [1, None, "x", True]}
