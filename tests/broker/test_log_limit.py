"""At most a number of log lines of one kind in a second; the rest is counted."""

from fedmq.broker.core.events import Unreadable
from fedmq.broker.errors import WireError
from fedmq.broker.log_limit import SUPPRESSED, LimitedLog


def test_lines_of_one_kind_are_limited_and_counted():
    lines, now = [], [0.0]
    log = LimitedLog(lambda *line: lines.append(line), lambda: now[0], 3.0)
    for _ in range(10):
        log("warning", "rejected", {})
    log("info", "joined", {})
    assert [event for _, event, _ in lines] == ["rejected"] * 3 + ["joined"]
    assert log.due == 1.0
    log.report()
    assert lines[4:] == [("warning", SUPPRESSED, {"of": "rejected", "lines": 7})]
    log("warning", "rejected", {})
    assert len(lines) == 6
    now[0] = 0.9
    for _ in range(2):
        log("warning", "rejected", {})
    now[0] = 1.1
    log("warning", "rejected", {})
    assert len(lines) == 9
    log.report()
    assert len(lines) == 9


def test_less_than_one_line_a_second():
    lines, now = [], [0.0]
    log = LimitedLog(lambda *line: lines.append(line), lambda: now[0], 0.1)
    for second in range(100):
        now[0] = float(second)
        if now[0] >= log.due:
            log.report()
        log("warning", "rejected", {})
    assert [event for _, event, _ in lines].count("rejected") == 10
    assert sum(fields.get("lines", 0) for *_, fields in lines) == 81


def test_very_many_kinds_count_as_one():
    lines = []
    log = LimitedLog(lambda *line: lines.append(line), lambda: 0.0, 20.0)
    for number in range(10_000):
        log("warning", f"kind {number}", {})
    assert len(lines) == 256 + 20


def test_a_flood_of_garbage_gets_few_lines(bench):
    for _ in range(1000):
        bench.handle(Unreadable(b"w", WireError("expected a map")))
    assert len(bench.logs) == 20
    bench.now += 1.0
    bench.driver.turn(())
    [summary] = bench.logs[20:]
    assert summary.event == SUPPRESSED
    assert summary.fields["lines"] == 980
