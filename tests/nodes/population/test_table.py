"""``[simulation]``: a table of the configuration, checked as the others are."""

import csv
import re
import tomllib
from pathlib import Path

import pytest

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.availability_specs import check_availability
from fedmq.nodes.population.csv_files import read_profiles
from fedmq.nodes.population.distributions import DISTRIBUTIONS
from fedmq.nodes.population.table import SimulationTable
from fedmq.nodes.run.config import load, parse
from fedmq.nodes.run.toml import without_none_words

PAGE = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
SECTION = PAGE.split("\n## [simulation]\n")[1].split("\n## ")[0]


def test_without_the_table_a_configuration_is_the_same_text_as_before() -> None:
    config = load(None)
    assert config.simulation is None
    assert "simulation" not in config.to_toml()


def test_the_table_survives_writing_and_reading() -> None:
    config = load(
        None,
        [
            "simulation.compute=lognormal(2, 1)",
            "simulation.availability=spells(exponential(3600), 600)",
            "simulation.faults.dropout=0.1",
            "simulation.curve.noise=0",
        ],
    )
    assert parse(config.to_toml()) == config
    assert config.simulation is not None
    assert config.simulation.faults.dropout == 0.1
    assert config.simulation.bandwidth_up is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("simulation.computes=1", "unknown key 'simulation.computes' (did you mean 'compute'?)"),
        ("simulation.faults.drop=1", "unknown key 'simulation.faults.drop'"),
        ("simulation.compute=fast", "simulation.compute: unknown distribution 'fast'"),
        ("simulation.compute=-1", "simulation.compute: expected values of at least 0"),
        ("simulation.compute=true", "simulation.compute: expected a number, got true"),
        ("simulation.latency=uniform(0, inf)", "simulation.latency: expected finite numbers"),
        ("simulation.bandwidth_up=0", "simulation.bandwidth_up: expected a bandwidth above 0"),
        (
            "simulation.bandwidth_up=constant(0)",
            "simulation.bandwidth_up: expected a bandwidth abo",
        ),
        ("simulation.bandwidth_down=choice(1e6, 0)", "expected a bandwidth above 0, got choice"),
        ("simulation.bandwidth_down=uniform(0, 0)", "expected a bandwidth above 0, got uniform"),
        ("simulation.compute=lognormal(1, 1000)", "sigma: expected a mean, median * exp(sigma**2"),
        ("simulation.compute=lognormal(1, 1e200)", "got sigma 1e+200 and median 1"),
        ("simulation.compute=lognormal(1, -1)", "sigma: expected a number of at least 0, got -1"),
        ("simulation.compute=halfnormal(-1)", "scale: expected a number of at least 0, got -1"),
        ("simulation.compute=exponential(-1)", "scale: expected a number of at least 0, got -1"),
        ("simulation.compute=uniform(3, 1)", "high: expected at least low, 3, got 1"),
        ("simulation.compute=pareto(0)", "shape: expected a number above 0, got 0"),
        ("simulation.compute=choice(1, two)", "value 2: expected a number, got two"),
        ("simulation.compute=halfnormal(wide)", "scale: expected a number, got wide"),
        ("simulation.availability_step=1e-5", "simulation.availability_step: expected a number gr"),
        ("simulation.availability=0", "simulation.availability: expected a number greater than 0"),
        ("simulation.availability=1.5", "simulation.availability: expected a number less than"),
        ("simulation.availability=often", "simulation.availability: expected a probability, spel"),
        ("simulation.availability=spells(1)", "expected spells(on, off), two lengths in seconds"),
        ("simulation.availability=spells(0, 1)", "expected spells of a finite mean above 0, got"),
        ("simulation.availability=spells(pareto(1), 1)", "expected spells of a finite mean"),
        ("simulation.availability=by_label(0, 2)", "high: expected a probability, got 2"),
        ("simulation.availability=daily(25)", "hours: expected more than 0 and less than 24"),
        ("simulation.availability=daily(8, age)", "by: expected chance or label, got 'age'"),
        ("simulation.learner=fast", "simulation.learner: expected 'train' or 'curve'"),
        ("simulation.faults.dropout=2", "simulation.faults.dropout: expected a number less than"),
    ],
)
def test_errors_are_one_sentence_that_names_the_key(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [setting])
    text = str(caught.value)
    assert "\n" not in text
    assert words in text
    assert text.removeprefix("unknown key '").startswith(setting.partition("=")[0])


def test_a_daily_step_is_at_most_half_a_day() -> None:
    with pytest.raises(ValueError, match="expected an availability_step of at most 43200"):
        SimulationTable(availability="daily(8)", availability_step=50_000)


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    assert found
    return found[1]


def test_the_docs_list_every_key_with_its_default() -> None:
    table = without_none_words(tomllib.loads(block("toml"))["simulation"])
    assert SimulationTable.model_validate(table) == SimulationTable()
    defaults = SimulationTable().model_dump()
    assert list(table) == list(defaults)
    for inner in ("faults", "curve"):
        assert list(table[inner]) == list(defaults[inner])


def test_the_docs_list_every_distribution() -> None:
    assert re.findall(r"^\| `(\w+)\(", SECTION, re.MULTILINE) == [*DISTRIBUTIONS]


def test_the_examples_of_availability_in_the_docs_are_accepted() -> None:
    found = re.findall(r'"(spells\(exp[^"]*)"', SECTION)
    assert found
    for spec in (*found, "daily(8, label)", "by_label(0.1, 0.9)", 0.8):
        check_availability(spec, 600.0)


def test_the_example_of_profiles_in_the_docs_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(block("csv"))
    rows = list(csv.DictReader(block("csv").splitlines()))
    found = read_profiles(str(path), "simulation.devices")
    assert found.values["compute"].tolist() == [float(row["compute"]) for row in rows]


@pytest.mark.parametrize("name", ["trace.csv", "trace.CSV"])
def test_a_trace_file_may_have_a_name_in_capitals(name: str) -> None:
    check_availability(name, 600.0)
