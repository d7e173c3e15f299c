"""Which refused keys a broker reports: the log stays short, however many try."""

import zmq

from fedmq.broker.access.curve import key_bytes, key_text
from fedmq.broker.transport.zap import Door, RefusedKey


def test_refused_keys_are_reported_one_a_second_and_each_once_a_minute():
    keys = [key_text(bytes([number]) * 32) for number in range(4)]
    with zmq.Context() as context:
        door = Door(context)

        def refuse(*numbers):
            for number in numbers:
                fields = [b"fedmq", b"10.0.0.1", b"", b"CURVE", key_bytes(keys[number])]
                assert door._user(fields) == ""

        assert door.refused(0.0) is None
        refuse(0, 1, 2)
        assert door.refused(0.0) == RefusedKey(keys[0], "10.0.0.1", 2)
        refuse(0, 3)
        assert door.refused(0.9) is None
        assert door.refused(1.0) == RefusedKey(keys[3], "10.0.0.1", 0)
        refuse(0)
        assert door.refused(59.0) is None
        refuse(0)
        assert door.refused(60.0) == RefusedKey(keys[0], "10.0.0.1", 0)
        door.socket.close()
