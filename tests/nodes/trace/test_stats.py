import re
from collections import Counter

import pytest

from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted, BlobName, Consumed, Opened, Refusal
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.link.events import Delivery
from fedmq.broker.wire.schema import digest
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.messages.actions import Start
from fedmq.nodes.process.terminal import table
from fedmq.nodes.simulation.virtual_run import RUN
from fedmq.nodes.trace.blobs import read_payload
from fedmq.nodes.trace.stats import DeliveryAudit, Stats, histogram
from tests.nodes.trace import story
from tests.sim.history import setup_of


def account_of(entries):
    """Count as `tests/sim/history.py` does, with sets."""
    accepted, consumed, refused = set(), set(), set()
    for entry in entries:
        match entry:
            case Accepted(seq=seq, consumes=of):
                consumed |= set(of)
                if entry.read().to != "record":
                    accepted.add(seq)
            case Consumed(of=of):
                consumed |= set(of)
            case Refusal(of=int(seq)):
                refused.add(seq)
    return (
        len(accepted),
        len(consumed - refused),
        len(accepted - consumed - refused),
        len(refused),
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_account_of_runs_with_trouble(fedmq, simulated, seed):
    folder = simulated(seed, seed)
    accepted, consumed, pending, refused = account_of(Trace(folder).entries())
    output = (
        f"accepted {accepted} = consumed {consumed} + pending {pending}"
        f" + rejected {refused}: holds\n"
    )
    assert output in fedmq("stats", folder).stdout.replace(",", "")


def test_the_account_of_the_story(fedmq, written):
    output = fedmq("stats", written[0]).stdout
    assert "accepted 19 = consumed 8 + pending 10 + rejected 1: holds" in output
    assert "pending: joined 4, " in output
    assert "also: 1 message rejected before acceptance" in output


@pytest.mark.parametrize(
    ("of", "output"),
    [
        (0, "entry 9 consumes 0, which is not an accepted message"),
        (77, "entry 9 consumes 77, which is not an accepted message"),
        (7, "entry 9 consumes 7 a second time"),
    ],
)
def test_an_account_that_does_not_hold(of, output):
    account = DeliveryAudit()
    message = story.Message(kind="k", id="i", run="r", sender="s", to="client/1")
    account.feed(Accepted(seq=7, at=0.0, message=b""), message)
    account.feed(Consumed(seq=8, at=0.0, node="s", of=(7,)), None)
    account.feed(Consumed(seq=9, at=0.0, node="s", of=(of,)), None)
    assert account.faults == [output]


def test_messages_and_bytes_by_kind_node_and_codec(written):
    trace = Trace(written[0])
    stats = Stats(trace)
    messages = [(each, each.read()) for each in trace.entries() if isinstance(each, Accepted)]
    for name, tally in stats.traffic.kinds.items():
        those = [(e, m) for e, m in messages if m.kind == name]
        assert tally.messages == len(those)
        assert tally.header == sum(len(e.message) for e, _ in those)
        assert tally.blobs == sum(blob.size for _, m in those for blob in m.blobs)
    assert sum(each.messages for each in stats.traffic.sent.values()) == len(messages)
    assert stats.traffic.received["worker-0"].messages == 2
    codecs = {key: (each.messages, each.blobs) for key, each in stats.traffic.codecs.items()}
    assert codecs["cast@1(float16)", "result"] == (1, 12)
    assert codecs["raw@1", "task"] == (5, 5 * 24)
    assert codecs["(no tensors)", "version"][0] == 1
    # The aggregator sent W once in an evaluation and in five tasks; it is stored once.
    assert stats.traffic.repeats.messages == 5
    assert stats.traffic.repeats.blobs == 5 * 24


@pytest.mark.parametrize(("schedule", "seed"), [(2, 3), (3, 4), (0, 5), (3, 6)])
def test_staleness_is_what_the_aggregator_counted(simulated, schedule, seed):
    folder = simulated(schedule, seed)
    trace = Trace(folder)
    core = Aggregator(setup_of(schedule, 1.0), RUN, "aggregator")
    core.handle(Start())
    found, waiting = Counter(), Counter()
    for entry in trace.entries():
        if not (isinstance(entry, Accepted) and entry.read().to == "aggregator"):
            continue
        message = entry.read()
        version, used, held = (
            core.version,
            core._results.counts.used,
            len(core._results.current.held),
        )
        blobs = [bytes(trace.blob(message, n)) for n in range(len(message.blobs))]
        core.handle(Delivery(entry.seq, entry.at, message, dict(enumerate(blobs))))
        taken = core._results.counts.used + len(core._results.current.held) > used + held
        if message.kind == "result" and taken:
            waiting[version - message.body["model_version"]] += 1
        if core.version > version:
            found.update(waiting)  # in a version now
            waiting.clear()
    outcomes = Stats(trace).history.outcomes
    assert outcomes.staleness == found
    assert outcomes.used == core._results.counts.used == found.total()
    assert outcomes.unused >= waiting.total()


def test_a_histogram_shows_every_value_that_is_there():
    lines = list(histogram(Counter({0: 1000, 2: 1})))
    assert [line.split()[:2] for line in lines] == [["0", "1,000"], ["1", "0"], ["2", "1"]]
    assert [line.count("#") for line in lines] == [50, 0, 1]


def test_a_histogram_of_many_values_joins_neighbours():
    values = Counter(range(100))
    lines = list(histogram(values))
    assert len(lines) <= 24
    assert sum(int(line.split()[1]) for line in lines) == 100
    assert re.match(r" *0-4 ", lines[0])


@pytest.mark.parametrize("most", [9, 10_000, 10_000_000])
def test_a_histogram_fits_a_terminal(most):
    lines = list(histogram(Counter({0: 1_000_000, most: 1, most // 2: 20})))
    assert max(map(len, lines)) <= 80


def test_all_that_is_counted_fits_a_terminal(fedmq, simulated):
    lines = fedmq("stats", simulated(2, 3)).stdout.splitlines()
    assert [line for line in lines if len(line) > 80 or line != line.rstrip()] == []
    assert [line.split()[:3] for line in lines if line.startswith("worker-0")] == [
        ["worker-0", "worker", "sent"],
        ["worker-0", "worker", "received"],
    ]


def test_a_name_that_is_too_long_for_its_column_has_a_line_of_its_own():
    long = "x" * 75
    lines = table(("codec", "kind", "bytes"), [(long, "task", "1"), ("raw", "result", "20")])
    assert lines == [
        f"{'codec':<65}    kind  bytes",
        long,
        f"{'':<65}    task      1",
        f"{'raw':<65}  result     20",
    ]


def test_all_payload_is_read(fedmq, written):
    output = fedmq("stats", written[0]).stdout.splitlines()[-1]
    assert re.fullmatch(r"payload: \d+ chunks, \d+ bytes, all intact", output)


def test_a_result_that_came_after_the_last_version_was_not_used(tmp_path):
    it = story.Writer(tmp_path)
    it.open()
    it.joined("aggregator", "aggregator")
    it.joined("worker-0", "worker", [[0, 3]])
    tasks = [it.task(number, number, 0) for number in range(2)]
    position = it.result("worker-0", 0, tasks[0], 0, 0)
    it.say("aggregator", "version", "record", {"version": 1, "position": position, "results": 1})
    it.result("worker-0", 1, tasks[1], 1, 0)
    it.say("aggregator", "finished", "checkpoint", {"used": 2})
    it.ledger.close()
    stats = Stats(Trace(tmp_path))
    assert stats.history.outcomes.staleness == Counter({0: 1})
    assert not any("at its end" in line for line in stats.lines())


def test_a_blob_that_was_given_up_and_stored_again_is_whole(tmp_path):
    ledger = Ledger(tmp_path)
    data = bytes(range(100))
    name = BlobName("r", "w", digest(data))
    ledger.append(Opened(seq=0, at=0.0, run="r", config="", total_clients=1))
    ledger.put(name, 100, 0, data[:60])
    ledger.put(name, 100, 0, b"")
    for _ in range(3):
        ledger.put(name, 100, 0, data[:40])  # stored again after a crash
    ledger.close()
    named = [(name.owner, name.digest)]
    assert read_payload(Trace(tmp_path)).missing(named) == 1
    ledger = Ledger(tmp_path)
    ledger.put(name, 100, 40, data[40:])
    ledger.close()
    assert read_payload(Trace(tmp_path)).missing(named) == 0
