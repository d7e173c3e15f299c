"""What waits to be sent is bounded in bytes, by connection and in all."""

from fedmq.broker.wire.send_queues import MARK_BYTES, SendQueues

MIB = 1 << 20
A, B = b"a", b"b"


class Tracker:
    done = False


def hand_over(queues):
    """Give all frames to ZeroMQ; return the trackers."""
    trackers = []
    for peer, queue in queues.begin():
        while queue:
            queue.next()
            tracker = Tracker() if queues.needs_mark(queue) else None
            queue.handed_over(tracker)
            trackers += [tracker] if tracker else []
        queues.count(queue)
        queues.emptied(peer)
    return trackers


def test_what_a_connection_does_not_read_is_bounded_in_zeromqs_queue_as_well():
    queues = SendQueues(4 * MIB, 100 * MIB)
    for _ in range(10):
        queues.add(A, b"chunk", [bytes(MIB)])
        hand_over(queues)
    assert queues.dropped == 6
    assert not queues.has_room(A)
    queues.add(A, b"beat", [])
    assert queues.dropped == 7
    queues.add(B, b"chunk", [bytes(MIB)])
    assert queues.dropped == 7


def test_a_connection_that_reads_has_room_again():
    queues = SendQueues(4 * MIB, 100 * MIB)
    for _ in range(3):
        queues.add(A, b"chunk", [bytes(MIB)])
    trackers = hand_over(queues)
    assert len(trackers) == 3
    assert not queues.has_room(A)
    for each in trackers:
        each.done = True
    assert queues.has_room(A)


def test_models_are_tracked_one_by_one_only_once_many_bytes_have_no_tracker():
    queues = SendQueues(32 * MIB, 256 * MIB)
    for peer in range(40):  # 20 MiB in all
        for _ in range(4):
            queues.add(b"%d" % peer, b"model", [bytes(MIB // 8)])
    trackers = hand_over(queues)
    uncounted = sum(each.unmarked for each in queues._queues.values())
    assert uncounted == queues._unmarked <= 17 * MIB
    assert 1 <= len(trackers) <= 40
    for peer in range(40):
        queues.discard(b"%d" % peer)
    assert queues._unmarked == queues._total == 0


def test_small_frames_count_once_there_are_many():
    queues = SendQueues(MIB, 100 * MIB)
    for _ in range(50_000):
        queues.add(A, b"a heartbeat of thirty-two bytes.", [])
        if not queues.dropped:
            hand_over(queues)
    assert queues.dropped > 10_000


def test_beyond_the_total_a_connection_may_have_a_little():
    queues = SendQueues(8 * MIB, 16 * MIB)
    for number in range(8):
        peer = b"greedy%d" % number
        while queues.has_room(peer):
            queues.add(peer, b"chunk", [bytes(MIB)])
    before = queues.dropped
    queues.add(A, b"delivery", [bytes(MIB)])
    assert queues.dropped == before
    for _ in range(8):
        queues.add(A, b"delivery", [bytes(MIB)])
    assert queues.dropped > before


def test_records_of_idle_connections_are_dropped():
    queues = SendQueues(MIB, 100 * MIB)
    queues.add(A, b"beat", [])
    queues.add(B, bytes(MARK_BYTES // 2), [])
    assert not hand_over(queues)
    assert queues.sweep() == []
    assert queues.sweep() == [B]  # nobody knows whether it has read that
    queues.add(B, b"beat", [])
    [tracker] = hand_over(queues)
    tracker.done = True
    assert queues.sweep() == queues.sweep() == queues.sweep() == []
    assert not queues._queues
