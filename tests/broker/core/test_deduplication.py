from fedmq.broker.core.deduplication import DedupWindow, PostFingerprint
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.state import Node
from fedmq.broker.ledger.entries import Opened, Refusal
from fedmq.broker.recovery import Restorer
from fedmq.broker.wire.schema import Hello


def test_a_message_is_new_the_same_or_another():
    known = DedupWindow()
    assert known.seen("r", "w1", PostFingerprint.of("r", "w1", "7", b"bytes")) == "new"
    known.add("r", "w1", PostFingerprint.of("r", "w1", "7", b"bytes"))
    assert known.seen("r", "w1", PostFingerprint.of("r", "w1", "7", b"bytes")) == "same"
    assert known.seen("r", "w1", PostFingerprint.of("r", "w1", "7", b"other bytes")) == "other"
    assert known.seen("r", "w1", PostFingerprint.of("r", "w1", "8", b"bytes")) == "new"


def test_each_run_and_sender_has_ids_of_its_own():
    known = DedupWindow()
    known.add("r", "w1", PostFingerprint.of("r", "w1", "7", b"bytes"))
    assert known.seen("q", "w1", PostFingerprint.of("q", "w1", "7", b"bytes")) == "new"
    assert known.seen("r", "w2", PostFingerprint.of("r", "w2", "7", b"bytes")) == "new"
    known.add("a", "b/c", PostFingerprint.of("a", "b/c", "d", b""))
    assert known.seen("a", "b", PostFingerprint.of("a", "b", "c/d", b"")) == "new"
    known.add("ab", "c", PostFingerprint.of("ab", "c", "d", b""))
    assert known.seen("a", "bc", PostFingerprint.of("a", "bc", "d", b"")) == "new"


def test_the_newest_are_kept_and_at_most_twice_as_many():
    known = DedupWindow(limit=3)
    marks = [PostFingerprint.of("r", "w1", name, b"") for name in "abcdefghij"]
    for count, mark in enumerate(marks, 1):
        known.add("r", "w1", mark)
        looks = [known.seen("r", "w1", each) for each in marks[:count]]
        assert looks[-3:] == ["same"] * min(3, count)
        assert looks[:-6] == ["new"] * max(0, count - 6)


def test_a_repeated_id_is_kept_longer():
    known = DedupWindow(limit=3)
    for name in "abcabde":
        known.add("r", "w1", PostFingerprint.of("r", "w1", name, b""))
    assert [known.seen("r", "w1", PostFingerprint.of("r", "w1", name, b"")) for name in "bde"] == [
        "same"
    ] * 3


def test_the_last_bytes_of_an_id_count():
    known = DedupWindow(limit=2)
    known.add("r", "w1", PostFingerprint.of("r", "w1", "7", b"one"))
    known.add("r", "w1", PostFingerprint.of("r", "w1", "7", b"two"))
    assert known.seen("r", "w1", PostFingerprint.of("r", "w1", "7", b"two")) == "same"
    assert known.seen("r", "w1", PostFingerprint.of("r", "w1", "7", b"one")) == "other"
    known.add("r", "w1", PostFingerprint.of("r", "w1", "8", b""))
    assert known.seen("r", "w1", PostFingerprint.of("r", "w1", "7", b"two")) == "same", (
        "it was counted once"
    )


def test_a_sender_with_many_ids_does_not_push_out_those_of_others():
    known = DedupWindow(limit=8)
    few = [PostFingerprint.of("r", "w1", name, b"") for name in "abc"]
    for mark in few:
        known.add("r", "w1", mark)
    for number in range(100):
        known.add("q", "w2", PostFingerprint.of("q", "w2", str(number), b""))
        known.validate_state()
    assert [known.seen("r", "w1", each) for each in few] == ["same"] * 3
    last = [PostFingerprint.of("q", "w2", str(number), b"") for number in range(95, 100)]
    assert [known.seen("q", "w2", each) for each in last] == ["same"] * 5


def test_the_ids_of_runs_that_have_ended_are_trimmed_first():
    known = DedupWindow(limit=4, has_ended=lambda run: run == "over")
    for number in range(4):
        known.add("over", "a", PostFingerprint.of("over", "a", str(number), b""))
    marks = [PostFingerprint.of("r", "a", str(number), b"") for number in range(4)]
    for mark in marks:
        known.add("r", "a", mark)
    known.validate_state()
    assert [known.seen("r", "a", each) for each in marks] == ["same"] * 4
    assert known.seen("over", "a", PostFingerprint.of("over", "a", "3", b"")) == "new"


def test_a_rejected_post_of_an_old_ledger_is_known_without_its_sender():
    boxes = Mailboxes()
    restorer = Restorer(boxes)
    restorer.feed(Opened(seq=0, at=0.0, run="r", config="", total_clients=1))
    mark = PostFingerprint.of("r", "w1", "7", b"bytes")
    fields = {"run": "r", "node": "broker", "id": "7", "reason": "", "mark": mark.to_bytes()}
    restorer.feed(Refusal(seq=1, at=0.0, **fields))
    hello = Hello(node="w1", role="worker", session="s", run="r")
    assert boxes.seen(Node(hello, boxes.runs["r"], b"", 0.0), mark) == "same"
