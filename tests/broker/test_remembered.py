from fedmq.broker.remembered import Mark, Remembered


def test_a_message_is_the_same_another_or_new():
    known = Remembered()
    assert known.look(Mark.of("r", "w1", "7", b"bytes")) == "new"
    known.add(Mark.of("r", "w1", "7", b"bytes"))
    assert known.look(Mark.of("r", "w1", "7", b"bytes")) == "same"
    assert known.look(Mark.of("r", "w1", "7", b"other bytes")) == "other"
    assert known.look(Mark.of("r", "w1", "8", b"bytes")) == "new"


def test_each_run_and_sender_has_ids_of_its_own():
    known = Remembered()
    known.add(Mark.of("r", "w1", "7", b"bytes"))
    assert known.look(Mark.of("q", "w1", "7", b"bytes")) == "new"
    assert known.look(Mark.of("r", "w2", "7", b"bytes")) == "new"
    known.add(Mark.of("a", "b/c", "d", b""))
    assert known.look(Mark.of("a", "b", "c/d", b"")) == "new"
    known.add(Mark.of("ab", "c", "d", b""))
    assert known.look(Mark.of("a", "bc", "d", b"")) == "new"


def test_only_so_many_are_kept_and_the_oldest_are_forgotten_first():
    known = Remembered(limit=3)
    for name in "abcab":
        known.add(Mark.of("r", "w1", name, b""))
    assert [known.look(Mark.of("r", "w1", name, b"")) for name in "abc"] == ["same"] * 3
    known.add(Mark.of("r", "w1", "d", b""))
    looks = [known.look(Mark.of("r", "w1", name, b"")) for name in "abcd"]
    assert looks == ["new", "same", "same", "same"]
    known.add(Mark.of("r", "w1", "a", b""))
    looks = [known.look(Mark.of("r", "w1", name, b"")) for name in "abcd"]
    assert looks == ["same", "new", "same", "same"]


def test_of_one_id_the_bytes_that_came_last_count():
    known = Remembered(limit=2)
    known.add(Mark.of("r", "w1", "7", b"one"))
    known.add(Mark.of("r", "w1", "7", b"two"))
    assert known.look(Mark.of("r", "w1", "7", b"two")) == "same"
    assert known.look(Mark.of("r", "w1", "7", b"one")) == "other"
    known.add(Mark.of("r", "w1", "8", b""))
    assert known.look(Mark.of("r", "w1", "7", b"two")) == "same", "it was counted once"
