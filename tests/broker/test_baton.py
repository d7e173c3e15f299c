"""Whose turn it is, whatever interrupts the waiting for it."""

import signal
import threading
import time

import pytest

from fedmq.broker.baton import Baton


class Stopped(BaseException):
    pass


def stop(*_):
    raise Stopped


@pytest.fixture
def baton():
    baton = Baton(lambda: False)
    yield baton
    baton.close()


def hold(baton, until):
    """Have another thread take a turn that lasts; returns once it does."""
    began = threading.Event()

    def turn():
        with baton._lock:
            began.set()
            until.wait()

    thread = threading.Thread(target=turn)
    thread.start()
    began.wait()
    return thread


def test_a_signal_that_ends_the_waiting_does_not_give_the_baton(baton, monkeypatch):
    until = threading.Event()
    thread = hold(baton, until)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Stopped), baton:
            pytest.fail("the other thread has it")
    finally:
        signal.signal(signal.SIGALRM, before)
    later = threading.Timer(0.05, until.set)
    later.start()
    with baton:
        assert until.is_set(), "both had the baton"
    thread.join()
    later.join()


def test_the_main_thread_may_take_it_again_and_others_wait_until_it_is_done(baton):
    taken = threading.Event()

    def take():
        with baton._lock:
            taken.set()

    thread = threading.Thread(target=take)
    with baton:
        with baton:
            thread.start()
        time.sleep(0.02)
        assert not taken.is_set()
    thread.join()
    assert taken.is_set()
