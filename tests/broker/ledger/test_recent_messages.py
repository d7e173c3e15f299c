"""Accepted messages at hand, found by number."""

import random

from fedmq.broker.ledger.recent_messages import RecentMessages
from tests.broker.ledger.small_ledger import accepted
from tests.broker.ledger.test_many_entries import many


def test_a_message_is_found_by_its_number_however_it_came():
    shelf, seq, all_of_them, rng = RecentMessages(), 0, {}, random.Random(1)  # noqa: S311 - not a secret
    oldest = []
    for _ in range(200):
        count = rng.choice([1, 1, 2, 40])
        entry = many(seq, count) if count > 1 else accepted(seq)
        shelf.add(entry)
        oldest.append(seq + count)
        all_of_them |= {each.seq: each for each in (entry.each() if count > 1 else [entry])}
        seq += count + rng.choice([0, 0, 3])  # other entries lie between
        if rng.random() < 0.4:
            shelf.drop_oldest()
            gone = oldest.pop(0)
            all_of_them = {key: each for key, each in all_of_them.items() if key >= gone}
        assert shelf.nbytes == sum(len(each.message) for each in all_of_them.values())
    assert {number: shelf.find(number) for number in range(-1, seq + 9)} == dict.fromkeys(
        range(-1, seq + 9)
    ) | all_of_them
    shelf.clear()
    assert (shelf.nbytes, shelf.find(seq - 1)) == (0, None)
