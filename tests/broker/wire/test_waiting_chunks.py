"""Requested chunks wait in the ledger until their connection has read others."""

from fedmq.broker.wire.send_queues import CHUNKS_WAITING, WaitingChunks


def test_a_bounded_number_of_chunks_waits_in_order():
    room = {b"a": 2, b"b": 1000}

    def has_room(peer):
        room[peer] -= 1
        return room[peer] >= 0

    queue = WaitingChunks(has_room)
    assert [queue.may_send(b"a", start) for start in range(100)] == [True] * 2 + [False] * 98
    assert queue.may_send(b"b", 0)
    assert list(queue.take()) == []
    room[b"a"] = 1000
    assert not queue.may_send(b"a", 100)  # after those that wait
    assert list(queue.take()) == list(range(2, 2 + CHUNKS_WAITING))
    assert not queue
