"""The curve: what each evaluated version had cost when it was committed."""

import pytest

from fedmq.broker.ledger.entries import Accepted, Opened
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import EMPTY, Blob, Message
from fedmq.nodes.history.curve import Totals, VersionTotals
from fedmq.nodes.run_folder.summary import summary_of
from tests.nodes.history.test_outcomes import CONFIG, Story


@pytest.fixture
def story():
    found = Story()
    found.entry(Opened, run="r", config=CONFIG, total_clients=2)
    found.begin()
    return found


def sized(story, kind, sender, nbytes, name=None, re=None, to="aggregator", **body):
    blobs = (Blob(EMPTY, nbytes),)
    fields = {"id": name or f"{sender}/{story.seq + 1}", "run": "r", "sender": sender, "to": to}
    message = Message(kind=kind, re=re, body=body, blobs=blobs, **fields)
    return story.entry(Accepted, message=encode_message(message))


def task(story, number, client, version, nbytes):
    about = {"client": client, "model_version": version}
    sized(story, "task", "aggregator", nbytes, f"a/{number}", to=f"client/{client}", **about)


def evaluate(story, number, version, nbytes):
    about = {"to": "evaluator", "model_version": version}
    sized(story, "evaluate", "aggregator", nbytes, f"e/{number}", **about)


def score(story, number, **metrics):
    return story.feed("score", "evaluator", re=f"e/{number}", metrics=metrics)


def test_each_point_has_the_totals_at_its_versions_commit(story):
    evaluate(story, 0, 0, 7)
    for client in (0, 1):
        task(story, client, client, 0, 1000)
    first = sized(story, "result", "w0", 50, re="a/0", client=0, model_version=0)
    story.feed("version", "aggregator", version=1, position=first, results=1, mean_staleness=0.0)
    evaluate(story, 1, 1, 7)
    score(story, 0, accuracy=0.1)  # it counts for version 0, although it came after version 1
    task(story, 2, 0, 1, 1000)
    second = sized(story, "result", "w1", 60, re="a/1", client=1, model_version=0)
    story.feed("version", "aggregator", version=2, position=second, results=1, mean_staleness=1.0)
    evaluate(story, 2, 2, 7)
    score(story, 1, accuracy=0.2)
    score(story, 2, accuracy=0.3)
    curve = summary_of(story.history)["curve"]
    columns = ("version", "bytes_up", "bytes_down", "results_used", "staleness", "accuracy")
    assert [tuple(point[name] for name in columns) for point in curve] == [
        (0, 0, 0, 0, None, 0.1),
        (1, 50, 2007, 1, 0.0, 0.2),
        (2, 110, 3014, 2, 1.0, 0.3),
    ]
    assert curve[-1]["bytes_up"] <= summary_of(story.history)["bytes"]["up"]["payload"]


def test_a_metric_may_have_the_name_of_a_column(story):
    evaluate(story, 0, 0, 7)
    score(story, 0, version=9.0, bytes_up=1.5, rmse=0.5)
    (point,) = summary_of(story.history)["curve"]
    assert (point["version"], point["bytes_up"], point["accuracy"], point["loss"]) == (
        *(0, 0),
        *(None, None),
    )
    assert point["metrics"] == {"version": 9.0, "bytes_up": 1.5, "rmse": 0.5}


def test_a_version_that_no_message_commits_has_no_totals(story):
    evaluate(story, 0, 3, 7)
    score(story, 0, accuracy=0.5)
    (point,) = summary_of(story.history)["curve"]
    assert (point["bytes_up"], point["results_used"], point["staleness"]) == (None, None, None)


def test_totals_are_looked_up_by_version():
    totals = VersionTotals()
    for version in (1, 2, 4):
        totals.add(version, 10 * version, 20 * version, version, None if version == 1 else 0.5)
    totals.add(2, 99, 99, 99, 9.0)
    assert totals.at(0) == Totals()
    assert totals.at(1) == Totals(10, 20, 1, None)
    assert totals.at(2) == Totals(20, 40, 2, 0.5)
    assert totals.at(3) is None
    assert totals.at(4) == Totals(40, 80, 4, 0.5)
