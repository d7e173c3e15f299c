from fedmq.broker.core.deduplication import DedupWindow, PostFingerprint


def test_a_message_is_new_the_same_or_another():
    known = DedupWindow()
    assert known.seen(PostFingerprint.of("r", "w1", "7", b"bytes")) == "new"
    known.add(PostFingerprint.of("r", "w1", "7", b"bytes"))
    assert known.seen(PostFingerprint.of("r", "w1", "7", b"bytes")) == "same"
    assert known.seen(PostFingerprint.of("r", "w1", "7", b"other bytes")) == "other"
    assert known.seen(PostFingerprint.of("r", "w1", "8", b"bytes")) == "new"


def test_each_run_and_sender_has_ids_of_its_own():
    known = DedupWindow()
    known.add(PostFingerprint.of("r", "w1", "7", b"bytes"))
    assert known.seen(PostFingerprint.of("q", "w1", "7", b"bytes")) == "new"
    assert known.seen(PostFingerprint.of("r", "w2", "7", b"bytes")) == "new"
    known.add(PostFingerprint.of("a", "b/c", "d", b""))
    assert known.seen(PostFingerprint.of("a", "b", "c/d", b"")) == "new"
    known.add(PostFingerprint.of("ab", "c", "d", b""))
    assert known.seen(PostFingerprint.of("a", "bc", "d", b"")) == "new"


def test_the_newest_are_kept_and_at_most_twice_as_many():
    known = DedupWindow(limit=3)
    marks = [PostFingerprint.of("r", "w1", name, b"") for name in "abcdefghij"]
    for count, mark in enumerate(marks, 1):
        known.add(mark)
        looks = [known.seen(each) for each in marks[:count]]
        assert looks[-3:] == ["same"] * min(3, count)
        assert looks[:-6] == ["new"] * max(0, count - 6)


def test_a_repeated_id_is_kept_longer():
    known = DedupWindow(limit=3)
    for name in "abcabde":
        known.add(PostFingerprint.of("r", "w1", name, b""))
    assert [known.seen(PostFingerprint.of("r", "w1", name, b"")) for name in "bde"] == ["same"] * 3


def test_the_last_bytes_of_an_id_count():
    known = DedupWindow(limit=2)
    known.add(PostFingerprint.of("r", "w1", "7", b"one"))
    known.add(PostFingerprint.of("r", "w1", "7", b"two"))
    assert known.seen(PostFingerprint.of("r", "w1", "7", b"two")) == "same"
    assert known.seen(PostFingerprint.of("r", "w1", "7", b"one")) == "other"
    known.add(PostFingerprint.of("r", "w1", "8", b""))
    assert known.seen(PostFingerprint.of("r", "w1", "7", b"two")) == "same", "it was counted once"
