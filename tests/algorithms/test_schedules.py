"""Schedules are pure answers: what a view of the run makes of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.schedules import (
    SCHEDULES,
    Buffered,
    Rounds,
    ScheduleView,
    Stream,
    find_schedule,
)
from fedmq.algorithms.schedules.recorded_rounds import RecordedRounds
from fedmq.algorithms.schedules.staleness import STALENESS, staleness
from fedmq.codecs.errors import SpecError


def view(clients=10, started=0, outstanding=0, results=0, *, passed=False, flying=None, **more):
    """Return a view in which what flies is of the current version, unless it says otherwise."""
    return ScheduleView(
        clients=clients,
        in_flight=outstanding if flying is None else flying,
        started=started,
        outstanding=outstanding,
        results=results,
        deadline_passed=passed,
        **more,
    )


# ---- staleness


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("constant", {0: 1, 1: 1, 1000: 1}),
        ("polynomial(0.5)", {0: 1, 3: 0.5, 8: 1 / 3}),
        ("polynomial(a=2)", {0: 1, 1: 0.25, 9: 0.01}),
        ("hinge(10, 4)", {0: 1, 4: 1, 5: 1 / 11, 6: 1 / 21}),
        ("hinge(a=0.5, b=0)", {0: 1, 2: 0.5}),
        ("inverse_sqrt", {0: 1, 3: 0.5, 8: 1 / 3}),
    ],
)
def test_staleness_functions_have_the_papers_values(spec, values):
    for tau, expected in values.items():
        assert staleness(spec)(tau) == pytest.approx(expected, rel=1e-12)


@given(st.sampled_from(["constant", "polynomial(0.5)", "hinge(10, 4)", "inverse_sqrt"]))
def test_a_fresh_result_counts_in_full_and_a_later_one_never_more(spec):
    values = [staleness(spec)(tau) for tau in range(50)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("polynomial(0)", "polynomial: expected a greater than 0, got 0"),
        ("polynomial(-1)", "polynomial: expected a greater than 0, got -1"),
        ("polynomial(1e999)", "polynomial: expected a greater than 0, got inf"),
        ("polynomial(half)", "polynomial"),
        ("polynomial", r"missing a required argument: 'a'; expected polynomial\(a\)"),
        ("polynomial(1, 2)", r"expected polynomial\(a\)"),
        ("hinge(0, 4)", "hinge: expected a greater than 0, got 0"),
        ("hinge(10, -1)", "hinge: expected b of at least 0, got -1"),
        ("hinge(10)", r"expected hinge\(a, b\)"),
        ("inverse_sqrt(2)", "too many positional arguments"),
        ("poly(1)", "unknown staleness function 'poly'.*constant, hinge, inverse_sqrt, polynomial"),
    ],
)
def test_a_bad_staleness_function_is_named(spec, message):
    with pytest.raises(SpecError, match=message):
        staleness(spec)


@pytest.mark.parametrize("schedule", [Rounds, Buffered, Stream])
def test_a_schedule_reads_its_staleness_function_when_it_is_made(schedule):
    with pytest.raises(AlgorithmError, match=r"^staleness: unknown staleness function 'none'"):
        schedule(staleness="none")
    for name in STALENESS:
        arguments = {"polynomial": "(1)", "hinge": "(1, 1)"}.get(name, "")
        schedule(staleness=name + arguments)


# ---- rounds


@pytest.mark.parametrize(
    ("fraction", "clients", "min_results", "cohort"),
    [(0.1, 100, 1, 10), (0.0, 100, 1, 1), (1.0, 7, 1, 7), (0.1, 3, 1, 1), (0.1, 100, 12, 12)],
)
def test_a_cohort_is_a_share_of_the_clients(fraction, clients, min_results, cohort):
    """m = max(C K, 1)."""
    schedule = Rounds(fraction=fraction, min_results=min_results)
    assert schedule.cohort(clients) == cohort
    assert schedule.num_to_start(view(clients)) == cohort


def test_a_round_waits_for_its_whole_cohort():
    schedule = Rounds(fraction=0.3)
    assert schedule.num_to_start(view()) == 3
    assert not schedule.is_ready(view())
    for results in range(3):
        now = view(started=3, outstanding=3 - results, results=results)
        assert schedule.num_to_start(now) == 0
        assert not schedule.is_ready(now)
    done = view(started=3, outstanding=0, results=3)
    assert schedule.is_ready(done)
    assert schedule.num_to_start(done) == 0


def test_over_selection_asks_more_than_it_waits_for():
    """4 wanted, 1.3 tasks for each: ceil(5.2) = 6 are sent, the first 4 close the round."""
    schedule = Rounds(fraction=0.4, over_select=1.3)
    assert schedule.num_to_start(view()) == 6
    assert not schedule.is_ready(view(started=6, outstanding=3, results=3))
    assert schedule.is_ready(view(started=6, outstanding=2, results=4))


def test_a_round_closes_with_whom_is_left_if_they_are_enough():
    schedule = Rounds(fraction=0.4, min_results=2)
    assert not schedule.is_ready(view(started=4, outstanding=1, results=2))
    assert schedule.is_ready(view(started=4, outstanding=0, results=2))


def test_a_round_with_too_few_left_draws_others():
    """4 wanted, 1 in hand, nobody out: 3 are missing."""
    schedule = Rounds(fraction=0.4, min_results=2, over_select=2.0)
    now = view(started=4, outstanding=0, results=1)
    assert not schedule.is_ready(now)
    assert schedule.num_to_start(now) == 6


def test_a_deadline_closes_a_round_that_has_the_least_it_needs():
    schedule = Rounds(fraction=0.4, min_results=2, deadline_s=5.0)
    assert schedule.deadline() == 5.0
    assert not schedule.is_ready(view(started=4, outstanding=2, results=2))
    assert schedule.is_ready(view(started=4, outstanding=2, results=2, passed=True))
    assert not schedule.is_ready(view(started=4, outstanding=3, results=1, passed=True))


def test_a_round_that_has_sent_nothing_does_not_close_on_late_results():
    schedule = Rounds(fraction=0.4, min_results=1)
    assert not schedule.is_ready(view(started=0, results=1, late=1))
    assert schedule.num_to_start(view(started=0, results=1, late=1)) == 4


def test_a_late_result_takes_nobodys_place():
    """4 wanted, 3 in hand and one late one: the fourth is still waited for."""
    schedule = Rounds(fraction=0.4)
    now = view(started=4, outstanding=1, results=4, late=1)
    assert not schedule.is_ready(now)
    assert schedule.num_to_start(now) == 0
    assert schedule.is_ready(view(started=4, outstanding=0, results=5, late=1))


def test_late_results_alone_are_not_the_least_a_round_needs():
    schedule = Rounds(fraction=0.4, min_results=2, deadline_s=5.0)
    assert not schedule.is_ready(view(started=4, outstanding=2, results=4, late=3, passed=True))
    assert schedule.is_ready(view(started=4, outstanding=2, results=5, late=3, passed=True))


def test_a_client_that_is_busy_with_an_earlier_round_is_drawn_when_it_is_free():
    """4 wanted, 3 drawn: the round goes on until the fourth has had its turn."""
    schedule = Rounds(fraction=0.4)
    busy = view(started=3, outstanding=0, results=3, behind=1)
    assert not schedule.is_ready(busy)
    assert schedule.num_to_start(busy) == 1
    assert schedule.num_to_start(view(started=3, outstanding=2, results=1)) == 1
    assert not schedule.is_ready(view(started=4, outstanding=1, results=3))
    assert schedule.is_ready(view(started=3, outstanding=0, results=3, behind=0))


def test_a_deadline_does_not_wait_for_a_client_that_is_busy():
    schedule = Rounds(fraction=0.4, deadline_s=5.0)
    late = view(started=3, outstanding=0, results=3, behind=1, passed=True)
    assert schedule.is_ready(late)
    assert schedule.num_to_start(view(started=3, outstanding=1, results=0, passed=True)) == 0


def test_a_whole_first_draw_waits_for_nobody_who_is_busy():
    """Over-selection leaves some behind in every round; there are others to draw."""
    schedule = Rounds(fraction=0.4, over_select=1.5)
    assert schedule.is_ready(view(started=6, outstanding=0, results=3, behind=2))


def test_rounds_of_old_runs_count_late_results_as_their_own():
    schedule = RecordedRounds(fraction=0.4)
    assert schedule.is_ready(view(started=4, outstanding=1, results=4, late=1))
    assert schedule.num_to_start(view(started=0, results=1, late=1)) == 3
    assert not schedule.num_to_start(view(started=3, outstanding=2, results=1, late=1))


@pytest.mark.parametrize(("late", "weight"), [("use", 12.0), ("discount", 6.0), ("refuse", None)])
def test_a_late_result_is_used_discounted_or_refused(late, weight):
    """n = 12, three versions late: s(3) = 0.5."""
    schedule = Rounds(late=late, staleness="polynomial(0.5)")
    assert schedule.weight(12, 0) == 12.0
    assert schedule.weight(12, 3) == weight


def test_a_round_divides_by_the_sum_of_the_weights():
    assert Rounds().divisor(7.5, 3) == 7.5
    assert Rounds().deadline() is None
    assert (Rounds.reply, Rounds.ordered) == ("update", True)


# ---- buffered and stream


@pytest.mark.parametrize("schedule", [Buffered(concurrency=5), Stream(concurrency=5)])
def test_every_task_that_has_ended_is_replaced(schedule):
    assert [schedule.num_to_start(view(flying=flying)) for flying in (0, 3, 5, 6)] == [5, 2, 0, 0]
    assert schedule.deadline() is None
    assert not schedule.ordered


def test_a_buffer_closes_when_it_is_full():
    schedule = Buffered(size=3)
    assert [schedule.is_ready(view(results=n)) for n in range(5)] == [False] * 3 + [True] * 2
    assert schedule.reply == "update"


def test_a_buffered_result_counts_by_its_staleness_alone():
    """1 / sqrt(1 + tau), whatever n; over K, not over the sum of the weights."""
    schedule = Buffered()
    assert [schedule.weight(n, 3) for n in (1, 1000)] == [0.5, 0.5]
    assert schedule.weight(5, 0) == 1.0
    assert schedule.divisor(1.5, 10) == 10.0


def test_a_stream_closes_after_every_result():
    schedule = Stream()
    assert [schedule.is_ready(view(results=n)) for n in (0, 1)] == [False, True]
    assert schedule.reply == "model"


def test_a_streamed_model_counts_by_its_mixing_rate():
    """alpha_t = 0.6 (1 + 3)^-0.5; nothing is divided."""
    schedule = Stream(mixing=0.6)
    assert schedule.weight(1000, 0) == 0.6
    assert schedule.weight(1, 3) == pytest.approx(0.3)
    assert schedule.divisor(0.3, 1) == 1.0


@pytest.mark.parametrize("schedule", [Buffered, Stream])
def test_a_result_beyond_the_bound_is_not_used(schedule):
    assert schedule(max_staleness=2).weight(1, 2) is not None
    assert schedule(max_staleness=2).weight(1, 3) is None
    assert schedule(max_staleness=0).weight(1, 0) is not None
    assert schedule().weight(1, 10**6) is not None


@given(
    st.sampled_from([Rounds(fraction=0.5, min_results=2), Buffered(size=3), Stream()]),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(0, 20),
    st.booleans(),
)
def test_a_schedule_always_has_something_to_wait_for(schedule, clients, out, results, passed):
    """Where nothing is out, it either closes or wants somebody: no run stands still."""
    now = view(clients, started=out, outstanding=0, results=results, passed=passed)
    assert schedule.is_ready(now) or schedule.num_to_start(now) > 0


# ---- registry


def test_schedules_are_found_by_name():
    assert {name: find_schedule(name) for name in SCHEDULES} == {
        "rounds": Rounds,
        "buffered": Buffered,
        "stream": Stream,
    }
    message = r"unknown schedule 'round' \(did you mean 'rounds'\?\); choose from buffered, rounds"
    with pytest.raises(AlgorithmError, match=message):
        find_schedule("round")


def test_weights_are_finite_however_late():
    for schedule in (Rounds(), Buffered(), Stream()):
        assert math.isfinite(schedule.weight(10**9, 10**9))
