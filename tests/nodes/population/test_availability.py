"""Availability over virtual time: its rates, its ranges, and work that pauses."""

import math
from pathlib import Path

import numpy as np
import pytest

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.availability import Availability
from fedmq.nodes.population.population import Population
from fedmq.nodes.population.table import SimulationTable


def availability(
    spec: float | str, clients: int = 1000, step: float = 10.0, seed: int = 0, position=None
) -> Availability:
    table = SimulationTable(availability=spec, availability_step=step)
    found = Population(table, clients, seed, lambda _: 1, position).availability
    assert found is not None
    return found


def history(found: Availability, steps: int) -> np.ndarray:
    """Return bool [steps, clients], at the middle of each step."""
    rows = []
    for step in range(steps):
        while found.next_change <= (step + 0.5) * 10:
            found.advance(found.next_change)
        rows.append(found.available.copy())
    return np.array(rows)


def test_a_probability_is_drawn_again_at_each_step() -> None:
    seen = history(availability(0.7), 200)
    assert seen.mean() == pytest.approx(0.7, abs=0.01)
    # A draw does not depend on the one before.
    after_away = seen[1:][~seen[:-1]]
    assert after_away.mean() == pytest.approx(0.7, abs=0.01)


def test_all_clients_are_always_available_with_probability_1() -> None:
    found = availability(1.0)
    assert found.available.all()
    assert found.next_change == math.inf


def test_the_ranges_are_the_changes() -> None:
    found = availability(0.5)
    mirror = found.available.copy()
    for _ in range(50):
        back, away = found.advance(found.next_change)
        for ranges, value in ((back, True), (away, False)):
            for low, high in ranges:
                assert (mirror[low : high + 1] != value).all()
                mirror[low : high + 1] = value
        assert (mirror == found.available).all()


def test_a_client_is_available_at_the_same_times_whatever_the_number_of_clients() -> None:
    for spec in (0.3, "spells(lognormal(50, 1), exponential(30))", "daily(8)"):
        few, many = availability(spec, 10), availability(spec, 5000)
        for now in (0.0, 10.0, 55.0, 400.0, 40_000.0):
            few.advance(now)
            many.advance(now)
            assert (few.available == many.available[:10]).all()


def test_time_can_pass_in_one_step_or_in_many() -> None:
    for spec in (0.3, "spells(lognormal(50, 1), exponential(30))", "daily(8)"):
        one, other = availability(spec), availability(spec)
        one.advance(1234.0)
        while other.next_change <= 1234.0:
            other.advance(other.next_change)
        assert (one.available == other.available).all()
        assert one.next_change == other.next_change


def test_spells_have_the_stated_lengths() -> None:
    seen = history(availability("spells(exponential(200), 100)"), 400)
    # From the second on: a uniform share is left of the first spell.
    assert seen[100:].mean() == pytest.approx(2 / 3, abs=0.03)
    runs = np.diff(np.flatnonzero(np.diff(seen[:, 0].astype(int))))
    assert 10 in runs
    assert availability("spells(exponential(200), 100)").available.mean() == pytest.approx(
        2 / 3, abs=0.05
    )


def test_short_spells_take_a_step() -> None:
    found = availability("spells(1e-9, 1e-9)", clients=1)
    seen = history(found, 20)
    assert (seen[1:] != seen[:-1]).all()


def test_daily_hours_by_chance_and_by_label() -> None:
    found = availability("daily(6)", step=600.0)
    assert found.available.mean() == pytest.approx(0.25, abs=0.05)
    assert found.advance(86_400.0) == ([], [])  # the next day begins in the same way
    by_label = availability("daily(6, label)", 2, 600.0, position=lambda client: client * 0.5)
    assert by_label.available.tolist() == [True, False]
    by_label.advance(6 * 3600.0)
    assert by_label.available.tolist() == [False, False]
    by_label.advance(9 * 3600.0)  # half of the 18 h between the first and the last start
    assert by_label.available.tolist() == [False, True]


