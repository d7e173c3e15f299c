"""Distributions by spec: means, errors, and the draws of ``worker.slowdown``."""

import math

import numpy as np
import pytest

from fedmq.codecs.errors import SpecError
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.distributions import DISTRIBUTIONS, distribution, read_distribution
from fedmq.nodes.run.stragglers import slowdown

SPECS = {
    "constant": "constant(3)",
    "uniform": "uniform(1, 3)",
    "halfnormal": "halfnormal(2)",
    "exponential": "exponential(5)",
    "lognormal": "lognormal(2, 0.5)",
    "pareto": "pareto(4, 3, 1)",
    "choice": "choice(1, 1, 10)",
}


def test_each_distribution_is_tested() -> None:
    assert SPECS.keys() == DISTRIBUTIONS.keys()


@pytest.mark.parametrize("spec", SPECS.values())
def test_draws_have_the_stated_mean_and_lower_end(spec: str) -> None:
    found = read_distribution(spec)
    values = found.draw(np.random.default_rng(1), 200_000)
    assert values.shape == (200_000,)
    assert values.mean() == pytest.approx(found.mean, rel=0.02)
    assert values.min() >= found.low >= 0


def test_a_number_is_a_constant() -> None:
    assert distribution(2, "key").one(np.random.default_rng(0)) == 2.0


def test_the_median_of_lognormal_and_the_start_of_pareto_are_parameters() -> None:
    rng = np.random.default_rng(0)
    assert np.median(read_distribution("lognormal(7, 2)").draw(rng, 100_000)) == pytest.approx(
        7, rel=0.05
    )
    pareto = read_distribution("pareto(0.9, scale=2, start=2)")
    assert pareto.draw(rng, 1000).min() >= 2
    assert pareto.mean == math.inf


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gamma(1)", "unknown distribution 'gamma'"),
        ("uniform(1)", "expected uniform(low, high)"),
        ("uniform(-1, 2)", "expected values of at least 0, got uniform(-1, 2)"),
        ("exponential(-1)", "scale: expected a number of at least 0"),
        ("lognormal(0, 1)", "median: expected a number above 0, got 0"),
        ("choice()", "expected at least one value"),
        (-1.0, "expected values of at least 0, got -1.0"),
        ("3 +", "expected name(value, key=value)"),
        ("lognormal(2, 1e9)", "sigma: expected a mean"),
    ],
)
def test_errors_name_the_key(spec: float | str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"^simulation\.compute: ") as caught:
        distribution(spec, "simulation.compute")
    assert words in str(caught.value)
    with pytest.raises(SpecError):
        read_distribution(spec)


@pytest.mark.parametrize(
    ("spec", "draw"),
    [
        ("uniform(0, 3)", lambda rng: rng.uniform(0, 3)),
        ("uniform(-1, 3)", lambda rng: max(0.0, rng.uniform(-1, 3))),
        ("halfnormal(2)", lambda rng: abs(rng.normal(0, 2))),
        ("pareto(1.5)", lambda rng: rng.pareto(1.5)),
        ("exponential(2)", lambda rng: rng.exponential(2)),
    ],
)
def test_slowdowns_draw_what_they_drew_in_the_first_release(spec: str, draw) -> None:
    """A replay of an old ledger decides by the next draw whether a result was lost."""
    ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
    assert [slowdown(spec)(ours) for _ in range(50)] == [1 + draw(theirs) for _ in range(50)]
    assert ours.random() == theirs.random()
