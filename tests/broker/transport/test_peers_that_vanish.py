"""Peers that close while their messages wait for room: libzmq must not abort the broker."""

import contextlib
import os
import subprocess
import sys
import time

import pytest
import zmq

_SLOW_READER = """
import sys, time, zmq
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.transport.listening import router_socket

with zmq.Context() as context:
    settings = BrokerSettings(lease_s=1.5, beat_s=0.2)
    socket = router_socket(context, settings, keyed=False)
    print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        try:
            socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            pass
        time.sleep(0.001)
"""


@pytest.mark.end_to_end
def test_floods_of_peers_that_close_do_not_abort_the_broker():
    reader = subprocess.Popen(
        [sys.executable, "-P", "-c", _SLOW_READER], stdout=subprocess.PIPE, text=True
    )
    with reader:
        port = int(reader.stdout.readline())
        end, closed = time.monotonic() + 2.5, 0
        while time.monotonic() < end and reader.poll() is None:
            with zmq.Context() as context:
                peer = context.socket(zmq.DEALER)
                peer.linger, peer.sndtimeo = 0, 50
                peer.connect(f"tcp://127.0.0.1:{port}")
                with contextlib.suppress(zmq.Again):
                    for _ in range(20_000):
                        peer.send(os.urandom(100))
                peer.close()
                closed += 1
    assert closed > 5
    assert reader.returncode == 0
