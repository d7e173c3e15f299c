"""Numbers of each client: times, bandwidths, dropouts; and files of device profiles."""

from pathlib import Path

import numpy as np
import pytest

from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.population import Population
from fedmq.nodes.population.table import FaultsTable, SimulationTable


def population(clients: int = 10, seed: int = 0, **keys: object) -> Population:
    return Population(SimulationTable(**keys), clients, seed, lambda client: 10 * client)


def test_by_default_a_task_takes_a_second_and_messages_no_time() -> None:
    found = population()
    assert found.compute_s(3, "task") == 1.0
    assert found.download_s(3, 10**9) == found.upload_s(3, 10**9) == 0.0
    assert not found.drops(3, "task")
    assert found.availability is None


def test_a_transfer_takes_the_latency_and_the_bytes_over_the_bandwidth() -> None:
    found = population(latency=0.5, bandwidth_down=1000, bandwidth_up="constant(500)")
    assert found.download_s(0, 2000) == 2.5
    assert found.upload_s(0, 2000) == 4.5


def test_compute_can_be_a_time_per_example() -> None:
    found = population(compute=0.1, compute_per="example")
    assert found.compute_s(3, "task") == pytest.approx(3.0)


def test_the_device_is_drawn_once_per_client_and_the_jitter_per_task() -> None:
    found = population(compute="lognormal(1, 1)")
    assert found.compute_s(1, "a") == found.compute_s(1, "b") != found.compute_s(2, "a")
    found = population(jitter="uniform(1, 2)")
    assert found.compute_s(1, "a") != found.compute_s(1, "b")
    assert found.compute_s(1, "a") == population(jitter="uniform(1, 2)").compute_s(1, "a")


def numbers(found: Population, clients: list[int]) -> list[tuple[float, ...]]:
    return [
        (
            found.compute_s(each, f"t{each}"),
            found.download_s(each, 1000),
            found.upload_s(each, 1000),
            float(found.drops(each, f"t{each}")),
        )
        for each in clients
    ]


def test_a_clients_numbers_depend_neither_on_their_number_nor_on_the_order() -> None:
    keys = {
        "compute": "pareto(1.2, 2)",
        "jitter": "lognormal(1, 0.1)",
        "latency": "uniform(0, 0.1)",
        "bandwidth_down": "lognormal(1e6, 1)",
        "bandwidth_up": "exponential(1e5)",
        "faults": {"dropout": 0.5},
    }
    clients = [0, 4095, 4096, 9999, 17]
    one = numbers(population(10_000, **keys), clients)
    other = numbers(population(1_000_000, **keys), clients[::-1])[::-1]
    assert one == other
    assert one != numbers(population(10_000, seed=1, **keys), clients)


def test_a_long_tail_and_a_tiny_bandwidth_end() -> None:
    found = population(200, compute="pareto(0.01)", bandwidth_up="uniform(0, 1e-9)")
    assert max(found.compute_s(each, "t") for each in range(200)) == 1e9
    assert found.upload_s(0, 10**6) == 1e9


def test_dropout_has_the_stated_rate() -> None:
    found = population(faults=FaultsTable(dropout=0.2))
    assert np.mean([found.drops(1, f"t{each}") for each in range(3000)]) == pytest.approx(
        0.2, abs=0.03
    )


def profiles(tmp_path: Path, text: str) -> str:
    path = tmp_path / "devices.csv"
    path.write_text(text)
    return str(path)


def test_profiles_are_drawn_by_weight(tmp_path: Path) -> None:
    path = profiles(
        tmp_path,
        "compute, bandwidth_up, weight\n1, 100, 3\n5, , 1\n9, 100, 0\n",
    )
    found = population(4000, devices=path, latency=0.25)
    computes = np.array([found.compute_s(each, "t") for each in range(4000)])
    assert np.mean(computes == 1) == pytest.approx(0.75, abs=0.03)
    assert {*computes} == {1.0, 5.0}
    for each in range(10):  # an empty bandwidth has no limit; other keys keep their values
        assert found.upload_s(each, 100) == (1.25 if computes[each] == 1 else 0.25)


def test_profiles_can_be_assigned(tmp_path: Path) -> None:
    path = profiles(tmp_path, "client,compute\n1,10\n0,20\n2,30\n")
    found = population(3, devices=path)
    assert [found.compute_s(each, "t") for each in range(3)] == [20, 10, 30]
    with pytest.raises(ConfigError, match="expected a row for each of 5 clients, client 3 has"):
        population(5, devices=path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected at least one of the columns compute"),
        ("speed\n1\n", "line 1: unknown column 'speed'; choose from compute, latency"),
        ("compute,compute\n1,2\n", "line 1, column compute: expected each column once"),
        ("compute\n", "line 2: expected a row for each device, got none"),
        ("compute\nfast\n", "line 2, column compute: expected a number of at least 0, got 'fast'"),
        ("compute\n\n1\n-2\n", "line 4, column compute: expected a number of at least 0"),
        ("compute,latency\n1\n", "line 2: expected 2 values, got 1"),
        ("compute,bandwidth_up\n1,0\n", "column bandwidth_up: expected a bandwidth above 0"),
        ("compute,weight\n1,0\n", "column weight: expected a weight above 0 in some row"),
        ("compute,weight,client\n1,1,1\n", "expected weight or client, got both"),
        ("compute,client\n1,0\n1,0\n", "line 3, column client: client 0 has a row already"),
        ("compute,client\n1,x\n", "column client: expected the number of a client, got 'x'"),
        ("compute\nnan\n", "expected a number of at least 0, got 'nan'"),
    ],
)
def test_bad_profiles_fail_with_file_line_and_column(tmp_path: Path, text: str, words: str) -> None:
    path = profiles(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        population(devices=path)
    assert str(caught.value).startswith(f"simulation.devices: {path}, line ")
    assert words in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^simulation\.devices: cannot read .*No such file"):
        population(devices=str(tmp_path / "none.csv"))
