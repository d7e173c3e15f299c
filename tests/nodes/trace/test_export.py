import itertools
import json
from collections import defaultdict

import pytest

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from tests.nodes.trace import story


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def exported(fedmq, folder, tmp_path, kind):
    path = tmp_path / "out"
    fedmq("export", folder, kind, path)
    text = path.read_text()
    assert text.isascii()
    if kind == "--json":
        return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]
    return json.loads(text, parse_constant=no_constant)["traceEvents"]


def test_json_has_every_entry_with_all_its_fields(fedmq, written, tmp_path):
    folder, at = written
    lines = exported(fedmq, folder, tmp_path, "--json")
    assert [each["seq"] for each in lines] == list(range(at["ended"] + 1))
    assert lines[0]["entry"] == "opened"
    assert lines[0]["total_clients"] == 4
    result = lines[at["result"]]
    assert result["consumes"] == [at["task"]]
    message = result["message"]
    assert (message["kind"], message["re"], message["sender"]) == ("result", "a/2", "worker-0")
    assert message["body"]["groups"][0]["codec"] == "raw@1"
    blob = Trace(folder).entry(at["result"]).read().blobs[0]
    assert message["blobs"] == [{"digest": blob.digest.hex(), "size": blob.size}]
    assert lines[at["consumed"]]["of"] == [at["result"], at["score"], at["half"]]
    assert lines[at["refusal"]]["reason"] == "too stale"
    assert lines[at["post"]]["mark"] == {"bytes": "6d"}


def test_what_json_has_no_word_for(fedmq, written, tmp_path):
    folder, at = written
    lines = exported(fedmq, folder, tmp_path, "--json")
    assert lines[at["score"]]["message"]["body"]["metrics"] == {"accuracy": 0.5, "loss": "NaN"}
    body = lines[at["evil"]]["message"]["body"]
    assert body["raw"] == {"bytes": "00ff"}
    assert body["text"] == "\x1b]0;owned\x07\n\u202e"
    assert lines[at["evil"]]["message"]["sender"] == story.EVIL


def test_json_of_a_run_with_trouble(fedmq, simulated, tmp_path):
    folder = simulated(2, 3)
    lines = exported(fedmq, folder, tmp_path, "--json")
    entries = list(Trace(folder).entries())
    assert [each["entry"] for each in lines] == [type(each).__name__.lower() for each in entries]
    for line, entry in zip(lines, entries, strict=True):
        if isinstance(entry, Accepted):
            assert line["message"]["body"] == entry.read().body


# ---- the timeline


def spans_of(events):
    """Return the spans of each lane: (start, end, event)."""
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] > 0
            lane = lanes[event["pid"], event["tid"]]
            lane.append((event["ts"], event["ts"] + event["dur"], event))
    return lanes


def check_timeline(events):
    """Check what a viewer relies on."""
    lanes = spans_of(events)
    names = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    assert len(set(names.values())) == len(names), "two lanes have one name"
    for lane in lanes.values():
        assert [span[:2] for span in lane] == sorted(span[:2] for span in lane)
        for before, after in itertools.pairwise(lane):
            assert before[1] <= after[0], f"spans overlap: {before}, {after}"
    arrows = defaultdict(dict)
    waits = defaultdict(dict)
    for event in events:
        assert event["pid"] in names
        if event["ph"] in "sf":
            assert event["ph"] not in arrows[event["id"]], "an id for two arrows"
            arrows[event["id"]][event["ph"]] = event
            assert any(
                start <= event["ts"] < end for start, end, _ in lanes[event["pid"], event["tid"]]
            ), f"an arrow ends in no span: {event}"
        elif event["ph"] in "be":
            assert event["ph"] not in waits[event["id"]]
            waits[event["id"]][event["ph"]] = event
        elif event["ph"] != "M":
            assert event["ts"] >= 0
    for ends in (*arrows.values(), *waits.values()):
        assert len(ends) == 2
        first, last = sorted(ends.values(), key=lambda each: "sfbe".index(each["ph"]))
        assert first["ts"] <= last["ts"], "it ends before it begins"
    return names, lanes


def test_the_timeline_of_the_story(fedmq, written, tmp_path):
    folder, at = written
    events = exported(fedmq, folder, tmp_path, "--perfetto")
    names, lanes = check_timeline(events)
    pids = {name: pid for pid, name in names.items()}
    assert set(pids) == {"aggregator", "worker-0", "worker-1", "evaluator"}
    (first, failed) = lanes[pids["worker-0"], 1]
    assert first[2]["name"] == "train client 0"
    assert (first[0], first[1]) == (4_250_000, 4_500_000)
    assert first[2]["args"]["staleness"] == 0
    assert first[2]["args"]["entry"] == at["result"]
    assert failed[2]["args"]["reason"] == "dropped on demand"
    (_, stale) = lanes[pids["worker-1"], 1]
    assert stale[2]["args"]["refused"] == "too stale"
    assert stale[2]["args"]["staleness"] == 1
    versions = [span[2]["name"] for span in lanes[pids["aggregator"], 1]]
    assert versions == ["waiting for clients", "version 1", "after version 1"]
    instants = [each["name"] for each in events if each["ph"] == "i"]
    assert "worker-1 left" in instants
    assert instants.count("rejected") == 2
    assert [each["name"] for each in events if each["ph"] == "b"].count("unanswered") == 1


def test_a_training_that_claims_to_have_taken_longer_than_its_task_was_out(
    fedmq, written, tmp_path
):
    folder, at = written
    events = exported(fedmq, folder, tmp_path, "--perfetto")
    (half,) = [e for e in events if e["ph"] == "X" and e["args"].get("entry") == at["half"]]
    assert half["args"]["elapsed_s"] == 1000.0
    assert half["ts"] == 4_000_000  # when its task was accepted


@pytest.mark.parametrize(("schedule", "seed"), [(2, 3), (3, 4), (0, 5), (1, 1)])
def test_timelines_of_runs_with_trouble(fedmq, simulated, tmp_path, schedule, seed):
    folder = simulated(schedule, seed)
    events = exported(fedmq, folder, tmp_path, "--perfetto")
    check_timeline(events)
    messages = [each.read() for each in Trace(folder).entries() if isinstance(each, Accepted)]
    tasks = {each.id for each in messages if each.kind in ("task", "evaluate")}
    answered = {each.re for each in messages if each.kind in ("result", "failed", "score")} & tasks
    assert sum(each["ph"] == "s" for each in events) == 2 * len(answered)
    assert sum(each["ph"] == "b" for each in events) >= len(answered)


def test_all_at_one_time(fedmq, tmp_path):
    """A broker gives all messages of a batch the same time."""
    folder = tmp_path / "run"
    it = story.Writer(folder)
    it.open()
    it.joined("aggregator", "aggregator")
    it.joined("worker-0", "worker", [[0, 3]])
    for round_ in range(3):
        it.at = story.START + 1
        task = it.task(10 * round_, 0, round_)
        it.at = story.START + 1
        other = it.task(10 * round_ + 1, 1, round_)
        it.at = story.START + 1
        it.result("worker-0", 10 * round_, task, 0, round_, elapsed_s=0.0)
        it.at = story.START + 1
        position = it.result("worker-0", 10 * round_ + 1, other, 1, round_)
        it.at = story.START + 1
        it.say("aggregator", "version", "record", {"version": round_ + 1, "position": position})
    it.ledger.close()
    events = exported(fedmq, folder, tmp_path, "--perfetto")
    _, lanes = check_timeline(events)
    assert sum(map(len, lanes.values())) == 6 + 1 + 3 + 1
