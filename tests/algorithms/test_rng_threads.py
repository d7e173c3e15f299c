"""The global generators of one process, seeded by several threads at the same time."""

import random
import threading

import numpy as np

from fedmq.algorithms.rng import seeded


def draws():
    return [random.random(), np.random.random()]  # noqa: NPY002, S311


def states():
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_threads_that_seed_the_global_generators_do_not_mix_them_up():
    with seeded(1):
        alone = draws()
    before, found = states(), []
    entered, first_has_left = threading.Event(), threading.Event()

    def second():
        with seeded(1):
            entered.set()
            found.extend(draws())
            first_has_left.wait(10.0)

    thread = threading.Thread(target=second)
    with seeded(2):
        thread.start()
        entered.wait(0.1)  # without a lock, it enters here
    first_has_left.set()
    thread.join(10.0)
    assert found == alone
    assert states() == before
    with seeded(3):
        draws()
    assert states() == before
