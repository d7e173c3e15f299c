"""The handoff of a link's loop between threads, with interruptions."""

import signal
import threading

import pytest

from fedmq.broker.link.thread_handoff import LoopHandoff


class Stopped(BaseException):
    pass


def stop(*_):
    raise Stopped


@pytest.fixture
def baton():
    baton = LoopHandoff(lambda: False)
    yield baton
    baton.close()


def hold(baton, until):
    """Make another thread run a long turn; return once it is running."""
    began = threading.Event()

    def turn():
        with baton._lock:
            began.set()
            until.wait()

    thread = threading.Thread(target=turn)
    thread.start()
    began.wait()
    return thread


def wait_until_signalled(baton):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with baton:
        pytest.fail("the other thread has it")


def test_a_signal_that_interrupts_the_wait_does_not_acquire_the_lock(baton):
    until = threading.Event()
    thread = hold(baton, until)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Stopped):
            wait_until_signalled(baton)
    finally:
        signal.signal(signal.SIGALRM, before)
    later = threading.Timer(0.05, until.set)
    later.start()
    with baton:
        assert until.is_set(), "both had the baton"
    thread.join()
    later.join()


def test_the_main_thread_may_nest_and_others_acquire_the_lock_afterwards(baton):
    got = []

    def take():
        got.append(baton._lock.acquire(blocking=False))

    def let_another_take():
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()

    with baton:
        with baton:
            let_another_take()
        let_another_take()
    let_another_take()
    assert got == [False, False, True]