def test_a_probability_can_depend_on_the_clients_labels() -> None:
    found = availability("by_label(0.1, 0.9)", 2000, position=lambda client: client / 2000)
    seen = history(found, 50)
    assert seen[:, :200].mean() == pytest.approx(0.14, abs=0.02)
    assert seen[:, -200:].mean() == pytest.approx(0.86, abs=0.02)
    with pytest.raises(ConfigError, match="expected a problem with classes"):
        availability("by_label(0.1, 0.9)")


def test_labels_that_never_take_part() -> None:
    found = availability("by_label(0, 1)", 2, position=float)
    assert found.available.tolist() == [False, True]
    assert found.next_change == math.inf
    assert found.work_until(0, 0.0, 1.0) == math.inf
    assert found.work_until(1, 5.0, 1.0) == 6.0


def trace(tmp_path: Path, text: str) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return str(path)


def test_a_trace(tmp_path: Path) -> None:
    path = trace(tmp_path, "client,start,end\n1,30,60\n0,0,20\n1,100,1e4\n0,20,50\n9,0,50\n")
    found = availability(path, clients=3)
    assert found.available.tolist() == [True, False, False]
    changes = []
    while found.next_change < math.inf:
        now = found.next_change
        changes.append((now, *found.advance(now)))
    assert changes == [
        (30.0, [(1, 1)], []),
        (50.0, [], [(0, 0)]),
        (60.0, [], [(1, 1)]),
        (100.0, [(1, 1)], []),
        (10_000.0, [], [(1, 1)]),
    ]


def test_work_pauses_while_the_client_is_away(tmp_path: Path) -> None:
    path = trace(tmp_path, "client,start,end\n0,0,20\n0,100,130\n")
    found = availability(path, clients=1)
    assert found.work_until(0, 0.0, 5.0) == 5.0
    assert found.work_until(0, 3.0, 17.0) == 20.0
    assert found.work_until(0, 3.0, 30.0) == 113.0
    assert found.work_until(0, 50.0, 30.0) == 130.0
    assert found.work_until(0, 50.0, 31.0) == math.inf
    found.advance(100.0)
    assert found.work_until(0, 110.0, 20.0) == 130.0


def test_work_agrees_with_what_time_brings() -> None:
    for spec in (0.4, "spells(exponential(40), lognormal(20, 1))", "daily(5)"):
        ahead, found = availability(spec), availability(spec)
        for client in range(20):
            assert found.work_until(client, 0.0, 95.0) == pytest.approx(worked(ahead, client, 95.0))
            ahead = availability(spec)


def worked(found: Availability, client: int, seconds: float) -> float:
    now = 0.0
    while True:
        step = found.next_change - now
        if found.available[client] and seconds <= step:
            return now + seconds
        seconds -= step if found.available[client] else 0.0
        now = found.next_change
        found.advance(now)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("client,start\n0,1\n", "line 1: expected the columns client, start and end, end is"),
        ("client,start,end\n0,5,5\n", "line 2, column end: expected more than start, 5"),
        ("client,start,end\n0,0,9\n0,5,12\n", "line 3, column start: expected no overlap with 0"),
        ("client,start,end\n-1,0,9\n", "line 2, column client: expected the number of a client"),
        ("client,start,end\n0,0,inf\n", "line 2, column end: expected a number of at least 0"),
    ],
)
def test_bad_traces_fail_with_file_line_and_column(tmp_path: Path, text: str, words: str) -> None:
    path = trace(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        availability(path)
    assert str(caught.value).startswith(f"simulation.availability: {path}, {words}")


def test_an_empty_trace_has_nobody(tmp_path: Path) -> None:
    found = availability(trace(tmp_path, "client,start,end\n"), clients=2)
    assert not found.available.any()
    assert found.next_change == math.inf


class Flicker:
    """On for a step, then away for three, and so on."""

    def first(self, clients):
        return np.ones(len(clients), bool), np.ones(len(clients), np.int64)

    def length(self, clients, numbers, on):
        return np.where(on, 1, 3)


def test_a_task_of_very_many_spells_ends() -> None:
    found = Availability(Flicker(), 1, 1.0)
    assert found.work_until(0, 0.0, 1e6) == pytest.approx(4e6, rel=1e-3)
    assert found.work_until(0, 0.0, 100.0) == 397.0
